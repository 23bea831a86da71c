"""Compressed networks can be exported, and the outputs of the file are those of the network."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch

from lightning_light.export import ONNX, ExecuTorch, MobileExport, export_model, load_exported
from lightning_light.export.torchscript_lite import TorchScriptLite
from lightning_light.lowrank import LowRankFactorization
from lightning_light.quantization import LSQ, Int8, MixedPrecision, fake_quantized
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.checkpoint import load_from_checkpoint
from tests.contract.runs import module_of, trainer, unless_refused
from tests.contract.table import CASES


def rows() -> Iterator[Any]:
    """For ``parametrize``: the rows whose file is another program than that of an earlier row.

    A row that only trains other weights than its method's first row exports the same program and is left out. Another
    criterion of channels or another choice of ranks exports the same program with other widths and is slow.
    """
    seen = set()
    for case in CASES:
        if case.full or case.structural or case.tolerance > 1e-4:
            callbacks = case.build(Path(gettempdir()))
            program = tuple((type(callback), getattr(callback, "form", None)) for callback in callbacks)
            widths = len(callbacks) == 1 and isinstance(callbacks[0], StructuredPruning | LowRankFactorization)
            yield pytest.param(case, id=case.name, marks=[pytest.mark.slow] if widths and program in seen else [])
            seen.add(program)


@pytest.mark.filterwarnings("ignore:.*layers that stay float")  # what no kernel computes is listed
@pytest.mark.parametrize("case", list(rows()))
def test_the_exported_file_agrees(case, tmp_path) -> None:
    with unless_refused(case, "export"):
        callbacks = case.build(tmp_path)
        export = next((callback for callback in callbacks if isinstance(callback, MobileExport)), None)
        if export is None:
            export = MobileExport(tmp_path / "export.ptl", latency_runs=2)
            callbacks.append(export)
        module = module_of(case)
        trainer(*callbacks).fit(module)
        assert export.report is not None
        assert export.report.parity.max_absolute <= case.tolerance
        answer = TorchScriptLite().load(export.path)
        module.eval()
        for images, _ in module.val_dataloader().batches:
            with torch.no_grad():
                torch.testing.assert_close(answer(images), module(images), rtol=0.0, atol=case.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [ONNX(), ExecuTorch()], ids=str)
@pytest.mark.parametrize("name", ["quantization_int8", "quantization_after_pruning"])
def test_the_exported_int8_file_agrees(name, exporter, tmp_path) -> None:
    (case,) = [case for case in CASES if case.name == name]
    export = MobileExport(tmp_path / f"export{exporter.suffix}", exporter=exporter, latency_runs=2)
    trainer(*case.build(tmp_path), export).fit(module_of(case))
    assert export.report is not None
    assert export.report.details["int8_layers"] > 0
    assert max(export.report.parity.quant_steps.values()) <= 3
    assert export.report.evaluation is not None
    assert export.report.evaluation.top1_agreement is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*layers that stay float")  # those of four bits
@pytest.mark.parametrize("bits", [4, 8])
def test_a_chain_is_exported_from_its_checkpoint_as_at_its_end(bits, tmp_path) -> None:
    """What is rebuilt without a Trainer gives files, for every runtime, that answer to the last bit as the run's do."""
    (case,) = [case for case in CASES if case.name == "quantization_chain"]
    callbacks = case.build(tmp_path)
    callbacks[-1].recipe = MixedPrecision(default=LSQ(bits, bits), first=Int8(), last=Int8())
    exporters = [TorchScriptLite(), ONNX(), ExecuTorch()]
    exports = [MobileExport(tmp_path / f"run{one.suffix}", exporter=one, latency_runs=2) for one in exporters]
    module, run = module_of(case), trainer(*callbacks, *exports)
    run.fit(module)
    assert_learns_beside(module, run.optimizers[0])

    run.save_checkpoint(tmp_path / "chain.ckpt")
    loaded = load_from_checkpoint(type(module), tmp_path / "chain.ckpt", weights_only=True).eval()
    images = module.val_dataloader().batches[0][0]
    with fake_quantized(loaded):
        for export, exporter in zip(exports, exporters, strict=True):
            path = tmp_path / f"loaded{exporter.suffix}"
            report = export_model(loaded, (images,), path, exporter=exporter, latency_runs=2)
            assert report.details["left_float"] == export.report.details["left_float"]
            assert report.details["int8_layers"] == export.report.details["int8_layers"] > 0
            files = [load_exported(one, exporter=exporter)(images) for one in (export.path, path)]
            assert torch.equal(*files)


def assert_learns_beside(module, optimizer) -> None:
    """What is no part of the module, step sizes and a projector, has its own state in the optimizer."""
    mine = {id(parameter) for parameter in module.parameters()}
    beside = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in mine]
    state = state_of(module).state
    learned = [*state["quantization_aware_training"]["learned"].values()]
    projectors = [kept["weight"] for kept in state["distillation"]["projectors"].values()]
    assert sorted(p.numel() for p in beside) == sorted(tensor.numel() for tensor in [*learned, *projectors])
    assert all(optimizer.state[parameter]["exp_avg"].abs().sum() > 0 for parameter in beside)
