"""The exported file, run by the real lite interpreter."""

import threading
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.errors import LightningLightError, ParityError, TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export import ExportReport, Tolerance, TorchScriptLite, export_model
from lightning_light.export.inputs import Positional, first_sample
from lightning_light.export.torchscript_lite import quiet_deprecations
from tests.export.snapshots import snapshot
from tests.zoo import ZOO, noise, tokens

QUICK: dict[str, Any] = {"latency_runs": 2}


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and affine weights that are worth folding."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2.0, generator=generator)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(generator=generator)
    return model


def run(path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Run the file with the inputs of a call of the model."""
    call = ExampleInput(args, kwargs)
    return tree_leaves(TorchScriptLite().load(path)(*Positional(model, call).tensors(call)))


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"control_flow"}))
def test_outputs_of_the_file_equal_the_models_at_every_batch_size(name: str, tmp_path: Path) -> None:
    net = trained(ZOO[name]())
    args, kwargs = net.example  # type: ignore[attr-defined]
    path = tmp_path / "model.ptl"
    before = snapshot(net)
    report = export_model(net, ExampleInput(args, kwargs), path, **QUICK)
    assert snapshot(net) == before
    net.eval()
    for call in (ExampleInput(args, kwargs), first_sample(ExampleInput(args, kwargs))):
        with torch.no_grad():
            expected = tree_leaves(net(*call.args, **call.kwargs))
        for right, found in zip(expected, run(path, net, *call.args, **call.kwargs), strict=True):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert report.bytes == path.stat().st_size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.ptl", "model.ptl.json"]
    assert ExportReport.read(f"{path}.json") == report


class Normed(nn.Module):
    """Each way in which a batch norm may stand beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.drop, self.linear, self.bn3 = nn.Dropout(), nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.depthwise(self.bn1(self.conv(x)).relu())).relu()
        return self.bn3(self.linear(self.drop(x.mean((2, 3)))))


class Unfoldable(Normed):
    """Two more, that no layer before them can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.up, self.bn4 = nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.bn4(self.up(self.first(x))))


@pytest.mark.parametrize(("kind", "left"), [(Normed, 0), (Unfoldable, 2)])
def test_batch_norms_are_folded_and_dropout_is_gone(kind: type[nn.Module], left: int, tmp_path: Path) -> None:
    report = export_model(trained(kind()), (noise(2, 3, 8, 8),), tmp_path / "model.ptl", **QUICK)
    assert report.details["batch_norms_left"] == left
    module = torch.jit.mobile._load_for_lite_interpreter(str(tmp_path / "model.ptl"))
    operators = torch.jit.mobile._export_operator_list(module)
    assert "aten::dropout" not in operators
    assert ("aten::batch_norm" in operators) == bool(left)


def test_a_file_contains_neither_its_name_nor_paths_of_the_machine(tmp_path: Path) -> None:
    """Records of a file would have both."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.scripted = ZOO["plain"](), torch.jit.script(Scripted())

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.scripted(x))

    with quiet_deprecations():
        export_model(Both(), (noise(2, 3, 8, 8),), tmp_path / "a_long_name.ptl", **QUICK)
    with zipfile.ZipFile(tmp_path / "a_long_name.ptl") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {name.split("/")[0] for name in contents} == {"archive"}
    assert [name for name, content in contents.items() if b".py" in content or b"def forward(self, x" in content] == []


