import pytest
import torch
from torch import nn

from lightning_light.errors import TargetError
from lightning_light.targets import Targets, as_targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 3, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block())
        self.fc = nn.Linear(3, 4)
        self.head = self.fc  # one module, two names


NET = Net()


def names(**arguments: object) -> list[str]:
    return list(Targets(**arguments).select(NET))  # type: ignore[arg-type]


def test_everything_by_default_in_the_models_order() -> None:
    assert names() == [name for name, _ in NET.named_modules() if name]


def test_a_pattern_stands_for_a_module_and_what_is_inside() -> None:
    assert names(include="layer2") == ["layer2", "layer2.0", "layer2.0.conv1", "layer2.0.bn", "layer2.0.conv2"]
    assert names(exclude=["layer1", "layer2"]) == ["stem", "fc"]


def test_globs() -> None:
    assert names(include="*.conv?") == [name for name, _ in NET.named_modules() if "conv" in name]
    assert names(include=["layer[2-9].*.conv1", "stem"]) == ["stem", "layer2.0.conv1"]


def test_a_name_is_not_a_part_of_a_name() -> None:
    with pytest.raises(TargetError):
        names(include="layer")


def test_regular_expressions_match_whole_names() -> None:
    assert names(include=r"re:layer\d\.0\.conv1") == ["layer1.0.conv1", "layer2.0.conv1"]
    assert names(include=r"re:(?!layer).*") == ["stem", "fc"]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("Conv2d", 6),
        (("Conv2d", "Linear"), 7),
        ("_ConvNd", 7),
        ("torch.nn.Conv2d", 6),
        ("torch.nn.modules.conv.Conv2d", 6),
        (["nn.Linear", "Linear"], 1),
    ],
)
def test_types_by_name_with_subclasses(types: object, expected: int) -> None:
    assert len(names(types=types)) == expected


def test_a_predicate_has_the_last_word() -> None:
    def narrow(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)

    assert names(include="layer1", predicate=narrow) == ["layer1.0.conv2", "layer1.1.conv2"]


def test_a_module_with_two_names_answers_to_both() -> None:
    assert names(include="head") == ["fc"]
    assert "fc" not in names(exclude="head")


def test_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(2, 2)
    assert Targets(types="Linear").select(layer) == {"": layer}


def test_layers_are_those_of_the_model() -> None:
    chosen = Targets(types="Linear").select(NET)
    assert chosen == {"fc": NET.fc}


def test_a_pattern_that_names_nothing_shows_the_nearest_names() -> None:
    with pytest.raises(TargetError, match=r"`Targets\(include='layer3.0.conv1'\)`.*Nearest: 'layer\d.0.conv1'"):
        names(include=("stem", "layer3.0.conv1"))
    with pytest.raises(TargetError, match=r"`Targets\(exclude='heads'\)`.*Nearest: 'head'"):
        names(exclude="heads")


def test_nothing_chosen_shows_the_types() -> None:
    with pytest.raises(TargetError, match=r"expected at least one layer, found none.*BatchNorm2d, Block, Conv1d"):
        names(types="Conv3d")
    with pytest.raises(TargetError, match="the patterns name 0 of"):
        names(include="fc", exclude="fc")


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="expected a regular expression"):
        Targets(include="re:(")
    with pytest.raises(ValueError, match="at least one pattern"):
        Targets(include=())


def test_targets_are_a_value() -> None:
    targets = Targets(include=["a", "b"], types=["Linear"])
    assert targets == eval(repr(targets))
    assert hash(targets) == hash(Targets(include=("a", "b"), types="Linear"))


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        (None, Targets()),
        ("fc", Targets(include="fc")),
        (["fc", "stem"], Targets(include=("fc", "stem"))),
        (Targets(types="Linear"), Targets(types="Linear")),
        (nn.Linear, Targets(types="torch.nn.modules.linear.Linear")),
        ((nn.Conv1d, nn.Linear), Targets(types=(nn.Conv1d, nn.Linear))),
    ],
)
def test_as_targets(value: object, targets: Targets) -> None:
    assert as_targets(value) == targets  # type: ignore[arg-type]


def test_types_by_class() -> None:
    assert names(types=nn.Linear) == names(types="Linear") == ["fc"]
    assert len(names(types=[nn.Conv2d, "Linear"])) == 7
    assert list(as_targets([nn.Conv1d, nn.Linear]).select(NET)) == ["stem", "fc"]


@pytest.mark.parametrize("value", [3, ["fc", 3], nn.Linear(2, 2), ["fc", nn.Linear]])
def test_what_selects_nothing_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"expected .*, found"):
        as_targets(value)  # type: ignore[arg-type]


def test_selecting_changes_nothing() -> None:
    before = {name: parameter.clone() for name, parameter in NET.named_parameters()}
    Targets().select(NET)
    assert all(torch.equal(before[name], parameter) for name, parameter in NET.named_parameters())
