"""A chain of methods fits the same module twice: the second run starts over, on the network that the first has left."""

from collections.abc import Callable
from typing import Any

import pytest

import lightning_light as ll
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, trainer


def quantizing() -> Any:
    return ll.QuantizationAwareTraining(ll.Int8(), calibration_batches=2)


CHAINS: dict[str, Callable[[], list[Any]]] = {
    "prune, quantize": lambda: [ll.StructuredPruning(ll.MACs(0.6)), quantizing()],
    "mask, quantize": lambda: [ll.WeightPruning(ll.Sparsity(0.5)), quantizing()],
    "factorize, quantize": lambda: [ll.LowRankFactorization(ll.MACs(0.7)), quantizing()],
    "mask, cluster": lambda: [ll.WeightPruning(ll.Sparsity(0.5)), ll.WeightClustering(8)],
    "prune, mask": lambda: [ll.StructuredPruning(ll.MACs(0.6)), ll.WeightPruning(ll.Sparsity(0.5))],
}


@pytest.mark.filterwarnings("ignore::lightning_light.errors.NoEffectWarning")  # the budget is met already
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_fits_twice(chain) -> None:
    module = module_class(Body, DEFAULT_HOST)()
    for _ in range(2):
        steps = len(module.losses)
        trainer(*CHAINS[chain](), max_epochs=6).fit(module)
        assert len(module.losses) == steps + 24