class Scripted(nn.Module):
    """With a branch, which is a block of its own in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x + 1
        return x - 1


def test_report_has_the_measured_values(tmp_path: Path) -> None:
    model = trained(Normed())
    batches = [ExampleInput((noise(5, 3, 8, 8),)), ExampleInput((noise(3, 3, 8, 8),))]
    report = export_model(
        model, (noise(2, 3, 8, 8),), tmp_path / "a" / "m.ptl", data=batches, latency_runs=7, latency_threads=1
    )
    assert report.params == sum(parameter.numel() for parameter in model.parameters())
    assert report.macs == 8 * 27 * 36 + 8 * 9 * 16 + 48
    assert (report.latency.runs, report.latency.threads) == (7, 1)
    assert (report.parity.samples, report.parity.batches, report.parity_batches) == (11, 4, 2)  # one sample, too
    assert 0.0 < report.parity.max_absolute < 1e-5
    assert report.inputs == [{"name": "x", "shape": [1, 3, 8, 8], "dtype": "float32"}]
    assert report.deflated_bytes < report.bytes
    assert report.runtime.endswith(torch.__version__)
    assert report.exporter == "TorchScriptLite(engine=None)"


class Many(nn.Module):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor, extra: dict[str, Tensor], flip: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x = x.flip(1) if flip else x
        x = x if mask is None else x * mask
        return x * scale, [x + extra["a"], extra["b"]]


def test_keywords_flags_and_dicts_become_positions(tmp_path: Path) -> None:
    x, scale, extra = noise(2, 3), torch.tensor(2.0), {"a": noise(2, 3), "b": noise(2, 1)}
    kwargs = {"flip": True, "extra": extra, "scale": scale}
    report = export_model(Many(), ExampleInput((x,), kwargs), tmp_path / "m.ptl", **QUICK)
    assert [value["name"] for value in report.inputs] == ["x", "scale", "extra['a']", "extra['b']"]
    assert report.built_in == {"flip": "True"}
    first, (second, third) = TorchScriptLite().load(tmp_path / "m.ptl")(x, scale, extra)
    assert torch.equal(first, x.flip(1) * 2)
    assert torch.equal(second, x.flip(1) + extra["a"])
    assert torch.equal(third, extra["b"])


def test_a_batch_that_does_not_fit_the_file_is_a_failure(tmp_path: Path) -> None:
    x, kwargs = noise(2, 3), {"scale": torch.tensor(2.0), "extra": {"a": noise(2, 3), "b": noise(2, 1)}}
    fits = [
        ExampleInput((noise(2, 3),), {**kwargs, "flip": False}),  # its default
        ExampleInput((), {"x": noise(4, 3), **kwargs, "extra": {"b": noise(4, 1), "a": noise(4, 3)}}),
    ]
    example = ExampleInput((x,), kwargs)
    assert export_model(Many(), example, tmp_path / "m.ptl", data=fits, **QUICK).parity_batches == 2
    for batch, found in (
        (
            ExampleInput((x, noise(2, 3)), kwargs),
            r"outside.*constants of the file: mask \(not in the file",
        ),
        (ExampleInput((x,), {**kwargs, "flip": True}), r"constants of the file: flip=True \(in the file False\)"),
        (ExampleInput((x,), {**kwargs, "extra": {"a": x}}), "found one without extra as exported"),
    ):
        with pytest.raises(ParityError, match=found):
            export_model(Many(), example, tmp_path / "m.ptl", data=[batch], **QUICK)


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    "output",
    [
        lambda x: {"b": x, "a": x + 1},
        lambda x: OrderedDict(b=x, a=x + 1),
        lambda x: Pair(x, x + 1),
        lambda x: (x, [x + 1], (x + 2, (x,))),
        lambda x: (x, x.argmax(1), x > 0),
    ],
    ids=["dict", "ordered dict", "named tuple", "nested", "integers and booleans"],
)
def test_outputs_of_many_kinds(output: Callable[[Tensor], Any], tmp_path: Path) -> None:
    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output(x)

    x = noise(2, 3)
    export_model(Outputs(), (x,), tmp_path / "m.ptl", **QUICK)
    found = TorchScriptLite().load(tmp_path / "m.ptl")(x)
    expected = output(x)
    if isinstance(expected, dict):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    else:
        assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


def test_outputs_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, 3

    with pytest.raises(TraceError, match=r"`Outputs`: expected outputs that are tensors or None.*found int"):
        export_model(Outputs(), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_example_that_does_not_fit_the_signature(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"Many.forward\(x.*expected an example that it can be called with"):
        export_model(Many(), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)


def test_forward_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"`Linear.forward` with input: expected it to run.*mat1 and mat2"):
        export_model(nn.Linear(4, 2), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)


class BuiltIn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(int(x.shape[0]) * 3)


def test_a_constant_batch_size_is_found(tmp_path: Path) -> None:
    x = noise(4, 3)
    with (
        pytest.warns(UserWarning, match=r"taken from tensors at .*test_functional\.py:\d+"),
        pytest.raises(ParityError, match=r"run on 4 samples.*batch='one'"),
    ):
        export_model(BuiltIn(), (x,), tmp_path / "m.ptl", **QUICK)
    with pytest.warns(UserWarning, match="taken from tensors"), pytest.raises(ParityError, match="3 samples"):
        export_model(BuiltIn(), (x[:1],), tmp_path / "m.ptl", **QUICK)  # found without any larger batch
    with pytest.warns(UserWarning, match="taken from tensors"):
        report = export_model(BuiltIn(), (x,), tmp_path / "m.ptl", batch="one", **QUICK)
    assert (report.parity.samples, report.inputs[0]["shape"]) == (8, [1, 3])
    with pytest.warns(UserWarning, match="taken from tensors"):
        report = export_model(BuiltIn(), (x,), tmp_path / "m.ptl", batch="as_given", **QUICK)
    assert (report.parity.batches, report.inputs[0]["shape"]) == (2, [4, 3])
    data = [ExampleInput((noise(9, 3),))]
    with (
        pytest.warns(UserWarning, match="taken from tensors"),
        pytest.raises(ParityError, match=r"run on 9 samples.*example's shapes .`drop_last=True`"),
    ):
        export_model(BuiltIn(), (x,), tmp_path / "m.ptl", batch="as_given", data=data, **QUICK)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_branch_that_real_batches_take_differently_is_found(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    (tmp_path / "m.ptl").write_text("older")
    with (
        pytest.warns(UserWarning, match="taken from tensors"),
        pytest.raises(
            ParityError,
            match=r"12 of 12 elements of output outside the tolerance in batch 1; the worst is -1 in the file, 1 in",
        ),
    ):
        export_model(Branch(), (x,), tmp_path / "m.ptl", data=[ExampleInput((-torch.ones(4, 3),))], **QUICK)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_randomness_in_forward_is_found(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ParityError, match="random numbers in `forward`"):
        export_model(Noisy(), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_may_write_into_its_input(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_().mul_(2)

    with torch.inference_mode():
        x = noise(2, 3).clone()
    report = export_model(InPlace(), (x,), tmp_path / "m.ptl", **QUICK)
    assert report.parity.max_absolute == 0.0
    assert torch.equal(x, noise(2, 3))


def test_runs_inside_inference_mode_and_autocast(tmp_path: Path) -> None:
    model = trained(Normed())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        report = export_model(model, (noise(2, 3, 8, 8),), tmp_path / "m.ptl", **QUICK)
    assert report.parity.max_absolute < 1e-5
    assert run(tmp_path / "m.ptl", model, noise(2, 3, 8, 8))[0].dtype == torch.float32


def test_half_precision_weights(tmp_path: Path) -> None:
    model = trained(Normed()).bfloat16()
    loose = Tolerance(absolute=0.1, relative=0.1)
    report = export_model(model, (noise(2, 3, 8, 8).bfloat16(),), tmp_path / "m.ptl", parity=loose, **QUICK)
    assert report.inputs[0]["dtype"] == "bfloat16"


def test_scripted_and_compiled_parts(tmp_path: Path) -> None:
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.ReLU(), nn.Linear(4, 2))
    model[2].compile(backend="eager")
    model(noise(2, 4))
    report = export_model(model, (noise(2, 4),), tmp_path / "m.ptl", **QUICK)
    assert report.params == 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    report = export_model(nn.Sequential(nn.Linear(4, 4), scripted), (noise(2, 4),), tmp_path / "s.ptl", **QUICK)
    assert report.parity.max_absolute < 1e-6


def test_models_that_hold_what_cannot_be_copied(tmp_path: Path) -> None:
    class Holds(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.lock, self.generator = threading.Lock(), torch.Generator()
            self.loss = self.weight.sum()
            self.losses = [self.loss * 2]

    report = export_model(Holds(), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)
    assert report.params == 8


def test_hooks_that_change_the_output_are_in_the_file(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, args, output: output * 2)
    export_model(model, (noise(2, 3),), tmp_path / "m.ptl", **QUICK)
    torch.testing.assert_close(run(tmp_path / "m.ptl", model, noise(2, 3))[0], model(noise(2, 3)))


def test_tokens_and_sequences(tmp_path: Path) -> None:
    """The length of a sequence is dynamic in TorchScript."""
    net = ZOO["lstm"]()
    longer = [ExampleInput((tokens(3, 9, below=11),))]
    report = export_model(net, (tokens(2, 6, below=11),), tmp_path / "m.ptl", data=longer, **QUICK)
    assert report.parity_batches == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"path": "model.pt"},
            r"`'model.pt'`: expected a path that ends in one of '.ptl' .* '.pte' .* '.onnx' .*, found '.pt'",
        ),
        ({"batch": "two"}, r"`export_model\(batch='two'\)`: expected one of 'any', 'one', 'as_given', found 'two'"),
        ({"latency_runs": 0}, r"`export_model\(latency_runs=0\)`: expected an integer >= 1, found 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        export_model(nn.Linear(3, 2), (noise(2, 3),), **{"path": "model.ptl", **options})


def test_tolerance_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"`Tolerance\(absolute=-1\)`: expected a number >= 0"):
        Tolerance(absolute=-1)


def test_a_torch_without_the_lite_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(torch.jit.RecursiveScriptModule, "_save_for_lite_interpreter")
    with pytest.raises(LightningLightError, match=r"found one that has dropped it. Install `torch<2.16`.*ExecuTorch"):
        export_model(nn.Linear(3, 2), (noise(2, 3),), tmp_path / "m.ptl", **QUICK)


def test_only_deprecation_warnings_of_torchscript_are_silenced() -> None:
    with quiet_deprecations(), pytest.raises(DeprecationWarning, match="another"):
        warnings.warn("another matter", DeprecationWarning, stacklevel=1)
    with quiet_deprecations():
        warnings.warn("`torch.jit.trace` is deprecated. Please switch", DeprecationWarning, stacklevel=1)
