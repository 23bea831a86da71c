"""A cut network trains on as the dense one would with the same channels masked: data, gradients, optimizer state."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_light.dependency import DependencyGraph, trace_dependencies
from lightning_light.errors import SurgeryError, UnsupportedError
from lightning_light.surgery.edit import cut, take, trial
from tests.zoo import noise, tokens


class Lion(Optimizer):
    """Chen et al., 2023: the sign of an average; an optimizer that torch does not know."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                    parameter.sub_(group["lr"] * (0.9 * average + 0.1 * parameter.grad).sign())
                    average.mul_(0.99).add_(parameter.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, foreach=False),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "adamw_foreach": lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "lion": Lion,
}


class Small(nn.Module):
    """Two convolutions, batch norm and two linear layers. No bias before the norm: its gradient is rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


IMAGES, LABELS = noise(8, 3, 6, 6), tokens(8, below=5)
TORCH = ["sgd", "nesterov", "adam", "amsgrad", "adamw", "adamw_fused", "adamw_foreach", "rmsprop"]


def step(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> float:
    """One step; with ``masks``, of a dense network in which what has left is held at zero."""
    reference = next(model.parameters())
    loss = F.cross_entropy(model(IMAGES.to(reference.dtype)).float(), LABELS)
    optimizer.zero_grad()
    loss.backward()
    for name, mask in (masks or {}).items():
        if name in dict(model.named_parameters()):
            model.get_parameter(name).grad.mul_(mask)
    optimizer.step()
    _mask(model, masks or {})
    return loss.item()


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, mask in masks.items():
        tensors[name].mul_(mask)


def masks_of(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    masks = {}
    for name, dims in kept.items():
        mask = torch.ones_like(tensors[name])
        for dim, index in dims.items():
            stays = torch.zeros(mask.shape[dim], dtype=mask.dtype)
            stays[index] = 1
            mask = mask * stays.reshape([-1 if d == dim else 1 for d in range(mask.dim())])
        masks[name] = mask
    return masks


def decided(graph: DependencyGraph, seed: int) -> dict[str, Tensor]:
    """A random mask for every group that may lose channels; at least one stays."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.groups:
        if group.reason is None:
            mask = torch.rand(group.width, generator=generator) < 0.6
            mask[int(torch.randint(group.width, (1,), generator=generator))] = True
            kept[group.name] = mask
    return kept


def trained(optimizer: str, dtype: torch.dtype = torch.float32) -> tuple[Small, Optimizer]:
    torch.manual_seed(0)
    model = Small().to(dtype)
    made = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        step(model, made)
    return model, made


def twin_of(model: Small, optimizer: Optimizer, name: str) -> tuple[Small, Optimizer]:
    twin = copy.deepcopy(model)
    made = OPTIMIZERS[name](twin.parameters())
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, made


