"""Compare MACs with counts made by hand."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.measure import count_cost

ON_SHAPES_AND_DATA = pytest.mark.parametrize("shapes_only", [True, False])


def macs(model: nn.Module, *args: Any, shapes_only: bool = True, **kwargs: Any) -> int:
    return count_cost(model, args, kwargs, shapes_only=shapes_only).macs


class Attention(nn.Module):
    """Functional attention: no module of its own runs the products."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Functional(nn.Module):
    """Weights used without a layer, in a child and in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6))
        self.weight = nn.Parameter(torch.ones(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", self.inner(x), self.weight)


LAYERS: dict[str, tuple[nn.Module, tuple[Tensor, ...], int]] = {
    "linear": (nn.Linear(7, 5), (torch.zeros(3, 7),), 3 * 7 * 5),
    "linear of sequence": (nn.Linear(7, 5, bias=False), (torch.zeros(2, 3, 7),), 2 * 3 * 7 * 5),
    "linear of vector": (nn.Linear(7, 5), (torch.zeros(7),), 7 * 5),
    "linear of vector, no bias": (nn.Linear(7, 5, bias=False), (torch.zeros(7),), 7 * 5),
    "conv1d": (nn.Conv1d(3, 8, 5), (torch.zeros(2, 3, 20),), 2 * 8 * 16 * 3 * 5),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1, stride=2), (torch.zeros(1, 3, 8, 8),), 8 * 4 * 4 * 3 * 9),
    "conv2d without batch": (nn.Conv2d(3, 8, 3), (torch.zeros(3, 8, 8),), 8 * 6 * 6 * 3 * 9),
    "conv3d": (nn.Conv3d(2, 4, 3), (torch.zeros(1, 2, 5, 5, 5),), 4 * 27 * 2 * 27),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (torch.zeros(1, 6, 5, 5),), 6 * 9 * 9),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (torch.zeros(1, 8, 5, 5),), 12 * 9 * 2 * 9),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (torch.zeros(1, 3, 9, 9),), 4 * 25 * 3 * 9),
    "transposed": (nn.ConvTranspose2d(3, 8, 2, stride=2), (torch.zeros(1, 3, 5, 5),), 25 * 3 * 8 * 4),
    "transposed grouped": (nn.ConvTranspose2d(4, 8, 3, groups=2), (torch.zeros(1, 4, 5, 5),), 25 * 4 * 4 * 9),
    "bilinear": (nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)), 2 * 5 * 3 * 4),
    "functional attention": (
        Attention(),
        (torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 6)),
        2 * 3 * 5 * 7 * (4 + 6),
    ),
    "rnn": (nn.RNN(8, 16), (torch.zeros(5, 2, 8),), 10 * (8 * 16 + 16 * 16)),
    "gru": (nn.GRU(8, 16), (torch.zeros(5, 2, 8),), 10 * 3 * (8 * 16 + 16 * 16)),
    "lstm": (nn.LSTM(8, 16), (torch.zeros(5, 2, 8),), 10 * 4 * (8 * 16 + 16 * 16)),
    "deep lstm both ways": (
        nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True),
        (torch.zeros(2, 5, 8),),
        10 * 2 * 4 * (8 * 16 + 16 * 16) + 10 * 2 * 4 * (32 * 16 + 16 * 16),
    ),
    "lstm cell": (nn.LSTMCell(8, 16), (torch.zeros(2, 8),), 2 * 4 * (8 * 16 + 16 * 16)),
    "norm": (nn.BatchNorm2d(3), (torch.zeros(2, 3, 4, 4),), 0),
    "embedding": (nn.Embedding(10, 4), (torch.zeros(2, 3, dtype=torch.long),), 0),
}


@ON_SHAPES_AND_DATA
@pytest.mark.parametrize("layer", LAYERS)
def test_by_hand(layer: str, shapes_only: bool) -> None:
    model, args, expected = LAYERS[layer]
    assert macs(model, *args, shapes_only=shapes_only) == expected


@ON_SHAPES_AND_DATA
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(shapes_only: bool, need_weights: bool, training: bool) -> None:
    attention, tokens = nn.MultiheadAttention(16, 4, batch_first=True).train(training), torch.zeros(2, 5, 16)
    projections, products = 4 * 16 * 16 * 10, 2 * 5 * 5 * 16 * 2
    found = macs(attention, tokens, tokens, tokens, need_weights=need_weights, shapes_only=shapes_only)
    assert found == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


@ON_SHAPES_AND_DATA
def test_a_layer_is_called_with_a_slice_of_a_parameter(shapes_only: bool) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.ones(1, 9, 4)), nn.Linear(4, 3)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found, _ = self.attention(value=x, query=x, key=x, need_weights=False)
            return self.fc(found) + self.fc(self.table[:, : x.shape[1]])

    attention = 4 * 4 * 4 * 10 + 2 * 5 * 5 * 4 * 2
    assert macs(Positions(), torch.zeros(2, 5, 4), shapes_only=shapes_only) == attention + (10 + 5) * 4 * 3


@ON_SHAPES_AND_DATA
def test_transformer_encoder(shapes_only: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=3).eval()
    one = 4 * 16 * 16 * 10 + 2 * 5 * 5 * 16 * 2 + 2 * 16 * 32 * 10
    cost = count_cost(model, (torch.zeros(2, 5, 16),), shapes_only=shapes_only)
    assert cost.macs == 3 * one
    assert cost.macs_by_module["layers.1.linear1"] == 16 * 32 * 10
    assert cost.macs_by_module["layers.0.self_attn"] == one - 2 * 16 * 32 * 10


@ON_SHAPES_AND_DATA
def test_macs_count_for_the_module_that_runs_them(shapes_only: bool) -> None:
    cost = count_cost(Functional(), (torch.zeros(2, 4),), shapes_only=shapes_only)
    assert cost.macs_by_module == {"": 2 * 6 * 3, "inner.0": 2 * 4 * 6}
    assert cost.params_by_module == {"": 18, "inner.0": 30}
    assert (cost.macs, cost.params) == (84, 48)


def test_a_shared_layer_counts_macs_per_call_and_parameters_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.again(self.first(x)))

    cost = count_cost(Twice(), (torch.zeros(1, 4),))
    assert cost.macs_by_module == {"first": 32, "tied": 16}
    assert cost.params_by_module == {"first": 20, "tied": 4}


class Picky(nn.Module):
    """Takes a dict and a keyword, returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Any], *, scale: float) -> dict[str, Tensor]:
        return {"out": self.fc(batch["nested"]["x"]) * scale}


