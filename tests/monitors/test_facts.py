"""What methods know of a layer is in the monitor's curves and in its table."""

from typing import Any

import lightning.pytorch
from lightning.pytorch.loggers import CSVLogger

from lightning_light.budgets import MACs
from lightning_light.clustering import WeightClustering
from lightning_light.lowrank import LowRankFactorization
from lightning_light.monitors import CompressionMonitor
from lightning_light.surgery.journal import ledger_of
from tests.contract.bodies import Body, module_class
from tests.contract.runs import trainer


def test_ranks_energies_errors_and_coded_bits_are_curves_and_columns(tmp_path: Any, capsys: Any) -> None:
    module, logger = module_class(Body, lightning.pytorch)(), CSVLogger(tmp_path)
    factors = LowRankFactorization(MACs(0.5), start=0.3, round_to=1)
    monitor = CompressionMonitor()
    trainer(factors, WeightClustering(8, start=0.6), monitor, logger=logger).fit(module)
    known = ledger_of(module).state["low_rank"]["layers"]
    name, fact = next(iter(known.items()))
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    for key in ("rank", "energy_kept", "reconstruction_error"):
        assert f"compression/{key}/{name}" in header
        assert monitor.after.facts[name][key] == fact[key]
    assert f"compression/coded_bits/{name}.0" in header
    lines = capsys.readouterr().out.splitlines()
    title = next(line for line in lines if "energy kept" in line)
    assert title.split()[-6:] == ["rank", "energy", "kept", "error", "coded", "bits"]
    line = next(line for line in lines if line.split() and line.split()[0] == name)
    rank, energy, error, bits = line.split()[-4:]
    assert int(rank) == fact["rank"]
    assert abs(float(energy.rstrip("%")) / 100 - fact["energy_kept"]) < 1e-3
    assert abs(float(error) - fact["reconstruction_error"]) < 1e-2
    assert 0.0 < float(bits) < 16.0