def plan(model: nn.Module, seed: int) -> tuple[dict[str, dict[int, Tensor]], dict[str, dict[str, Any]]]:
    reference = next(model.parameters())
    graph = trace_dependencies(model, (IMAGES[:2].to(reference.dtype),))
    kept = decided(graph, seed)
    return graph.kept_positions(kept), graph.attributes(model, kept)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_training_after_a_cut_equals_the_masked_dense_network(optimizer, seed) -> None:
    model, made = trained(optimizer)
    dense, theirs = twin_of(model, made, optimizer)
    kept, attributes = plan(model, seed)
    masks = masks_of(dense, kept)
    cut(model, kept, attributes=attributes, optimizers=[made])
    _mask(dense, masks)
    for parameter, (name, _) in zip(dense.parameters(), dense.named_parameters(), strict=True):
        for key, value in theirs.state[parameter].items():
            if name in masks and isinstance(value, Tensor) and value.shape == parameter.shape:
                theirs.state[parameter][key] = value * masks[name]
    for _ in range(4):
        assert step(model, made) == pytest.approx(step(dense, theirs, masks), abs=2e-5)
    exact = optimizer != "lion"  # the sign of a rounding error is a whole step
    for name, value in dense.state_dict().items():
        expected = take(value, kept[name]) if name in kept else value
        if exact and "running" not in name:
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_number_that_stays_is_the_same_number(optimizer, dtype) -> None:
    model, made = trained(optimizer, dtype)
    before, state = copy.deepcopy(model), copy.deepcopy(made.state_dict()["state"])
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    objects = dict(model.named_parameters())
    model.conv2.weight.requires_grad_(False)
    model.conv2.weight.of_the_user = "kept"
    kept, attributes = plan(model, 1)
    edit = cut(model, kept, attributes=attributes, optimizers=[made])
    for place, (name, parameter) in enumerate(model.named_parameters()):
        dims = kept.get(name, {})
        assert parameter is objects[name]
        assert parameter.dtype == dtype
        assert parameter.requires_grad == (name != "conv2.weight")
        assert torch.equal(parameter, take(before.get_parameter(name), dims))
        assert torch.equal(parameter.grad, take(grads[name], dims))
        for key, value in state[place].items():
            expected = take(value, dims) if isinstance(value, Tensor) and value.dim() else value
            assert torch.equal(torch.as_tensor(made.state[parameter][key]), torch.as_tensor(expected)), (name, key)
        if dims:
            assert edit.shapes[name] == (tuple(before.get_parameter(name).shape), tuple(parameter.shape))
    assert model.conv2.weight.of_the_user == "kept"
    assert model.conv1.out_channels == model.bn1.num_features == model.conv2.in_channels == len(model.conv1.weight)
    assert edit.attributes["conv1"] == {"out_channels": model.conv1.out_channels}
    assert edit.old_attributes["conv1"] == {"out_channels": 6}
    step(model, made)


def test_a_graph_that_is_alive_does_not_remember_the_old_shape() -> None:
    model, made = trained("adamw", torch.float64)
    held = F.cross_entropy(model(IMAGES.double()), LABELS)
    held.backward(retain_graph=True)
    kept, attributes = plan(model, 2)
    cut(model, kept, attributes=attributes, optimizers=[made])
    made.zero_grad()
    F.cross_entropy(model(IMAGES.double()), LABELS).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    made.step()
    del held


