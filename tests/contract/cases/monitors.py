"""`CompressionMonitor` and `CompressionReport`, alone and beside a method that changes the network."""

from lightning_light.budgets import MACs
from lightning_light.monitors import CompressionMonitor, CompressionReport
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.contract.case import Case

CASES = [
    Case("monitor", lambda folder: [CompressionMonitor(every_n_steps=1, table=False)], structural=False),
    Case(
        "monitor_of_pruning",
        lambda folder: [
            CompressionMonitor(table=False),
            StructuredPruning(MACs(0.5), schedule=OneShot(at=0.4)),
        ],
        full=False,
    ),
    Case("report", lambda folder: [CompressionReport(folder / "report.html")], structural=False),
]
