"""What `StructuredPruning` refuses, early and in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from lightning_light.budgets import Budget
from lightning_light.errors import UnsupportedError

__all__ = ["check_arguments", "refuse_unprunable"]

_QUANTITIES = ("macs", "params", "channels", "bytes", "seconds")
_AT_LEAST = {"round_to": 1, "min_channels": 1, "events": 1, "calibration_batches": 1, "reestimate_batch_norm": 0}


def check_arguments(
    budget: Budget | None, amounts: Mapping[str, float] | None, heads: str, *, max_amount: float, **counts: int
) -> None:
    """Refuse values that can never work, where the user wrote them.

    Raises:
        TypeError: ``budget`` is no budget.
        ValueError: any other value out of range.
    """
    if budget is None and not amounts:
        raise ValueError(
            "`StructuredPruning()`: expected a budget or `amounts`, found neither. To keep 40 % of the "
            "multiply-accumulates write `StructuredPruning(MACs(0.4))`."
        )
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(
            f"`StructuredPruning({budget!r})`: expected a budget, found {type(budget).__name__}. Write for instance "
            "`StructuredPruning(MACs(0.4))`, to keep 40 % of the multiply-accumulates."
        )
    if budget is not None and budget.quantity not in _QUANTITIES:
        raise ValueError(
            f"`StructuredPruning({budget!r})`: expected MACs, Params, Channels, Size or Latency, found a budget of "
            f"{budget.quantity}, which stay in place. Mask weights to reach it."
        )
    if heads not in {"dim", "head"}:
        raise ValueError(
            f"`StructuredPruning(heads={heads!r})`: expected 'dim' (the same positions of every head) or 'head' (whole "
            "heads)."
        )
    if not 0.0 < max_amount <= 1.0:
        raise ValueError(f"`StructuredPruning(max_amount={max_amount})`: expected 0 < max_amount <= 1, a share.")
    for name, least in _AT_LEAST.items():
        if not isinstance(counts[name], int) or counts[name] < least:
            raise ValueError(f"`StructuredPruning({name}={counts[name]!r})`: expected an integer >= {least}.")
    for pattern, amount in (amounts or {}).items():
        if not 0.0 <= amount < 1.0:
            raise ValueError(
                f"`StructuredPruning(amounts={{{pattern!r}: {amount}}})`: expected 0 <= amount < 1, the share of the "
                "layer's channels that leaves, never percent."
            )


def refuse_unprunable(model: nn.Module) -> None:
    """Refuse layers whose channels other code counts as well: masks of ``torch.nn.utils.prune``, fake quantization.

    Raises:
        UnsupportedError: names the layer and the right order.
    """
    for name, module in model.named_modules():
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise UnsupportedError(
                f"`StructuredPruning`: `{name}` has a mask of `torch.nn.utils.prune`, which would keep the old shape. "
                "Make it permanent first, `torch.nn.utils.prune.remove(layer, 'weight')`, or mask after the channels "
                "have left."
            )
        quantized = hasattr(module, "weight_fake_quant") or hasattr(module, "activation_post_process")
        if quantized or (is_parametrized(module) and "quant" in str(type(module)).lower()):
            raise UnsupportedError(
                f"`StructuredPruning`: `{name}` is prepared for quantization, whose ranges belong to the old channels. "
                "Prune first, then quantize: the window of pruning must end before quantization starts."
            )