def test_averaged_copies_are_cut_alike() -> None:
    model, _ = trained("sgd")
    averaged_model = copy.deepcopy(model)
    kept, attributes = plan(model, 3)
    cut(model, kept, attributes=attributes, averaged_models=[averaged_model])
    for (name, first), second in zip(model.state_dict().items(), averaged_model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert averaged_model.conv1.out_channels == model.conv1.out_channels


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    attributes = {
        name: {k: v for k, v in vars(m).items() if type(v) in (int, tuple)} for name, m in model.named_modules()
    }
    return [
        [(name, id(tensor), tensor.data_ptr(), tensor.clone(), tensor.grad) for name, tensor in tensors],
        attributes,
        copy.deepcopy(optimizer.state_dict()),
    ]


def unchanged(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(unchanged(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(unchanged(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


WRONG: dict[str, tuple[dict[str, dict[int, Tensor]], str]] = {
    "name": ({"conv1.weight": {0: torch.arange(3)}, "conv9.weight": {0: torch.arange(2)}}, "expected a name of"),
    "dimension": ({"conv1.weight": {0: torch.arange(3)}, "conv2.bias": {1: torch.arange(3)}}, "the tensor has shape"),
    "negative": ({"conv1.weight": {0: torch.tensor([-1, 2])}}, "ascending index below 6"),
    "beyond": ({"conv1.weight": {0: torch.tensor([2, 6])}}, "ascending index below 6"),
    "twice": ({"conv1.weight": {0: torch.tensor([2, 2])}}, "ascending index below 6"),
    "nothing": ({"conv1.weight": {0: torch.tensor([], dtype=torch.long)}}, "at least one ascending index"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_wrong_edit_changes_nothing(what) -> None:
    model, made = trained("adamw")
    before = everything(model, made)
    kept, sentence = WRONG[what]
    with pytest.raises(SurgeryError, match=sentence):
        cut(model, kept, optimizers=[made])
    assert unchanged(before, everything(model, made))


def test_an_optimizer_that_cannot_follow_changes_nothing() -> None:
    model, _ = trained("sgd")
    made = LBFGS(model.parameters())
    before = everything(model, made)
    kept, attributes = plan(model, 4)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        cut(model, kept, attributes=attributes, optimizers=[made])
    assert unchanged(before, everything(model, made))


def test_state_of_unknown_shape_changes_nothing() -> None:
    model, made = trained("adamw")
    made.state[model.fc2.bias]["history"] = torch.zeros(3, 7)
    made.state[model.fc1.weight]["history"] = torch.zeros(3, 7)
    before = everything(model, made)
    kept, attributes = plan(model, 5)
    with pytest.raises(UnsupportedError, match="history"):
        cut(model, kept, attributes=attributes, optimizers=[made])
    assert unchanged(before, everything(model, made))


def test_a_copy_of_another_structure_changes_nothing() -> None:
    model, made = trained("adamw")
    before = everything(model, made)
    averaged_model = Small()
    averaged_model.conv1 = nn.Conv2d(3, 4, 3)
    kept, attributes = plan(model, 6)
    with pytest.raises(SurgeryError, match="averaged copy"):
        cut(model, kept, attributes=attributes, optimizers=[made], averaged_models=[averaged_model])
    assert unchanged(before, everything(model, made))


def test_an_attribute_that_is_not_there_changes_nothing() -> None:
    model, made = trained("adamw")
    before = everything(model, made)
    kept, _ = plan(model, 7)
    with pytest.raises(SurgeryError, match="no_such"):
        cut(model, kept, attributes={"fc2": {"no_such": 3}}, optimizers=[made])
    assert unchanged(before, everything(model, made))


@pytest.mark.parametrize("values", [True, False])
def test_a_trial_gives_everything_back_also_after_an_error(values) -> None:
    model, made = trained("adamw")
    model.eval()
    before = everything(model, made)
    kept, attributes = plan(model, 8)
    with torch.no_grad(), trial(model, kept, attributes, values=values):
        assert model.conv1.out_channels == len(kept["conv1.weight"][0])
        model(IMAGES)
    assert unchanged(before, everything(model, made))
    with pytest.raises(RuntimeError, match="enough"), trial(model, kept, attributes, values=values):
        raise RuntimeError("enough")
    assert unchanged(before, everything(model, made))


def test_a_trial_leaves_the_nodes_that_accumulate_gradients() -> None:
    model, _ = trained("sgd")
    seen: list[str] = []
    nodes = []
    for name, parameter in model.named_parameters():
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: seen.append(name))
        nodes.append(node)  # as DDP holds them
    kept, attributes = plan(model, 9)
    with torch.no_grad(), trial(model, kept, attributes):
        model(IMAGES)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_an_entry_of_the_edit_log_is_plain() -> None:
    model, _ = trained("sgd")
    kept, attributes = plan(model, 1)
    entry = cut(model, kept, attributes=attributes).entry()
    assert entry["op"] == "channels"
    assert all(type(value) in (int, list) for values in entry["attributes"].values() for value in values.values())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_gathers_compose(seed) -> None:
    """Two cuts one after the other are one cut with the positions put through."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(7, 5, 3, generator=generator)
    first = {dim: (torch.rand(size, generator=generator) < 0.8).nonzero().reshape(-1) for dim, size in ((0, 7), (1, 5))}
    if all(index.numel() for index in first.values()):
        once = take(tensor, first)
        second = {0: torch.arange(0, once.shape[0], 2)}
        both = {0: first[0][second[0]], 1: first[1]}
        assert torch.equal(take(once, second), take(tensor, both))
