"""What a criterion needs besides the weights, from the batches that training draws anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.movement import Movement
from lightning_light.errors import UnsupportedError
from lightning_light.sparsity.weights import Weight

__all__ = ["InputWatch", "Sums", "add_gradients", "add_movement", "check_evidence", "score_weights"]

Sums = dict[str, dict[str, Tensor]]
"""Kind of evidence -> weight name -> sum over the gathered steps."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_READABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def check_evidence(method: str, criterion: Criterion, weights: Sequence[Weight]) -> None:
    """Refuse what can never be gathered: gradients of frozen weights, inputs of layers that are no plain products.

    Raises:
        UnsupportedError: names the layer.
    """
    if criterion.needs & {"grad", "grad_squared", "movement"}:
        frozen = [weight.layer for weight in weights if not weight.parameter.requires_grad]
        if frozen:
            raise UnsupportedError(
                f"`{method}(criterion={criterion!r})`: expected weights that learn, found frozen ones, which have no "
                f"gradient, in {frozen[:3]}. Exclude them, `targets=Targets(exclude={frozen})`, or use `Magnitude()`."
            )
    if "activation" in criterion.needs:
        raise UnsupportedError(
            f"`{method}(criterion={criterion!r})`: expected a criterion of weights, found one of whole channels. Use "
            "`Wanda()`, or remove channels with `StructuredPruning`."
        )
    if "inputs" in criterion.needs:
        others = [w.layer for w in weights if not isinstance(w.module, _READABLE)]
        if others:
            raise UnsupportedError(
                f"`{method}(criterion={criterion!r})`: expected linear and convolution layers, whose inputs can be "
                f"read, found others: {others[:3]}. Exclude them: `targets=Targets(exclude={others})`."
            )


def add_gradients(sums: Sums, weights: Iterable[Weight], criterion: Criterion, stepping: set[nn.Parameter]) -> None:
    """Add the gradients of one optimizer step, dense, as they stand before masking and clipping."""
    for weight in weights:
        if weight.parameter not in stepping or weight.parameter.grad is None:
            continue
        grad = weight.parameter.grad.detach().float()
        for kind, value in (("grad", grad), ("grad_squared", grad.square())):
            if kind in criterion.needs:
                entries = sums.setdefault(kind, {})
                entries[weight.name] = _plus(entries.get(weight.name), value)


def add_movement(
    movement: dict[str, Tensor], weights: Iterable[Weight], criterion: Movement, stepping: set[nn.Parameter]
) -> None:
    """Let the criterion add up one more optimizer step."""
    for weight in weights:
        parameter = weight.parameter
        if parameter in stepping and parameter.grad is not None:
            before = movement.get(weight.name)
            before = torch.zeros_like(parameter, dtype=torch.float32) if before is None else before.to(parameter.device)
            movement[weight.name] = criterion.accumulate(before, parameter.detach(), parameter.grad)


class InputWatch:
    """Forward pre-hooks that add up the squares of what each layer reads, in training.

    Attributes:
        active: whether they do.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.active = False
        self._seen: dict[str, Tensor] = {}
        self._handles = [weight.module.register_forward_pre_hook(self._hook(weight.name)) for weight in weights]

    def move_to(self, sums: Sums, reduce: Callable[[Tensor], Tensor]) -> None:
        """Hand over what was seen since the last call: the mean over processes, of which one saves."""
        entries = sums.setdefault("inputs", {})
        for name, value in self._seen.items():
            entries[name] = _plus(entries.get(name), reduce(value))
        self._seen.clear()

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def look(module: nn.Module, args: Any) -> None:
            if self.active and module.training:
                kernel = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
                squares = args[0].detach().float().square().movedim(-1 - kernel, 0).flatten(1).sum(dim=1)
                self._seen[name] = _plus(self._seen.get(name), squares)

        return look


def score_weights(
    weights: Sequence[Weight],
    criterion: Criterion,
    *,
    sums: Mapping[str, Mapping[str, Tensor]],
    steps: int,
    movement: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """A score for every weight, in the weight's own layout.

    Args:
        weights: those to score.
        criterion: scores.
        sums: what was gathered, over ``steps`` steps.
        steps: how many.
        movement: what `Movement` has added up.
        values: by name, where not the parameter itself is to be looked at.
        generator: for criteria that draw.
        reduce: the mean over processes.

    Raises:
        UnsupportedError: nothing was gathered for a weight: it is not used, or its gradient is always None.
    """
    scores = {}
    for weight in weights:
        value = values.get(weight.name, weight.parameter).detach().to(weight.parameter.device)
        pieces: dict[str, Tensor] = {}
        for kind in sorted(criterion.needs - {"generator"}):
            found = (movement if kind == "movement" else sums.get(kind, {})).get(weight.name)
            if found is None:
                raise UnsupportedError(
                    f"`criterion={criterion!r}` on `{weight.layer}`: expected {kind} from training, found none: no "
                    f"batch reached it. Exclude the layer: `targets=Targets(exclude={weight.layer!r})`."
                )
            mean = reduce(found.to(value.device))
            if kind == "inputs":
                mean = _per_weight(mean, weight).sqrt()
            elif kind != "movement":
                mean = mean / max(steps, 1)
            pieces[kind] = weight.facing(mean) if kind != "inputs" else mean
        evidence = Evidence(
            weight.facing(value),
            generator=generator,
            grad=pieces.get("grad"),
            inputs=pieces.get("inputs"),
            grad_squared=pieces.get("grad_squared"),
            movement=pieces.get("movement"),
        )
        scores[weight.name] = weight.facing(criterion(evidence))
    return scores


def _per_weight(squares: Tensor, weight: Weight) -> Tensor:
    """``(in,)`` -> what broadcasts to the weight as ``(out, in, *kernel)``; groups read their own part."""
    groups = getattr(weight.module, "groups", 1)
    kernel = [1] * (weight.parameter.ndim - 2)
    if groups == 1 or isinstance(weight.module, _TRANSPOSED):
        return squares.reshape(1, -1, *kernel)
    outputs = weight.parameter.shape[0] // groups
    return squares.reshape(groups, -1).repeat_interleave(outputs, dim=0).reshape(groups * outputs, -1, *kernel)


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total.to(value.device) + value
