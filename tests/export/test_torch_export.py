"""Files that are built on `torch.export`, run by ONNX Runtime and by ExecuTorch.

They need the extras `onnx` and `executorch`: without them each test fails with the message of the missing extra.
"""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_light.budgets import MACs
from lightning_light.errors import ParityError, TraceError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, Exporter, ExportReport, MobileExport, export_model
from lightning_light.export.extras import check_pair
from lightning_light.export.inputs import first_sample, tripled
from lightning_light.export.program import flat_tensors
from lightning_light.quantization import Int8, fake_quantized, quantize
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.export.nets import HOSTS, MODULES, Images, Records, batches, fit
from tests.export.snapshots import snapshot
from tests.export.test_functional import Branch, Many, trained
from tests.zoo import ZOO, noise, tokens

QUICK: dict[str, Any] = {"latency_runs": 2}
BOTH = [ONNX(), ExecuTorch()]
FAST = {"plain", "dict_inputs"}


def zoo(*left_out: str) -> list[Any]:
    names = sorted(ZOO.keys() - {"control_flow", *left_out})
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


def check_file(name: str, exporter: Exporter, folder: Path, batch: Any = "any") -> None:
    """Export a net of the zoo; compare outputs for one, two and six samples."""
    net = trained(ZOO[name]())
    given, path, before = ExampleInput(*net.example), folder / f"net{exporter.suffix}", snapshot(net)
    report = export_model(net, given, path, exporter=exporter, batch=batch, **QUICK)
    assert snapshot(net) == before
    assert ExportReport.read(f"{path}.json") == report
    run = exporter.load(path)
    for call in [first_sample(given)] if batch == "one" else [first_sample(given), given, tripled(given)]:
        with torch.no_grad():
            expected = flat_tensors(net.eval()(*call.args, **call.kwargs))
        for right, found in zip(expected, run(*call.args), strict=True):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", zoo())
def test_outputs_of_an_onnx_file_equal_the_models_at_every_batch_size(name: str, tmp_path: Path) -> None:
    check_file(name, ONNX(), tmp_path)


@pytest.mark.parametrize("name", zoo("dict_inputs"))
def test_outputs_of_an_executorch_file_equal_the_models_at_every_batch_size(name: str, tmp_path: Path) -> None:
    check_file(name, ExecuTorch(), tmp_path)


