"""Damaged and hostile checkpoints are refused on every way in, by our error, before anything is touched."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_light.errors import ManifestError
from lightning_light.monitors import CompressionMonitor
from lightning_light.surgery.manifest import KEY, signed
from tests.contract.mutations import WAYS, Source, enter, sources, survey
from tests.contract.runs import differences, module_of, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
CHAINS = ["clustering_between_pruning_and_quantization", "quantization_chain"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return sources(CHAINS, tmp_path_factory.mktemp("sources"), (6, 12))


def test_mutated_checkpoints_are_refused_or_sound(pool) -> None:
    outcomes, wrong = survey(pool, 120, seed=3)
    assert wrong == []
    assert outcomes["refused, ManifestError"] > 80


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_mutated_checkpoints_of_many_methods(tmp_path) -> None:
    rows = [
        "structured_taylor",
        "low_rank_gradual",
        "dynamic_rigl",
        "sr_ste_2_4",
        "distillation_projector",
        "quantization_lsq",
    ]
    _, wrong = survey(sources([*CHAINS, *rows, "monitor_of_pruning"], tmp_path, (5, 7, 11)), 500, seed=5)
    assert wrong == []


def change(method: str, *path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Replace what is at ``path`` in the state of ``method``; ``to`` may compute it."""

    def changed(value: Any, path: tuple[Any, ...]) -> Any:
        if not path:
            return to(value) if callable(to) else to
        container = list(value) if isinstance(value, tuple) else value
        container[path[0]] = changed(container[path[0]], path[1:])
        return tuple(container) if isinstance(value, tuple) else container

    return lambda manifest: changed(manifest["state"], (method, *path))


def first_mask(to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return change("weight_pruning", "masks", to=lambda masks: {name: to(mask) for name, mask in masks.items()})


QAT = "quantization_aware_training"
IMPOSSIBLE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "mask of another shape": (first_mask(lambda mask: mask[:1]), "expected the shape of `"),
    "mask of numbers": (first_mask(lambda mask: mask.float()), "expected a bool tensor, found a float32 tensor"),
    "mask of another weight": (change("weight_pruning", "masks", to=lambda m: {"x": m.popitem()[1]}), "found 'x'"),
    "fraction above one": (change("weight_pruning", "fraction", to=1.5), "expected 0 <= value <= 1, found 1.5"),
    "fraction not a number": (change("weight_pruning", "fraction", to=math.nan), "found nan"),
    "negative count": (change("weight_pruning", "events", to=-1), "expected int >= 0, found -1"),
    "centroid index": (
        change("weight_clustering", "layers", "head", "assignments", to=lambda a: a + 100),
        "expected indices below 8",
    ),
    "missing centroids": (
        change("weight_clustering", "layers", "head", to=lambda e: {"assignments": e["assignments"]}),
        "one index per weight",
    ),
    "negative scale": (change(QAT, "ranges", to=lambda r: r.flip(1)), "expected finite ranges from low to high"),
    "NaN range": (change(QAT, "ranges", to=lambda r: r * math.nan), "expected finite ranges"),
    "bits": (change(QAT, "plan", "activations", 0, "bits", to=0), r"bits`: expected 1 <= value <= 16, found 0"),
    "activation index": (
        change(QAT, "plan", "outputs", 0, 1, to=999),
        "expected places below .* in `activations`, found 999",
    ),
    "module of the plan": (
        change(QAT, "plan", "layers", 0, 0, 0, to="features.none"),
        "names of modules of the network, found 'features.none'",
    ),
    "surplus key": (lambda m: m["state"]["weight_pruning"].update(frction=0.5), "found 'frction'"),
    "order of parameters": (
        lambda m: m["parameter_order"][0][0].reverse(),
        "expected a parameter with moments of shape .* in the place of",
    ),
    "negative reference": (lambda m: m["references"].update(macs=-4.0), "expected float >= 0, found -4.0"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_values_that_cannot_be_right_are_named_with_the_file(what, pool, tmp_path) -> None:
    source, (damage, sentence) = pool[1], IMPOSSIBLE[what]
    manifest = copy.deepcopy(source.checkpoint[KEY])
    damage(manifest)
    path = tmp_path / "hostile.ckpt"
    torch.save(source.checkpoint | {KEY: signed(manifest)}, path)
    module = module_of(source.case)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ManifestError, match=sentence) as caught:
        trainer(*source.case.build(tmp_path)).fit(module, ckpt_path=path)
    assert str(caught.value).startswith(f"`{path}`: The checkpoint's manifest is damaged at ")
    assert str(caught.value).endswith("Use another checkpoint of the run.")
    assert not differences(dict(before), dict(module.state_dict()))
    assert not module.losses


@pytest.mark.parametrize("way", [way for way in WAYS if way != "hook"])
def test_a_changed_value_that_could_be_right_is_noticed_by_the_digest(way, pool, tmp_path) -> None:
    source = pool[3]
    manifest = copy.deepcopy(source.checkpoint[KEY])
    next(iter(manifest["state"]["weight_pruning"]["masks"].values())).view(-1)[0] ^= True
    path = tmp_path / "damaged.ckpt"
    torch.save(source.checkpoint | {KEY: manifest}, path)
    with pytest.raises(ManifestError, match=f"`{path}`: .*expected it to match its digest"):
        enter(way, source, path)


def test_a_stored_example_that_is_no_call_of_the_module_is_refused(pool, tmp_path) -> None:
    manifest = copy.deepcopy(pool[3].checkpoint[KEY])
    change("low_rank", "example", "args", to=())(manifest)
    torch.save(pool[3].checkpoint | {KEY: signed(manifest)}, tmp_path / "hostile.ckpt")
    with pytest.raises(ManifestError, match="expected a call of `forward`, found missing a required argument: 'x'"):
        enter("fit", pool[3], tmp_path / "hostile.ckpt")


def test_an_edit_log_that_makes_fewer_tensors_than_the_checkpoint_has_is_refused(tmp_path) -> None:
    (source,) = sources(["reparameterization_acb"], tmp_path, (7,))
    manifest = copy.deepcopy(source.checkpoint[KEY])
    edits = json.loads(manifest["edit_log"])
    del edits[0]["layers"]["features.stem"][0]
    manifest["edit_log"] = json.dumps(edits)
    with pytest.raises(ManifestError, match=r"found one with \['features.stem.* as well"):
        enter("hook", source, tmp_path, source.checkpoint | {KEY: signed(manifest)})


def test_a_run_without_the_callback_that_added_parameters_is_refused(tmp_path) -> None:
    (source,) = sources(["quantization_lsq"], tmp_path, (12,))
    torch.save(source.checkpoint, tmp_path / "learned.ckpt")
    with pytest.raises(ManifestError, match="expected what the callbacks of its run have added, learned scales"):
        trainer(CompressionMonitor()).fit(module_of(source.case), ckpt_path=tmp_path / "learned.ckpt")


def test_a_method_joins_a_run_that_was_saved_without_it(pool, tmp_path) -> None:
    source = pool[1]
    plain = {key: value for key, value in source.checkpoint.items() if key != KEY}
    torch.save(plain | {"callbacks": {}}, tmp_path / "plain.ckpt")
    assert enter("fit", source, tmp_path / "plain.ckpt").losses == []
