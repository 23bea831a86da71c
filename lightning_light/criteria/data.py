"""Gather evidence from data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_light.criteria.collector import EvidenceCollector
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.gathered import PARAMETER_KINDS, Gathered, Storage
from lightning_light.criteria.gradient import Movement
from lightning_light.example_input import example_of_batch
from lightning_light.isolation import isolated, plain_attention
from lightning_light.validation import PositiveInt, validated

__all__ = ["collect_evidence", "evidence_for", "own_gradients"]

Loss = Callable[[Any, Any], Tensor]


@validated
def collect_evidence(
    model: nn.Module,
    data: Iterable[Any],
    needs: frozenset[str],
    *,
    batches: PositiveInt,
    loss: Loss | None = None,
    layers: Iterable[str] | None = None,
    accumulate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Gathered:
    """Gather evidence from the first ``batches`` of ``data``, without a Trainer.

    The model runs in evaluation mode and is left as it was, gradients included. Of a batch that is a tuple or list, the
    first item is the model's input; a mapping is its keyword arguments.

    Args:
        model: any module; of a LightningModule the ``training_step`` gives the loss where ``loss`` is None.
        data: batches.
        needs: the kinds of evidence, see `Criterion`.
        batches: how many batches to use.
        loss: (output, batch) -> scalar; needed for gradients alone.
        layers: as in `EvidenceCollector`.
        accumulate: as in `EvidenceCollector`.

    Raises:
        ValueError: gradients are needed and there is no loss, or ``data`` is empty.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]
        >>> sum_of_outputs = lambda output, batch: output.sum()
        >>> found = collect_evidence(net, data, frozenset({"grad"}), batches=1, loss=sum_of_outputs)
        >>> found.get("grad", "weight")
        tensor([[1., 2.]])
    """
    gradients, run = bool(needs & PARAMETER_KINDS), None
    if gradients and loss is None:
        run = getattr(model, "training_step", None) if getattr(model, "automatic_optimization", True) else None
        if run is None:
            raise ValueError(
                f"`{type(model).__name__}` with a criterion that needs {sorted(needs & PARAMETER_KINDS)}: expected "
                "`loss`, a function (output, batch) -> scalar tensor, found None. Write for instance "
                "`loss=lambda output, batch: F.cross_entropy(output, batch[1])`."
            )
    storage: Storage = {}
    with isolated(model), plain_attention(), own_gradients(model), torch.set_grad_enabled(gradients):
        collector = EvidenceCollector(model, layers, needs, storage, accumulate=accumulate)
        try:
            for index, batch in enumerate(islice(data, batches)):
                model.zero_grad()
                collector.begin_batch()
                value = _run_batch(model, batch, index, loss, run)
                if gradients and value is not None:
                    value.backward()  # type: ignore[no-untyped-call]
                    collector.observe_step(model.parameters())
                collector.end_batch()
        finally:
            collector.remove()
    if not collector.batches:
        raise ValueError(
            f"`{type(model).__name__}` with `data=...`: expected at least one batch, found none. An iterator that has "
            "been used up is empty: give a list or a DataLoader."
        )
    return collector.means()


def evidence_for(
    call: str,
    model: nn.Module,
    criterion: Criterion,
    data: Iterable[Any] | None,
    *,
    batches: int,
    loss: Loss | None,
    layers: Iterable[str] | None = None,
) -> Gathered:
    """Gather what ``criterion`` needs, for the function ``call``; arguments as in `collect_evidence`.

    Raises:
        ValueError: something is needed, and ``data`` is None or has no batch.
    """
    needs = criterion.needs - {"generator"}
    if not needs:
        return Gathered()
    if data is None:
        raise ValueError(
            f"`{call}(criterion={criterion!r})`: expected `data`, batches from which {sorted(needs)} can be gathered, "
            "found none. Pass `data=train_dataloader`, or use `criterion=Magnitude()`."
        )
    accumulate = criterion.accumulate if isinstance(criterion, Movement) else None
    return collect_evidence(model, data, needs, batches=batches, loss=loss, layers=layers, accumulate=accumulate)


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Put back afterwards the gradients that the parameters of ``model`` have now."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def _run_batch(
    model: nn.Module, batch: Any, index: int, loss: Loss | None, step: Callable[..., Any] | None
) -> Tensor | None:
    """Run one batch and return its loss, or None where no loss is wanted or the step gave none."""
    if step is None:
        example = example_of_batch(batch, model)
        output = model(*example.args, **example.kwargs)
        return None if loss is None else loss(output, _to_device(batch, model))
    attributes: dict[str, Any] = vars(getattr(step, "__self__"))  # noqa: B009
    attributes["log"] = attributes["log_dict"] = lambda *args, **kwargs: None  # `isolated` puts back what was there
    output = step(_to_device(batch, model), index)
    found = output.get("loss") if isinstance(output, Mapping) else output
    return found if isinstance(found, Tensor) else None


def _to_device(batch: Any, model: nn.Module) -> Any:
    """Move the tensors of a batch to the model's device; their types stay."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch
    return tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), batch)
