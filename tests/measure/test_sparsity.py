"""Count zeros, dead filters, and changes of masks."""

import pytest
import torch
from torch import nn

from lightning_light.measure import count_cost, measure_sparsity
from lightning_light.measure.sparsity import mask_churn, zero_fraction, zero_rows
from tests.zoo import noise


def test_zeros_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 64, 10))
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[3].weight[:, : 4 * 64] = 0.0
    found = measure_sparsity(model, count_cost(model, (noise(1, 3, 8, 8),)))
    rows = [(layer.name, layer.sparsity, layer.dead_filters) for layer in found.layers]
    assert rows == [("0", 0.25, 2), ("1", 0.0, 0), ("3", 0.5, 0)]
    assert found.macs == 8 * 27 * 64 + 512 * 10
    assert found.effective_macs == round(0.75 * 8 * 27 * 64 + 0.5 * 512 * 10)
    assert found.sparsity == pytest.approx((54 + 2560) / (216 + 5120))
    assert found.dead_filters == 2
    assert found.deflated < found.bytes
    assert measure_sparsity(model).effective_macs is None


def test_dead_filters_of_transposed_layers_and_tables() -> None:
    turned, table = nn.ConvTranspose2d(4, 6, 3), nn.Embedding(5, 3, padding_idx=0)  # row 0 is zero by design
    with torch.no_grad():
        turned.weight[:, :2] = 0.0  # stored (in, out, ...)
    assert [row.dead_filters for row in measure_sparsity(nn.Sequential(turned, table)).layers] == [2, 0]


def test_masks_are_compared_entry_by_entry() -> None:
    half, none = torch.tensor([[True, True], [False, False]]), torch.ones(2, 2, dtype=torch.bool)
    assert (zero_fraction([half, none]), zero_rows(half), zero_fraction([])) == (0.25, 1, 0.0)
    assert mask_churn({"a": half, "b": none}, {"a": ~half, "b": none}) == 0.5
    assert mask_churn({"a": half}, {}) == mask_churn({}, {"a": half}) == 0.5
    assert mask_churn({"a": half}, {"a": torch.ones(3, 2, dtype=torch.bool)}) == 0.0  # cut: nothing to compare