class Parts(nn.Module):
    """Convolutions beside each way to split a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)
        self.gru, self.lstm = nn.GRUCell(4, 6), nn.LSTMCell(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.conv(x).chunk(3, 1)
        d, e = torch.cat([b, a, c], 1).split([5, 7], 1)
        f, g, h = torch.cat([e, d], 1).split(5, dim=1)
        i, j = torch.cat([h, f, g], 1).tensor_split(2, -1)
        y = self.head(torch.stack((i + j).unbind(-1)).mean((0, 3)))
        return torch.cat([self.gru(y), *self.lstm(y)], 1)


@pytest.mark.parametrize("quantized", [False, True])
def test_split_tensors_have_memory_for_every_batch_size(quantized: bool, tmp_path: Path) -> None:
    net, images = trained(Parts()).eval(), noise(8, 3, 8, 8)
    if quantized:
        quantize(net, (images,), Int8("xnnpack"), data=[images], progress_bar=False)
    with torch.no_grad(), fake_quantized(net) if quantized else nullcontext():
        report = export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(), batch="any", **QUICK)
        right = net(images)
    assert not any("split" in operator for operator in report.details["portable_operators"])
    run = ExecuTorch().load(tmp_path / "net.pte")
    for size in (1, 3, 8):
        torch.testing.assert_close(run(images[:size])[0], right[:size], atol=0.05 if quantized else 1e-5, rtol=1e-4)


def test_a_batch_that_executorch_does_not_plan_for_is_refused(tmp_path: Path) -> None:
    net, images = nn.Conv2d(3, 4, 3).eval(), noise(2, 3, 8, 8)
    with pytest.raises(UnsupportedError, match=r"batches of 16, found .* for 15 .*`ExecuTorch\(max_batch=15\)`"):
        export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(max_batch=16), **QUICK)
    assert not list(tmp_path.iterdir())
    export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(max_batch=15), **QUICK)
    assert ExecuTorch().load(tmp_path / "net.pte")(noise(15, 3, 8, 8))[0].shape[0] == 15


@pytest.mark.slow
def test_executorch_without_xnnpack(tmp_path: Path) -> None:
    check_file("plain", ExecuTorch(partitioner=None), tmp_path)


@pytest.mark.parametrize("exporter", BOTH, ids=str)
def test_control_flow_is_refused_with_an_alternative(exporter: Exporter, tmp_path: Path) -> None:
    net = ZOO["control_flow"]()
    with pytest.raises(TraceError, match=r"on `ControlFlow`: .*a branch, a loop or a size that does.*TorchScriptLite"):
        export_model(net, (noise(2, 3, 8, 8),), tmp_path / f"m{exporter.suffix}", exporter=exporter, **QUICK)
    with pytest.raises(TraceError, match=r"`torch\.where`"):
        export_model(Branch(), (noise(2, 3),), tmp_path / f"m{exporter.suffix}", exporter=exporter, **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", BOTH, ids=str)
def test_keywords_flags_and_dicts_become_inputs_with_names(exporter: Exporter, tmp_path: Path) -> None:
    x, scale, extra = noise(2, 3), torch.tensor(2.0), {"b": noise(2, 1), "a": noise(2, 3)}
    kwargs = {"flip": True, "extra": extra, "scale": scale}
    path = tmp_path / f"m{exporter.suffix}"
    report = export_model(Many(), ExampleInput((x,), kwargs), path, exporter=exporter, **QUICK)
    assert [value["name"] for value in report.inputs] == ["x", "scale", "extra['a']", "extra['b']"]
    assert report.details["inputs"] == ["x", "scale", "extra_a", "extra_b"]
    assert report.details["outputs"] == ["output_0", "output_1_0", "output_1_1"]
    assert report.built_in == {"flip": "True"}
    first, second, third = exporter.load(path)(x, scale, extra)
    torch.testing.assert_close([first, second, third], [x.flip(1) * 2, x.flip(1) + extra["a"], extra["b"]])


class BuiltIn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(int(x.shape[0]) * 3) if int(x.shape[0]) < 3 else x


@pytest.mark.parametrize("exporter", BOTH, ids=str)
def test_a_constant_batch_size_is_refused(exporter: Exporter, tmp_path: Path) -> None:
    with pytest.raises((TraceError, ParityError), match="batch='one'"):
        export_model(BuiltIn(), (noise(4, 3),), tmp_path / f"m{exporter.suffix}", exporter=exporter, **QUICK)
    assert list(tmp_path.iterdir()) == []


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_randomness_is_found_by_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("older")
    with pytest.raises(ParityError, match="random numbers in `forward`"):
        export_model(Noisy(), (noise(2, 3),), tmp_path / "m.onnx", exporter=ONNX(), **QUICK)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("exporter", BOTH, ids=str)
def test_forward_may_write_into_its_input(exporter: Exporter, tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_().mul_(2)

    x = noise(2, 3)
    report = export_model(InPlace(), (x,), tmp_path / f"m{exporter.suffix}", exporter=exporter, **QUICK)
    assert report.parity.max_absolute == 0.0
    assert torch.equal(x, noise(2, 3))


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, "text"

    with pytest.raises(TraceError, match=r"tensors or None, in tuples.*found str\. Return tensors"):
        export_model(Outputs(), (noise(2, 3),), tmp_path / "m.onnx", exporter=ONNX(), **QUICK)


def test_an_operation_that_executorch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(3)).eval()
    with pytest.raises(TraceError, match=r"found SpecViolationError: .*adaptive_max_pool2d"):
        export_model(net, (noise(2, 3, 8, 8),), tmp_path / "net.pte", exporter=ExecuTorch(), latency_runs=1)


def test_half_precision_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"found torch.bfloat16. Export `model.float\(\)`"):
        export_model(nn.Linear(3, 2).bfloat16(), (noise(2, 3).bfloat16(),), tmp_path / "m.onnx", exporter=ONNX())


def test_sequences_of_another_length_fail_the_comparison(tmp_path: Path) -> None:
    """Only the batch is open."""
    longer = [ExampleInput((tokens(3, 9, below=11),))]
    with pytest.raises(ParityError, match="expected it to run as the model does"):
        export_model(
            ZOO["tied_embedding"](), (tokens(2, 6, below=11),), tmp_path / "m.onnx", data=longer, exporter=ONNX()
        )


def test_the_dynamic_dimension_is_named_batch(tmp_path: Path) -> None:
    import onnxruntime

    export_model(ZOO["plain"](), (noise(2, 3, 8, 8),), tmp_path / "m.onnx", exporter=ONNX(), **QUICK)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("x", ["batch", 3, 8, 8])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("output", ["batch", 5])]


@pytest.mark.parametrize(("host", "exporter"), list(zip(HOSTS, BOTH, strict=True)), ids=["onnx", "executorch"])
def test_pruned_network_at_the_end_of_a_fit(host: ModuleType, exporter: Exporter, tmp_path: Path) -> None:
    path = tmp_path / f"model{exporter.suffix}"
    module = MODULES[host](Images())
    export = MobileExport(path, exporter=exporter, latency_runs=2)
    fit(module, StructuredPruning(MACs(0.5), schedule=OneShot(at=0.4)), export, host=host, max_epochs=2)
    assert module.net.conv.out_channels < 8
    assert export.report is not None
    assert export.report.parity_batches == 4
    run = exporter.load(path)
    for batch in batches(sign=0.5):
        with torch.no_grad():
            expected = module.eval()(batch["image"])
        torch.testing.assert_close(run(batch["image"])[0], expected, atol=1e-4, rtol=1e-4)


def test_dict_inputs_may_have_any_order_of_keys(tmp_path: Path) -> None:
    export = MobileExport(tmp_path / "model.onnx", exporter=ONNX(), latency_runs=2)
    fit(MODULES[HOSTS[0]](Records()), export)
    assert export.report is not None
    assert export.report.details["outputs"] == ["features", "logits"]
    assert export.report.parity.max_absolute < 1e-5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ONNX(opset=3), r"`ONNX\(opset=3\)`: expected .* <= opset <= "),
        (lambda: MobileExport("m.onnx", exporter=ONNX(dynamic_batch=False)), "Write `batch='one'`"),
        (lambda: MobileExport("m.pte", exporter=ONNX()), "Write 'm.onnx'"),
    ],
)
def test_wrong_arguments(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_fixed_batch(tmp_path: Path) -> None:
    net = ZOO["plain"]()
    exporter = ONNX(dynamic_batch=False)
    report = export_model(net, net.example[0], tmp_path / "m.onnx", exporter=exporter, batch="one", **QUICK)
    assert report.parity.batches == 4  # two samples, and two altered
    with pytest.raises(RuntimeError, match="Got: 2 Expected: 1"):
        exporter.load(tmp_path / "m.onnx")(noise(2, 3, 8, 8))


def test_a_release_for_another_torch_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"found 1.5.1 with 2.13.0. Install `executorch==1.4.\*`"):
        check_pair("ExecuTorch()", "executorch", "1.5.1", "2.13.0", [("1.4", "2.13"), ("1.5", "2.15")])


HIDDEN = """
import sys

