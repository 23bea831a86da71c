"""What reads a compressed checkpoint: other stages, averaged copies, copies of the module, a bare class."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from lightning_light.budgets import MACs
from lightning_light.errors import ManifestError
from lightning_light.lowrank import RankAllocation, RankRatio, factorize
from lightning_light.structured import prune_channels
from lightning_light.surgery.attachment import attach, release, state_of
from lightning_light.surgery.checkpoint import CompressibleMixin, load_from_checkpoint, manifest_of, restructure
from lightning_light.surgery.manifest import KEY
from tests.surgery.runs import HOSTS, MODULES, Events, Lit, Loader, same, trainer
from tests.zoo import noise

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
)
X = noise(2, 3, 8, 8)


def by_epoch(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "e{epoch}", auto_insert_metric_name=False, save_top_k=-1, **options)


@pytest.fixture
def run(tmp_path) -> tuple[Lit, pl.Trainer, Path]:
    """Epoch 0 ends dense, epoch 1 with half of conv1, epoch 2 with two layers for fc."""
    module = Lit()
    fitted = trainer(Events(cuts=(5,), factor_at=9), by_epoch(tmp_path))
    fitted.fit(module, Loader())
    return module, fitted, tmp_path


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_other_stages_go_forwards_and_backwards_on_one_module(run, stage) -> None:
    _, _, folder = run
    module = Lit()
    for epoch in (2, 0, 1, 0, 2, 1):
        other = trainer(Events())
        getattr(other, stage)(module, ckpt_path=folder / f"e{epoch}.ckpt", verbose=False)
        assert same(dict(module.state_dict()), dict(weights(folder / f"e{epoch}.ckpt"))), epoch
        assert module.net.conv1.out_channels == (8, 4, 4)[epoch]
        assert isinstance(module.net.fc, torch.nn.Sequential) == (epoch == 2)
        assert module.training


def test_modules_stay_the_same_objects_where_their_class_does(run) -> None:
    module, _, folder = run
    conv, weight, bias = module.net.conv1, module.net.conv1.weight, module.net.fc[1].bias
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    trainer(Events()).test(module, ckpt_path=folder / "e0.ckpt", verbose=False)
    assert module.net.conv1 is conv
    assert conv.weight is weight
    assert weight.shape == (8, 3, 3, 3)
    assert calls
    handle.remove()
    assert bias is not module.net.fc.bias  # the layer is another one


def test_after_going_back_training_goes_on_from_there(run) -> None:
    module, _, folder = run
    again = Lit()
    trainer(Events(cuts=(5,), factor_at=9)).fit(again, Loader(), ckpt_path=folder / "e0.ckpt")
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    trainer(Events(cuts=(5,), factor_at=9)).fit(module, Loader(), ckpt_path=folder / "e0.ckpt")
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_an_optimizer_made_early_follows_when_a_run_starts_after_going_back(run) -> None:
    _, _, folder = run
    module = Lit(early=True)
    trainer(Events()).test(module, ckpt_path=folder / "e2.ckpt", verbose=False)
    fitted = trainer(Events(), max_epochs=1)
    fitted.fit(module, Loader())
    held = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    assert not torch.equal(module.net.fc[0].weight, weights(folder / "e2.ckpt")["net.fc.0.weight"])


def test_a_plain_checkpoint_takes_a_compressed_module_back(run, tmp_path) -> None:
    module, _, _ = run
    plain = trainer(ModelCheckpoint(tmp_path / "plain"), max_epochs=1)
    plain.fit(Lit(), Loader())
    trainer(Events()).test(module, ckpt_path=plain.checkpoint_callback.best_model_path, verbose=False)
    assert module.net.conv1.out_channels == 8
    assert state_of(module).edit_log == []
    assert state_of(module).state == {"events": {}} or state_of(module).state == {}


@pytest.mark.parametrize("average_first", [True, False])
def test_averaged_copies_follow_and_resume_bit_for_bit(average_first, tmp_path) -> None:
    def callbacks() -> list[Any]:
        both = [EMAWeightAveraging(decay=0.9), Events(cuts=(2, 6), factor_at=5)]
        return both if average_first else both[::-1]

    whole = Lit()
    trainer(*callbacks(), by_epoch(tmp_path)).fit(whole, Loader())
    for epoch in (0, 1):
        resumed = Lit()
        trainer(*callbacks()).fit(resumed, Loader(), ckpt_path=tmp_path / f"e{epoch}.ckpt")
        assert resumed.losses == whole.losses[4 * (epoch + 1) :]
        assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_trainer_with_averages_tests_an_earlier_network(tmp_path) -> None:
    run = trainer(EMAWeightAveraging(decay=0.9), Events(cuts=(5,), factor_at=9), by_epoch(tmp_path))
    run.fit(module := Lit(), Loader())
    for epoch, width in ((0, 8), (2, 4), (1, 4)):
        run.test(module, ckpt_path=tmp_path / f"e{epoch}.ckpt", verbose=False)
        assert module.net.conv1.out_channels == width


@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("average_first", [True, False])
def test_stochastic_averages_follow(average_first, tmp_path) -> None:
    both = [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), Events(cuts=(2, 6), factor_at=5)]
    module = Lit()
    trainer(*(both if average_first else both[::-1]), by_epoch(tmp_path)).fit(module, Loader())
    assert module.net.conv1.out_channels == 2
    assert module(X).shape == (2, 5)
    resumed = Lit()
    again = [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), Events(cuts=(2, 6), factor_at=5)]
    trainer(*(again if average_first else again[::-1])).fit(resumed, Loader(), ckpt_path=tmp_path / "e1.ckpt")
    assert resumed.net.conv1.out_channels == 2
    assert all(bool(tensor.isfinite().all()) for tensor in resumed.state_dict().values())


def test_learning_rate_finder_inside_fit_keeps_the_parameters() -> None:
    class WithRate(Lit):
        lr = 0.01

    module = WithRate()
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    fitted = trainer(finder, Events(cuts=(5,), factor_at=9))
    fitted.fit(module, Loader())
    held = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    assert module.net.conv1.out_channels == 4
    assert not state_of(module).resumed


def test_deep_copy_has_a_compression_state_of_its_own(run) -> None:
    module, _, _ = run
    twin = copy.deepcopy(module)
    assert twin.on_save_checkpoint.__self__ is twin
    assert state_of(twin) is not state_of(module)
    checkpoint: dict[str, Any] = {"state_dict": twin.state_dict()}
    twin.on_save_checkpoint(checkpoint)
    assert json.loads(checkpoint[KEY]["edit_log"]) == state_of(module).edit_log
    twin.on_load_checkpoint({"state_dict": weights(run[2] / "e0.ckpt"), KEY: _manifest(run[2] / "e0.ckpt")})
    assert (twin.net.conv1.out_channels, module.net.conv1.out_channels) == (8, 4)


def _manifest(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)[KEY]


def test_pickle_keeps_the_compression_state(run) -> None:
    module, _, folder = run
    twin = pickle.loads(pickle.dumps(module))
    assert torch.equal(twin.eval()(X), module.eval()(X))
    assert state_of(twin).edit_log == state_of(module).edit_log
    trainer(Events()).test(twin, ckpt_path=folder / "e0.ckpt", verbose=False)
    assert twin.net.conv1.out_channels == 8


def test_net_alone_is_saved_whole_without_this_package(run) -> None:
    module, _, _ = run
    file = io.BytesIO()
    torch.save(module.net, file)
    assert b"lightning_light" not in file.getvalue()


@pytest.mark.parametrize("host", HOSTS)
def test_a_class_is_loaded_without_a_trainer_and_left_as_it_was(host, tmp_path) -> None:
    cls = MODULES[host]
    module = cls("sgd", by_name=True)
    fitted = trainer(Events(cuts=(2,), factor_at=3), host=host, max_epochs=1)
    fitted.fit(module, Loader())
    fitted.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    loaded = load_from_checkpoint(cls, tmp_path / "small.ckpt")
    assert type(loaded) is cls
    assert (loaded.optimizer, loaded.by_name) == ("sgd", True)
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    assert "on_load_checkpoint" not in vars(cls)
    with pytest.raises(ValueError, match=r"`lightning_light.load_from_checkpoint\(MyModule, path\)` rebuilds"):
        cls.load_from_checkpoint(tmp_path / "small.ckpt")
    loaded = load_from_checkpoint(cls, tmp_path / "small.ckpt", optimizer="adamw")
    assert loaded.optimizer == "adamw"


def test_what_was_loaded_is_trained_on_and_saved(run, tmp_path) -> None:
    loaded = load_from_checkpoint(Lit, run[2] / "e1.ckpt")
    fitted = trainer(Events(), max_epochs=1)
    fitted.fit(loaded, Loader())
    fitted.save_checkpoint(tmp_path / "on.ckpt")
    assert load_from_checkpoint(Lit, tmp_path / "on.ckpt").net.conv1.out_channels == 4


def test_the_mixin_makes_the_class_load_itself(run) -> None:
    class Mixed(CompressibleMixin, Lit):
        pass

    loaded = Mixed.load_from_checkpoint(run[2] / "e2.ckpt")
    assert torch.equal(loaded.eval()(X), run[0].eval()(X))
    assert same(dict(load_from_checkpoint(Mixed, run[2] / "e2.ckpt").state_dict()), dict(loaded.state_dict()))
    fresh = Mixed()
    trainer(Events(cuts=(5,), factor_at=9)).fit(fresh, Loader(), ckpt_path=run[2] / "e1.ckpt")
    assert same(dict(fresh.state_dict()), dict(run[0].state_dict()))


def test_the_users_own_hooks_are_called_first(tmp_path) -> None:
    class Talks(Lit):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["said"] = KEY not in checkpoint

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.heard = checkpoint["said"], self.net.conv1.out_channels

    fitted = trainer(Events(cuts=(2,)), max_epochs=1)
    fitted.fit(Talks(), Loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert load_from_checkpoint(Talks, tmp_path / "x.ckpt").heard == (True, 8)
    assert "on_load_checkpoint" in vars(Talks)
    module = Talks()
    trainer(Events()).test(module, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert module.heard == (True, 8)


def test_a_hook_set_on_the_instance_is_kept() -> None:
    module, heard = Lit(), []
    module.on_save_checkpoint = heard.append
    attach(module)
    module.on_save_checkpoint({})
    assert len(heard) == 1


def test_a_bare_state_dict_gives_a_fresh_module_its_shapes(run, tmp_path) -> None:
    _, _, folder = run
    fresh = Lit()
    compression_state = attach(fresh)
    state_dict = weights(folder / "e1.ckpt")
    assert str(fresh.load_state_dict(state_dict)) == "<All keys matched successfully>"
    assert (fresh.net.conv1.out_channels, fresh.net.conv2.in_channels, fresh.net.bn1.num_features) == (4, 4, 4)
    assert compression_state.edit_log[0]["op"] == "channels"
    checkpoint: dict[str, Any] = {"state_dict": fresh.state_dict()}
    fresh.on_save_checkpoint(checkpoint)
    other = Lit()
    other_state = attach(other)
    other_state.load(other, checkpoint)
    assert other.net.conv1.out_channels == 4
    release(fresh)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(weights(folder / "e0.ckpt"))


@pytest.mark.parametrize("change", ["wider", "missing", "inconsistent", "rank"])
def test_a_state_dict_of_another_network_is_not_followed(run, change) -> None:
    fresh = Lit()
    attach(fresh)
    before = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    state_dict = dict(weights(run[2] / "e1.ckpt"))
    if change == "wider":
        state_dict["net.fc.weight"] = torch.zeros(5, 13)
    elif change == "missing":
        del state_dict["net.bn1.weight"]
    elif change == "rank":
        state_dict["net.fc.weight"] = torch.zeros(5, 12, 1)
    else:
        state_dict = {**fresh.state_dict(), "net.bn1.weight": torch.zeros(4)}
    with pytest.raises(RuntimeError):
        fresh.load_state_dict(state_dict)
    assert {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()} == before


def first(checkpoint: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put ``entry`` before the others in the edit_log."""
    checkpoint[KEY]["edit_log"] = json.dumps([entry, *json.loads(checkpoint[KEY]["edit_log"])])


