"""Per-layer numbers of the methods are in the monitor's curves and table."""

import csv
from typing import Any

import lightning.pytorch
from lightning.pytorch.loggers import CSVLogger

from lightning_light.budgets import MACs
from lightning_light.clustering import WeightClustering
from lightning_light.lowrank import LowRankFactorization, RankAllocation
from lightning_light.measure.snapshot import layer_stats
from lightning_light.monitors import CompressionMonitor
from lightning_light.quantization import Int8, IntN, MixedPrecision, QuantizationAwareTraining, quantize
from lightning_light.schedules import Linear, OneShot, Staircase, Window
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Body, module_class
from tests.contract.runs import trainer
from tests.zoo import noise


def test_ranks_energies_errors_and_coded_bits_are_curves_and_columns(tmp_path: Any, capsys: Any) -> None:
    module, logger = module_class(Body, lightning.pytorch)(), CSVLogger(tmp_path)
    factors = LowRankFactorization(MACs(0.5), schedule=OneShot(at=0.3), allocation=RankAllocation(round_to=1))
    monitor = CompressionMonitor()
    trainer(factors, WeightClustering(8, start=0.6), monitor, logger=logger).fit(module)
    known = state_of(module).state["low_rank"]["layers"]
    name, fact = next(iter(known.items()))
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    for key in ("rank", "energy_kept", "reconstruction_error"):
        assert f"compression_layers/{key}/{name}" in header
        assert monitor.after.stats[name][key] == fact[key]
    assert f"compression_layers/coded_bits/{name}.0" in header
    lines = capsys.readouterr().out.splitlines()
    title = next(line for line in lines if "energy kept" in line)
    assert title.split()[-6:] == ["rank", "energy", "kept", "error", "coded", "bits"]
    line = next(line for line in lines if line.split() and line.split()[0] == name)
    rank, energy, error, bits = line.split()[-4:]
    assert int(rank) == fact["rank"]
    assert abs(float(energy.rstrip("%")) / 100 - fact["energy_kept"]) < 1e-3
    assert abs(float(error) - fact["reconstruction_error"]) < 1e-2
    assert 0.0 < float(bits) < 16.0


def test_bits_of_rounded_layers_follow_the_ladder(tmp_path: Any, capsys: Any) -> None:
    module, logger = module_class(Body, lightning.pytorch)(), CSVLogger(tmp_path)
    recipe = MixedPrecision(default=IntN(4, 4), first=IntN(2, None))
    ladder = Window(Staircase(Linear(), steps=2), end=0.6)
    qat = QuantizationAwareTraining(recipe, start=0.0, calibration_batches=2, bit_width_schedule=ladder)
    monitor = CompressionMonitor(every_n_steps=1)
    trainer(qat, monitor, logger=logger).fit(module)
    assert monitor.after.stats["features.stem"] == {"weight_bits": 2.0}
    assert monitor.after.stats["head"] == {"weight_bits": 4.0, "activation_bits": 4.0}
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()))
    widths = [float(found) for row in rows if (found := row["compression_layers/bits/head"])]
    assert widths == sorted(widths, reverse=True)
    assert list(dict.fromkeys(widths)) == [32.0, 8.0, 5.0, 4.0]
    title = next(line for line in capsys.readouterr().out.splitlines() if "activation bits" in line)
    assert title.split()[-4:] == ["bits", "size", "activation", "bits"]


def test_a_network_that_was_quantized_without_training_has_bits_too() -> None:
    module = module_class(Body, lightning.pytorch)()
    quantize(module, noise(4, 3, 8, 8), Int8())
    assert layer_stats(state_of(module).state)["head"] == {"weight_bits": 8.0, "activation_bits": 8.0}
