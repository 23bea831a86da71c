"""What every compression method shares."""

import copy
import io
import sys
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.distillation import KnowledgeDistillation
from lightning_light.errors import NoEffectWarning, OrderError, UnsupportedError
from lightning_light.host.patches import patches_of
from lightning_light.order import Stage
from lightning_light.surgery.attachment import state_of
from tests.surgery.runs import HOSTS, MODULES, Events, Lit, Loader, same, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
)


class Late(CompressionCallback):
    """A method of a later stage, with a window of its own."""

    method, stage = "late", Stage.QUANTIZATION

    def __init__(self, start: float = 0.5) -> None:
        self.start = start

    def window(self, max_epochs: int | None) -> tuple[float, float]:
        return self.start, 1.0


class Early(Events):
    def window(self, max_epochs: int | None) -> tuple[float, float]:
        return 0.0, 0.7


class Watches(CompressionCallback):
    """Changes nothing, so may run anywhere; counts its steps, and remembers whether it was resumed."""

    method, stage, structural = "watches", Stage.MONITORS, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.resumed_at = self.resumed(pl_module), self.state(pl_module).get("steps", 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = self.state(pl_module)
        state["steps"] = state.get("steps", 0) + 1


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_is_left_behind_but_the_wrappers_and_the_compression_state(host) -> None:
    def inside(module: nn.Module) -> dict[str, Any]:
        return {
            f"{path}.{name}": (list(value) if isinstance(value, dict) else None)
            for path, child in module.named_modules()
            for name, value in vars(child).items()
        }

    events = Events(cuts=(2,), factor_at=3)
    before, after = MODULES[host](), MODULES[host]()
    trainer(host=host, max_epochs=1).fit(before, Loader())
    trainer(events, host=host, max_epochs=1).fit(after, Loader())
    added = {name: value for name, value in inside(after).items() if name not in inside(before)}
    added = {name for name in added if not name.startswith("net.fc")}
    assert added == {
        "._lightning_light_compression_state",
        "._lightning_light_hook",  # explains why a state dict does not fit a compressed network
        "._lightning_light_patches",
        ".on_save_checkpoint",
        ".on_load_checkpoint",
    }
    assert [patch.name for patch in patches_of(after)] == ["on_save_checkpoint", "on_load_checkpoint"]
    assert len(after._load_state_dict_pre_hooks) == 1
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        assert not any(getattr(child, name) for child in after.modules())
    assert [child.training for child in after.modules()] == [True] * len(list(after.modules()))
    assert not any(parameter.is_meta for parameter in after.parameters())


def test_a_callback_that_does_nothing_changes_no_number() -> None:
    plain, with_us = Lit(), Lit()
    run = trainer(max_epochs=2)
    run.fit(plain, Loader())
    other = trainer(Events(), max_epochs=2)
    other.fit(with_us, Loader())
    assert plain.losses == with_us.losses
    assert same(dict(plain.state_dict()), dict(with_us.state_dict()))
    assert same(run.optimizers[0].state_dict(), other.optimizers[0].state_dict())


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_orders_are_checked_in_setup(stage) -> None:
    run = trainer(Early(), Late())
    with pytest.raises(OrderError, match=r"`callbacks=\[Early, Late\]`: expected Early, Late in this order"):
        getattr(run, stage)(Lit(), Loader())
    trainer(Early(), Late(0.7), max_epochs=1).fit(Lit(), Loader())


def test_lbfgs_is_refused_before_training() -> None:
    class Newton(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    module = Newton()
    with pytest.raises(UnsupportedError, match="LBFGS"):
        trainer(Events()).fit(module, Loader())
    assert module.losses == []
    trainer(Watches(), max_steps=1).fit(module, Loader())


def test_two_of_one_method_have_a_state_each(tmp_path) -> None:
    first, second = Watches(), Watches()
    run = trainer(first, Events(), second, max_epochs=1)
    run.fit(module := Lit(), Loader())
    assert state_of(module).state["watches"] == {"steps": 4}
    assert state_of(module).state["watches#2"] == {"steps": 4}
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = [Watches(), Watches()]
    trainer(*again, max_epochs=2).fit(Lit(), Loader(), ckpt_path=tmp_path / "x.ckpt")
    assert [watch.resumed_at for watch in again] == [(True, 4), (True, 4)]
    assert (first.resumed_at, second.resumed_at) == ((False, 0), (False, 0))


def test_state_comes_back_from_a_weights_only_checkpoint(tmp_path) -> None:
    run = trainer(Events(cuts=(2,)), max_epochs=1)
    run.fit(Lit(), Loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    module = Lit()
    trainer(Events()).validate(module, ckpt_path=tmp_path / "w.ckpt", verbose=False)
    assert state_of(module).state["events"]["done"] == ["cut2"]
    assert torch.is_tensor(state_of(module).state["events"]["sum"])


def test_a_method_without_effect_warns_by_its_name() -> None:
    with pytest.warns(NoEffectWarning, match="`Watches` had no effect: no layer was named"):
        Watches()._no_effect("no layer was named.")


def test_layers_made_in_configure_model_are_cut_and_resumed(tmp_path) -> None:
    class Lazy(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                torch.manual_seed(1)
                self.net = Lit().net

    checkpoint = HOSTS[0].callbacks.ModelCheckpoint(tmp_path, "{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    whole, resumed = Lazy(), Lazy()
    trainer(Events(cuts=(2, 6), factor_at=3), checkpoint).fit(whole, Loader())
    trainer(Events(cuts=(2, 6), factor_at=3)).fit(resumed, Loader(), ckpt_path=tmp_path / "0.ckpt")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    trainer(Events()).test(whole, ckpt_path=tmp_path / "0.ckpt", verbose=False)
    assert whole.net.conv1.out_channels == 4


def test_manual_optimization_with_two_optimizers_and_a_frozen_layer_resumes(tmp_path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net.conv1.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            body = [p for name, p in self.net.named_parameters() if not name.startswith("fc") and p.requires_grad]
            return [torch.optim.SGD(body, 0.05, momentum=0.9), torch.optim.AdamW(self.net.fc.parameters(), 1e-2)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(loss.item())
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return {"loss": loss}

    checkpoint = HOSTS[0].callbacks.ModelCheckpoint(tmp_path, "{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    whole, resumed = Manual(), Manual()
    trainer(Events(cuts=(2, 6), factor_at=3), checkpoint).fit(whole, Loader())
    trainer(Events(cuts=(2, 6), factor_at=3)).fit(resumed, Loader(), ckpt_path=tmp_path / "0.ckpt")
    assert whole.net.conv1.weight.shape[0] == 2
    assert not whole.net.conv1.weight.requires_grad
    assert whole.losses[4:] == resumed.losses
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_compiled_networks_are_compiled_anew(tmp_path) -> None:
    shapes: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        shapes.append(1)
        return graph.forward

    class Compiled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.fast = torch.compile(self.net, backend=backend)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fast(x)

    module = Compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Events(cuts=(2, 3, 5)), max_epochs=2).fit(module, Loader())
    assert "torch._dynamo" in sys.modules
    assert len(shapes) >= 4
    assert module.net.conv1.out_channels == 1
    assert module.losses[-1] < module.losses[0]


def test_fast_dev_run_and_exceptions_leave_a_module_that_fits_again() -> None:
    module = Lit()
    trainer(Events(cuts=(0,)), fast_dev_run=True).fit(module, Loader())
    assert module.net.conv1.out_channels == 4

    class Breaks(Events):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(Breaks(cuts=(0,))).fit(Lit(), Loader())
    trainer(Events(), max_epochs=1).fit(module, Loader())
    assert len(module._load_state_dict_pre_hooks) == 1  # explains why a state dict does not fit


def test_a_callback_is_copied_and_saved_whole() -> None:
    events = Events(cuts=(2,))
    twin = copy.deepcopy(events)
    assert twin.cuts == (2,)
    torch.save(events, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=False).cuts == (2,)
    assert "state_dict" not in vars(CompressionCallback)


class Owns(Events):
    """Claims a layer at step 1, as a quantization would, and measures before each change."""

    method, stage = "owns", Stage.QUANTIZATION

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.claim(pl_module, ["net.conv1"])

    @override
    def before_surgery(self, trainer: Any, pl_module: Any) -> None:
        state = self.compression_state(pl_module)
        state.reference("params", lambda: float(sum(p.numel() for p in pl_module.parameters())))


class CutsAfterAsking(Events):
    """Lets the others measure before it cuts."""

    @override
    def _cut(self, trainer: Any, pl_module: Any) -> None:
        self._before_surgery(trainer, pl_module)
        super()._cut(trainer, pl_module)


def test_a_layer_that_a_later_method_has_claimed_is_not_cut(tmp_path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=2)
    module = Lit()
    width = module.net.conv1.out_channels
    with pytest.raises(UnsupportedError, match=r"on `net.conv1`: .* `owns` owns"):
        trainer(Events(cuts=(3,)), Owns(), saves).fit(module, Loader())
    assert module.net.conv1.out_channels == width
    resumed = Lit()
    with pytest.raises(UnsupportedError, match=r"on `net.conv1`: .* `owns` owns"):
        trainer(Events(cuts=(3,)), Owns()).fit(resumed, Loader(), ckpt_path=tmp_path / "2.ckpt")
    owner = Owns()
    trainer(Events(cuts=(0,)), owner).fit(fresh := Lit(), Loader())
    assert fresh.net.conv1.out_channels < width
    owner.disclaim(fresh)
    assert not owner.compression_state(fresh).claims


def test_what_others_compare_with_is_measured_before_the_first_change() -> None:
    module, owner = Lit(), Owns()
    dense = sum(parameter.numel() for parameter in module.parameters())
    trainer(CutsAfterAsking(cuts=(0, 5)), owner, max_steps=1).fit(module, Loader())
    assert sum(parameter.numel() for parameter in module.parameters()) < dense
    assert owner.compression_state(module).references == {"params": dense}


def test_a_network_among_the_arguments_is_written_by_its_class() -> None:
    teacher = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert repr(KnowledgeDistillation(teacher)) == "KnowledgeDistillation(teacher=Sequential(...))"