def contradict(checkpoint: dict[str, Any]) -> None:
    edit_log = json.loads(checkpoint[KEY]["edit_log"])
    edit_log[0]["attributes"]["net.conv1"]["out_channels"] = 3
    checkpoint[KEY]["edit_log"] = json.dumps(edit_log)


def channels(module: str, attribute: str) -> dict[str, Any]:
    return {"op": "channels", "attributes": {module: {attribute: 1}}}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not a manifest": lambda c: c.update({KEY: ["channels"]}),
    "newer": lambda c: c[KEY].update(version=99),
    "no edit_log": lambda c: c[KEY].pop("edit_log"),
    "half a edit log": lambda c: c[KEY].update(edit_log=c[KEY]["edit_log"][:20]),
    "edit_log of another type": lambda c: c[KEY].update(edit_log="{}"),
    "state of another type": lambda c: c[KEY].update(state={"events": 1}),
    "unknown operation": lambda c: first(c, {"op": "of another package"}),
    "unknown module": lambda c: first(c, channels("net.none", "out_channels")),
    "unknown attribute": lambda c: first(c, channels("net.conv1", "chanels")),
    "contradiction": contradict,
    "weights missing": lambda c: c["state_dict"].pop("net.conv1.weight"),
    "weights of another rank": lambda c: c["state_dict"].update({"net.conv1.weight": torch.zeros(4)}),
    "another network": lambda c: c[KEY].update(fingerprint=json.dumps({"net.conv1.weight": [16, 3, 3, 3]})),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_checkpoint_leaves_the_module_untouched(run, how, compressed) -> None:
    module, _, folder = run if compressed else (Lit(), None, run[2])
    path = folder / "damaged.ckpt"
    checkpoint = torch.load(folder / "e1.ckpt", weights_only=True)
    DAMAGES[how](checkpoint)
    torch.save(checkpoint, path)
    before = copy.deepcopy(module.state_dict())
    modules = {name: (id(child), repr(child)) for name, child in module.named_modules()}
    with pytest.raises(ManifestError):
        trainer(Events()).test(module, ckpt_path=path, verbose=False)
    assert same(dict(before), dict(module.state_dict()))
    assert {name: (id(child), repr(child)) for name, child in module.named_modules()} == modules
    with pytest.raises(ManifestError):
        load_from_checkpoint(Lit, path)


