"""`MobileExport`, alone and at the end of a chain."""

from lightning_light.budgets import MACs
from lightning_light.export import MobileExport
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.contract.case import Case

CASES = [
    Case("export", lambda folder: [MobileExport(folder / "export.ptl", latency_runs=2)], structural=False),
    Case(
        "export_of_pruning",
        lambda folder: [
            StructuredPruning(MACs(0.5), schedule=OneShot(at=0.4)),
            MobileExport(folder / "export.ptl", latency_runs=2),
        ],
        full=False,
    ),
]
