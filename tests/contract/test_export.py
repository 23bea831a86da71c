"""What a method has made of a network can be exported, and the file answers as the network does."""

import pytest
import torch

from lightning_light.export import ONNX, ExecuTorch, MobileExport
from lightning_light.export.torchscript_lite import TorchScriptLite
from tests.contract.runs import module_of, trainer, unless_refused
from tests.contract.table import CASES


@pytest.mark.filterwarnings("ignore:.*layers that stay float")  # what no kernel computes is listed
@pytest.mark.parametrize("case", CASES, ids=str)
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
    assert max(export.report.parity.steps.values()) <= 3
    assert export.report.top1 is not None
