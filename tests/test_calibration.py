"""Every function that is calibrated on data names itself and what was wrong with the data."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import lightning_light as ll
from lightning_light.depth import prune_blocks
from lightning_light.substitution import substitute_operators
from tests.zoo import noise

LAYER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
BLOCKS = nn.TransformerEncoder(LAYER, num_layers=4, enable_nested_tensor=False)
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda data: prune_blocks(BLOCKS, noise(2, 5, 8), ll.Params(0.5), data=data),
        lambda data: substitute_operators(CONVOLUTIONS, noise(4, 3, 8, 8), ll.MACs(0.5), data=data),
    ],
    ids=["prune_blocks", "substitute_operators"],
)
def test_data_without_a_batch_or_a_tensor_is_refused(call: Callable[[Any], Any], request) -> None:
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=rf"`{name}\(.*found no batch.*data=val_dataloader"):
        call([])
    with pytest.raises(ValueError, match=rf"`{name}\(\.\.\.\)`: expected batches of tensors, found str"):
        call(["images"])