packages = ["onnxruntime", "executorch", "torchao"]
sys.modules.update(dict.fromkeys(packages))  # as if they were not installed: import and find_spec both say so
import lightning_light as ll
from lightning_light.errors import UnsupportedError
from tests.export.nets import Images, Lit, fit

for package in packages:
    for name in packages:
        del sys.modules[name]
    sys.modules.update({package: None})
    exporter = ll.ONNX() if package == "onnxruntime" else ll.ExecuTorch()
    module = Lit(Images())
    try:
        fit(module, ll.MobileExport("never" + exporter.suffix, exporter=exporter))
    except UnsupportedError as error:
        print(package, error, module.global_step)
    sys.modules.update(dict.fromkeys(packages))
"""


def test_a_missing_extra_is_named_before_training() -> None:
    """In another process, to which the packages are hidden; the package itself imports without them."""
    found = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True).stdout
    for package, extra in (("onnxruntime", "onnx"), ("executorch", "executorch"), ("torchao", "executorch")):
        assert re.search(rf"^{package} .*`pip install lightning-light\[{extra}\]`. 0$", found, re.MULTILINE), found


@pytest.mark.filterwarnings("ignore:(?s).*skip_none", "ignore:(?s).*JSONARGPARSE_DEPRECATION")  # works in old and new
@pytest.mark.parametrize("exporter", [ONNX(opset=20), ExecuTorch(partitioner=None, max_batch=2)], ids=str)
def test_round_trip_through_yaml(exporter: Exporter) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--exporter", type=Exporter)
    name = f"lightning_light.export.{type(exporter).__name__}"
    known = parser.parse_object({"exporter": {"class_path": name, "init_args": vars(exporter)}})
    again = parser.parse_string(parser.dump(known, skip_none=False))
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert make(again).exporter == exporter
    assert eval(repr(exporter)) == exporter
