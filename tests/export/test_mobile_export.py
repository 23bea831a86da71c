"""A Trainer of each host exports files whose outputs equal those of the live module."""

import json
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.errors import LightningLightError, OrderError, ParityError, UnsupportedError
from lightning_light.export import ExportReport, MobileExport, Tolerance, TorchScriptLite
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.checkpoint import load_from_checkpoint
from tests.export.nets import HOSTS, MODULES, NETS, Images, Lit, Sentences, batches, fit
from tests.export.snapshots import snapshot
from tests.surgery import runs
from tests.zoo import Plain, noise


def export_to(path: Path, **options: Any) -> MobileExport:
    return MobileExport(path, **{"latency_runs": 2, **options})


def outputs_of(path: Path, *tensors: Any) -> list[Tensor]:
    return tree_leaves(TorchScriptLite().load(path)(*tensors))


def of_live(module: nn.Module, batch: dict[str, Tensor]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Inputs of the file for a batch, and outputs of the live module."""
    net = type(module.net).__name__
    record = {"numbers": batch["numbers"], "image": batch["image"]}
    args = {"Images": (batch["image"],), "Words": (batch["words"],), "Records": (record,)}.get(net, (batch["words"],))
    kwargs = {"mask": batch["mask"], "pooled": True} if net == "Sentences" else {}
    with torch.no_grad():
        outputs = module.eval()(*args, **kwargs)
    return (*args, *(value for value in kwargs.values() if isinstance(value, Tensor))), tree_leaves(outputs)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("net", NETS)
def test_outputs_of_the_file_equal_the_live_modules(host: ModuleType, net: type[nn.Module], tmp_path: Path) -> None:
    module, export = MODULES[host](net()), export_to(tmp_path / "model.ptl")
    fit(module, export, host=host, max_epochs=2)
    assert export.report is not None
    assert export.report.parity_batches == 4
    assert export.report == ExportReport.read(tmp_path / "model.ptl.json")
    for batch in batches(sign=0.5):
        tensors, expected = of_live(module, batch)
        found = outputs_of(tmp_path / "model.ptl", *tensors)
        assert len(found) == len(expected)
        for right, output in zip(expected, found, strict=True):
            torch.testing.assert_close(output, right, atol=1e-4, rtol=1e-4)


def test_report_is_plain_json(tmp_path: Path) -> None:
    fit(Lit(Sentences()), export_to(tmp_path / "model.ptl"))
    found = json.loads((tmp_path / "model.ptl.json").read_text())
    assert found["inputs"] == [
        {"name": "argument 0", "shape": [1, 6], "dtype": "int64"},
        {"name": "mask", "shape": [1, 6], "dtype": "bool"},
    ]
    assert found["built_in"] == {"pooled": "True"}
    assert found["details"]["torch"] == torch.__version__


class Watch(lightning.pytorch.Callback):
    """Takes a snapshot of the module before and after the export; one of its layers is in another mode."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.train().net.bn0.eval()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(snapshot(pl_module))


def test_the_live_module_is_not_changed(tmp_path: Path) -> None:
    seen: list[Any] = []
    module = Lit(Images())
    module.net.stem.weight.requires_grad_(False)
    fit(module, Watch(seen), export_to(tmp_path / "model.ptl"), Watch(seen))
    assert seen[0] == seen[1]
    assert (module.net.bn0.training, module.net.bn1.training) == (False, True)


def test_training_is_the_same_with_and_without_the_callback(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [export_to(tmp_path / "model.ptl")]):
        torch.manual_seed(0)
        module = Lit(Images())
        fit(module, *callbacks, max_epochs=2)
        ends.append((module.state_dict(), torch.get_rng_state()))
        assert not any(sub._forward_pre_hooks for sub in module.modules())
    assert runs.same(*[end[0] for end in ends])
    assert torch.equal(ends[0][1], ends[1][1])


def test_without_validation_the_example_is_compared(tmp_path: Path) -> None:
    export = export_to(tmp_path / "model.ptl")
    fit(Lit(Images()), export, limit_val_batches=0)
    assert export.report is not None
    assert (export.report.parity_batches, export.report.parity.samples) == (0, 5)  # two, two altered, and one alone


@pytest.mark.parametrize("given", [True, False])
def test_steps_that_do_not_call_self_are_exported_by_an_example(given: bool, tmp_path: Path) -> None:
    module, export = Lit(Images(), automatic=False), export_to(tmp_path / "model.ptl")
    if given:
        module.example_input_array = noise(1, 3, 8, 8)
    fit(module, export)
    assert export.report is not None
    # the given sample or the two of the batch, one altered each, and others
    assert (export.report.parity_batches, export.report.parity.samples) == (0, 5)


def test_a_failed_export_saves_the_network(tmp_path: Path) -> None:
    module = Lit(Images())
    export = export_to(tmp_path / "model.ptl", parity=Tolerance(absolute=0.0, relative=0.0))
    with pytest.raises(ParityError, match=r"`parity=Tolerance.*The trained network is saved in '.*ptl.ckpt'"):
        fit(module, export)
    assert [file.name for file in tmp_path.iterdir()] == ["model.ptl.ckpt"]
    saved = torch.load(tmp_path / "model.ptl.ckpt", weights_only=False)
    assert runs.same(saved["state_dict"], module.state_dict())
    assert not any(sub._forward_pre_hooks for sub in module.modules())
    assert export.report is None
    again = export_to(tmp_path / "model.ptl")  # the run goes on from it
    fit(Lit(Images()), again, max_epochs=2)
    assert (tmp_path / "model.ptl").exists()


def test_a_failed_export_names_the_other_exports(tmp_path: Path) -> None:
    first, last = export_to(tmp_path / "first.ptl"), export_to(tmp_path / "last.ptl")
    fails = export_to(tmp_path / "fails.ptl", parity=Tolerance(absolute=0.0, relative=0.0))
    with pytest.raises(ParityError, match=r"Written before: '.*first.ptl'\. Not exported after it: '.*last.ptl'\."):
        fit(Lit(Images()), first, fails, last)
    assert (tmp_path / "first.ptl").exists()
    assert not (tmp_path / "last.ptl").exists()


def test_other_exceptions_are_reported_as_well(tmp_path: Path) -> None:
    (tmp_path / "model.ptl").mkdir()
    with pytest.raises(
        LightningLightError, match=r"failed after training: .*Is a directory.*The trained network is saved"
    ) as error:
        fit(Lit(Images()), export_to(tmp_path / "model.ptl"))
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_best_checkpoint_is_rebuilt_with_its_structure(host: ModuleType, tmp_path: Path) -> None:
    """Kept at the first epoch, cut after it: the best network is the wide one, the live one is narrow."""
    for place, (cut_at, width) in enumerate([(1, 4), (6, 4)]):
        best = host.callbacks.ModelCheckpoint(tmp_path / str(place), monitor="epoch", mode="min")
        module, export = runs.MODULES[host](), export_to(tmp_path / f"{place}.ptl", checkpoint="best")
        runs.trainer(runs.Events(cuts=(cut_at,)), best, export, host=host).fit(module, runs.Loader())
        assert module.net.conv1.out_channels == width
        restored = load_from_checkpoint(type(module), best.best_model_path).eval()
        x = noise(3, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(outputs_of(tmp_path / f"{place}.ptl", x)[0], restored(x), atol=1e-4, rtol=1e-4)
        assert export.report is not None
        assert export.report.params == sum(parameter.numel() for parameter in restored.parameters())


def test_best_checkpoint_of_an_earlier_structure(tmp_path: Path) -> None:
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="first")
    module = runs.Lit()
    runs.trainer(keep, max_epochs=1).fit(module, runs.Loader())
    wide = Path(keep.best_model_path)

    class PointsCheckpoint(lightning.pytorch.callbacks.ModelCheckpoint):
        """Names the checkpoint from before the cut as the best one."""

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.best_model_path = str(wide)

    module, export = runs.Lit(), export_to(tmp_path / "model.ptl", checkpoint="best")
    runs.trainer(runs.Events(cuts=(1,)), PointsCheckpoint(tmp_path / "later"), export, max_epochs=1).fit(
        module, runs.Loader()
    )
    assert export.report is not None
    assert module.net.conv1.out_channels == 4
    assert len(state_of(module).edit_log) == 1  # the copy went back, the live module did not
    assert export.report.params == sum(parameter.numel() for parameter in Plain().parameters())
    with torch.no_grad():
        expected = runs.Lit.load_from_checkpoint(wide).eval()(noise(3, 3, 8, 8))
    torch.testing.assert_close(outputs_of(tmp_path / "model.ptl", noise(3, 3, 8, 8))[0], expected, atol=1e-4, rtol=1e-4)


def test_best_without_a_checkpoint_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`MobileExport\(checkpoint='best'\)`: expected a `ModelCheckpoint`"):
        fit(Lit(Images()), export_to(tmp_path / "model.ptl", checkpoint="best"))


def test_fast_dev_run_exports_to_a_temporary_folder(tmp_path: Path) -> None:
    export = export_to(tmp_path / "model.ptl", checkpoint="best")
    fit(Lit(Images()), export, fast_dev_run=True)
    assert export.report is not None
    assert list(tmp_path.iterdir()) == []


def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    module = Lit(Images())
    average = lightning.pytorch.callbacks.WeightAveraging(avg_fn=lambda old, new, count: 0.5 * (old + new))
    fit(module, average, export_to(tmp_path / "model.ptl"), max_epochs=2)
    batch = next(iter(batches()))
    tensors, expected = of_live(module, batch)  # the average is in the module by now
    torch.testing.assert_close(outputs_of(tmp_path / "model.ptl", *tensors)[0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    export = export_to(tmp_path / "model.ptl", parity=Tolerance(absolute=0.1, relative=0.1))
    fit(Lit(Images()), export, precision=precision)
    assert export.report is not None
    kind = {"bf16-mixed": "float32", "bf16-true": "bfloat16", "64-true": "float64"}[precision]
    assert export.report.inputs[0]["dtype"] == kind


@pytest.mark.parametrize("given", [True, False])
def test_compiled_module(given: bool, tmp_path: Path) -> None:
    module, export = Lit(Images()), export_to(tmp_path / "model.ptl")
    if given:
        module.example_input_array = noise(1, 3, 8, 8)
    fit(torch.compile(module, backend="eager"), export)
    tensors, expected = of_live(module, next(iter(batches())))
    torch.testing.assert_close(outputs_of(tmp_path / "model.ptl", *tensors)[0], expected[0], atol=1e-4, rtol=1e-4)


def test_a_second_fit_exports_again(tmp_path: Path) -> None:
    module, export = Lit(Images()), export_to(tmp_path / "model.ptl")
    trainer = fit(module, export)
    first = (tmp_path / "model.ptl").read_bytes()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(), batches(sign=-1.0))
    assert (tmp_path / "model.ptl").read_bytes() != first
    trainer.validate(module, batches(), verbose=False)


def test_export_comes_after_what_changes_the_network(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match="expected Events, MobileExport in this order"):
        runs.trainer(export_to(tmp_path / "m.ptl"), runs.Events(cuts=(1,))).fit(runs.Lit(), runs.Loader())


def test_missing_runtime_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit.RecursiveScriptModule, "_save_for_lite_interpreter")
    module = runs.Lit()
    with pytest.raises(UnsupportedError, match="has dropped it"):
        runs.trainer(export_to(tmp_path / "m.ptl")).fit(module, runs.Loader())
    assert module.losses == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": "model.pt"}, "expected a path that ends in one of '.ptl'"),
        (
            {"path": "model.onnx", "exporter": TorchScriptLite()},
            "expected a path that ends in '.ptl', found '.onnx'. Write 'model.ptl'",
        ),
        ({"checkpoint": "first"}, "expected one of 'last', 'best'"),
        ({"batch": "all"}, r"`MobileExport\(batch='all'\)`: expected one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MobileExport(**{"path": "model.ptl", **options})


def test_pickles(tmp_path: Path) -> None:
    export = export_to(tmp_path / "model.ptl")
    fit(Lit(Images()), export)
    assert pickle.loads(pickle.dumps(export)).report == export.report


def test_two_exports_to_one_path_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exports = export_to(Path("model.ptl")), export_to(tmp_path / "model.ptl")
    with pytest.raises(ValueError, match=r"`MobileExport\('model.ptl'\)`: expected a path for each .* found it twice"):
        fit(Lit(Images()), *exports)
    assert not list(tmp_path.iterdir())