@ON_SHAPES_AND_DATA
def test_dicts_and_keywords(shapes_only: bool) -> None:
    batch = {"nested": {"x": torch.ones(4, 3)}, "name": "a"}
    assert macs(Picky(), batch, scale=2.0, shapes_only=shapes_only) == 24
    assert type(batch["nested"]["x"]) is Tensor


class ByValue(nn.Module):
    """The way through depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(3, 2), nn.Linear(3, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if (self.small(x) * 0 + x.sum()).sum() > 0 else self.small(x)


def test_the_model_runs_where_control_flow_depends_on_values() -> None:
    model = ByValue()
    assert macs(model, torch.ones(1, 3)) == 6 + 60
    assert macs(model, -torch.ones(1, 3)) == 6 + 6


@pytest.mark.parametrize(("side", "runs"), [(8, True), (2000, False)])
def test_by_default_only_small_models_run(side: int, runs: bool) -> None:
    seen: list[type[Tensor]] = []

    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(self.weight.data + 0))
            return super().forward(x)

    assert count_cost(Watched(3, 64, 3), (torch.zeros(1, 3, side, side),)).macs == 64 * 27 * (side - 2) ** 2
    assert (seen == [Tensor]) == runs


def test_an_error_of_the_model_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        count_cost(nn.Linear(3, 2), (torch.zeros(1, 4),))


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`count_cost` on `Sequential`: .*found the lazy layer '0'"):
        count_cost(nn.Sequential(nn.LazyLinear(3)), (torch.zeros(1, 4),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert macs(nn.Conv2d(3, 8, 3).to(dtype), torch.zeros(1, 3, 5, 5, dtype=dtype)) == 8 * 9 * 27


@ON_SHAPES_AND_DATA
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_any_gradient_mode(context: Any, shapes_only: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with context():
        assert macs(model, torch.zeros(1, 3, 5, 5), shapes_only=shapes_only) == 4 * 9 * 27


def test_in_the_middle_of_training() -> None:
    """Between a forward pass and its backward pass: the graph must stay valid."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    loss = model(torch.randn(2, 3, 5, 5)).square().sum()
    count_cost(model, (torch.zeros(1, 3, 5, 5),), shapes_only=False)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Restless(nn.Module):
    """Leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        self.net[0].weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.net[2].eval()  # one part in evaluation mode, the rest in training

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls = self.calls + 1
        self.last = x = self.net(x)
        self.train()
        random.random()
        return F.dropout(x, training=True)


@ON_SHAPES_AND_DATA
def test_nothing_is_left_behind(shapes_only: bool) -> None:
    model, calls = Restless(), []
    model.net[1].register_forward_hook(lambda *_: calls.append(1))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tensors = {
        name: (tensor, tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modes = [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    flags = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()

    assert (
        count_cost(model, (torch.randn(1, 3, 5, 5, generator=torch.Generator()),), shapes_only=shapes_only).macs == 972
    )

    for name, tensor in model.state_dict(keep_vars=True).items():
        live, copy, version = tensors[name]
        assert tensor is live, name
        assert torch.equal(tensor, copy), name
        assert tensor._version == version, name
    assert [module.training for module in model.modules()] == modes
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert not calls
    assert not model.net[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    ) == flags
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_is_left_behind_by_a_failure() -> None:
    model = Restless().train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="channels"):
        count_cost(model, (torch.zeros(1, 2, 5, 5),))
    assert model.training
    assert model.calls == 0
    assert not hasattr(model, "last")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.backends.mkldnn.enabled


def test_a_hook_handle_still_removes_its_hook() -> None:
    model = nn.Linear(3, 2)
    handle = model.register_forward_hook(lambda *_: None)
    count_cost(model, (torch.zeros(1, 3),))
    handle.remove()
    assert not model._forward_hooks


def test_a_compiled_module_counts_as_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.compile(backend="eager")
    assert macs(model, torch.zeros(1, 3)) == 6
    assert model._compiled_call_impl is not None


def test_a_parametrized_weight() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert macs(model, torch.zeros(1, 3)) == 6


def test_half_of_the_channels_cost_half() -> None:
    wide = count_cost(nn.Conv2d(8, 16, 3), (torch.zeros(1, 8, 5, 5),))
    narrow = count_cost(nn.Conv2d(8, 8, 3), (torch.zeros(1, 8, 5, 5),))
    assert narrow.macs * 2 == wide.macs
    assert narrow.params * 2 == wide.params