def test_fit_names_the_damaged_part_too(run, tmp_path) -> None:
    checkpoint = torch.load(run[2] / "e1.ckpt", weights_only=True)
    checkpoint[KEY]["owners"] = {"events": {"stage": "first", "layers": [], "follows_cuts": True}}
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module = Lit()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ManifestError, match=r"manifest\['owners'\]\['events'\]\['stage'\]`: expected int, found 'first'"
    ):
        trainer(Events()).fit(module, Loader(), ckpt_path=tmp_path / "damaged.ckpt")
    assert same(dict(before), dict(module.state_dict()))
    assert not module.losses


def test_state_that_a_weights_only_load_refuses_is_refused_when_saved() -> None:
    module = Lit()
    attach(module).state["method"] = {"nested": [torch.float32]}
    with pytest.raises(TypeError, match=r"state\['method'\]\['nested'\]\[0\].*found dtype"):
        module.on_save_checkpoint({})
    attach(module).state["method"] = {(1, 2): 1}
    with pytest.raises(TypeError, match="keys of type int or str, found tuple"):
        module.on_save_checkpoint({})


def test_a_project_with_its_own_save_format_rebuilds_the_structure(tmp_path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.first(x)))

    net, x = Plain(), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"surgery\.attach\(model\)"):
        manifest_of(net)
    attach(net)
    prune_channels(net, x, MACs(0.5))
    factorize(net, x, RankRatio(0.5), targets="second", allocation=RankAllocation(round_to=1))
    torch.save({"net": net.state_dict(), "structure": manifest_of(net)}, tmp_path / "own.pt")
    saved = torch.load(tmp_path / "own.pt", weights_only=True)
    rebuilt = restructure(Plain(), saved["net"], saved["structure"])
    assert torch.equal(rebuilt(x), net(x))
    assert type(rebuilt.second).__name__ == "Factors"
    assert restructure(rebuilt, saved["net"], saved["structure"]) is rebuilt
    other = Plain()
    other.first = nn.Linear(9, 32)
    with pytest.raises(ManifestError):
        restructure(other, saved["net"], saved["structure"])
    release(rebuilt)
    for state_dict in (Plain().state_dict(), {**saved["net"], "first.weight": torch.zeros(3, 8)}):
        with pytest.raises(RuntimeError, match=r"lightning_light\.restructure\(model, state_dict, manifest\)"):
            rebuilt.load_state_dict(state_dict)
