import torch
from torch import nn

from lightning_light.measure import count_cost, layer_table


def rows(model: nn.Module, *args: torch.Tensor):
    return {row.name: row for row in layer_table(model, count_cost(model, args))}


def test_one_row_per_layer_in_the_models_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 2))
    table = rows(model, torch.zeros(1, 3, 5, 5))
    assert [(row.name, row.type, row.channels_in, row.channels_out) for row in table.values()] == [
        ("0", "Conv2d", 3, 8),
        ("1", "BatchNorm2d", 8, 8),
        ("4", "Linear", 72, 2),
    ]
    assert [row.params for row in table.values()] == [224, 16, 146]
    assert [row.macs for row in table.values()] == [8 * 9 * 27, 0, 144]


def test_rows_add_up_to_the_cost() -> None:
    model = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32)
    cost = count_cost(model, (torch.zeros(5, 1, 16),))
    table = layer_table(model, cost)
    assert sum(row.params for row in table) == cost.params
    assert sum(row.macs for row in table) == cost.macs


def test_sparsity_is_that_of_weights_without_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        model[0].weight[:, :2] = 0.0
    table = rows(model, torch.zeros(1, 4))
    assert table["0"].sparsity == 0.5
    assert table["1"].sparsity == 0.0  # its bias is all zeros, as every fresh norm's


def test_sparsity_of_a_parametrized_weight() -> None:
    class Mask(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * torch.tensor([1.0, 0.0, 0.0, 0.0])

    model = nn.Sequential(nn.Linear(4, 5))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Mask())
    table = rows(model, torch.zeros(1, 4))
    assert table.keys() == {"0"}
    assert (table["0"].sparsity, table["0"].params, table["0"].macs) == (0.75, 25, 20)


def test_a_model_that_is_one_parametrized_layer() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    table = rows(layer, torch.zeros(1, 4))
    assert table.keys() == {""}
    assert (table[""].params, table[""].macs) == (5 + 5 + 20, 20)


def test_bits_are_those_of_the_data_type() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2).bfloat16())
    cost = count_cost(model[0], (torch.zeros(1, 4),))
    assert layer_table(model[0], cost)[0].bits == 32.0
    half = count_cost(model[1], (torch.zeros(1, 5, dtype=torch.bfloat16),))
    assert layer_table(model[1], half)[0].bits == 16.0


def test_a_layer_of_unknown_kind_has_no_widths() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    row = rows(Scale(), torch.zeros(1, 3))[""]
    assert (row.channels_in, row.channels_out, row.params, row.macs) == (None, None, 3, 0)


def test_norms_and_embeddings_have_widths() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.LayerNorm(6), nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4))
    table = rows(model, torch.zeros(1, 4, dtype=torch.long))
    assert [(row.channels_in, row.channels_out) for row in table.values()] == [(10, 6), (6, 6), (4, 4), (4, 4)]
