"""Multiply the weights of a model with one gate per channel, for one call; the model is not changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_light.dependency import ChannelGroup, Member
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, plain_attention
from lightning_light.nested import tensors_in

__all__ = ["GatedWeights", "ungated_writers"]

_TINY = 1e-3


class GatedWeights:
    """One gate per channel, at every weight that reads the channel.

    A gate of zero at the readers equals the removal of the channel; a gate at the layers that produce it would leave
    the shift of a norm between them, and a residual stream has many such layers. Where channels are read by an
    operation without weights (the product of queries and keys), the tensors named in ``writers`` are gated too. Layer,
    group and RMS norms over gated channels use statistics weighted by the gates.

    Args:
        model: read only.
        groups: the channels that have gates.
        writers: tensors that are gated where channels are produced; see `ungated_writers`.

    Attributes:
        count: number of gates; they are one vector, group after group.
        device: of the model, where the gates of a call have to be.
        owner: index of each gate's group, shape ``(count,)``.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], writers: Iterable[str] = ()) -> None:
        self._model = model
        widths = torch.tensor([group.width for group in groups])
        self.count = int(widths.sum())
        self.device = next(model.parameters()).device
        self.owner = torch.repeat_interleave(torch.arange(len(groups)), widths)
        self._gates: dict[tuple[str, int], Tensor] = {}  # of each position along a dimension
        self._norms: dict[str, Tensor] = {}
        shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
        for group, start in zip(groups, (widths.cumsum(0) - widths).tolist(), strict=True):
            for member in group.members:
                numbers = torch.arange(start, start + group.width)[:, None].expand(member.index.shape)
                layer = member.tensor.rpartition(".")[0]
                if member.role == "in" or member.tensor in writers:
                    size = shapes[member.tensor][member.dim]
                    self._place(self._gates, (member.tensor, member.dim), size, member, numbers)
                if member.role == "norm" and isinstance(model.get_submodule(layer), _MIXING):
                    self._place(self._norms, layer, shapes[member.tensor][0], member, numbers)

    def _place(self, table: dict[Any, Tensor], key: Any, size: int, member: Member, numbers: Tensor) -> None:
        where = table.setdefault(key, torch.full((size,), self.count))  # `count`: without a gate
        where[member.index.reshape(-1)] = numbers.reshape(-1)

    def call(self, gates: Tensor, example: ExampleInput, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """Return the output of the model for ``gates``, shape ``(count,)``; to be called inside `isolated`.

        Args:
            gates: in [0, 1].
            example: arguments of the call.
            tensors: the parameters to use; the model's own by default.
        """
        padded, gated = torch.cat([gates, gates.new_ones(1)]), dict(tensors or _parameters(self._model))
        for (name, dim), where in self._gates.items():
            shape = [-1 if d == dim else 1 for d in range(gated[name].dim())]
            gated[name] = gated[name] * padded[where.to(gates.device)].to(gated[name]).view(shape)
        with ExitStack() as hooks:
            for name, where in self._norms.items():
                hook = _weighted_norm(padded[where.to(gates.device)])
                hooks.enter_context(self._model.get_submodule(name).register_forward_hook(hook))
            return functional_call(self._model, gated, example.args, example.kwargs)


def ungated_writers(model: nn.Module, groups: Sequence[ChannelGroup], example: ExampleInput) -> list[str]:
    """Find the tensors whose channels the output depends on even when the gates of all readers are zero.

    Half of the gates, drawn with a fixed seed, are closed; a tensor counts where the gradient of a random projection of
    the output is not zero at closed channels.

    Args:
        model: left as it is.
        groups: the channels that have gates.
        example: one call of the model.
    """
    writers: list[str] = []
    while found := _next_writers(model, groups, example, writers):
        writers += found
    return writers


def _next_writers(
    model: nn.Module, groups: Sequence[ChannelGroup], example: ExampleInput, writers: Sequence[str]
) -> list[str]:
    """The first tensor of each group that the output depends on; gating it may be enough for the whole group."""
    gated, generator = GatedWeights(model, groups, writers), torch.Generator().manual_seed(0)
    gates = (torch.rand(gated.count, generator=generator) < 0.5).float()
    candidates = [[m for m in g.members if m.role in _WRITERS and m.tensor not in writers] for g in groups]
    names = sorted({member.tensor for members in candidates for member in members})
    with isolated(model), plain_attention(), torch.enable_grad():
        tensors = {name: tensor.detach() for name, tensor in _parameters(model).items()}
        leaves = {name: tensors[name].requires_grad_() for name in names if tensors[name].is_floating_point()}
        output = gated.call(gates.to(gated.device), example, tensors)
        results = [t for t in tensors_in(output) if t.requires_grad]
        directions = [torch.randn(t.shape, generator=generator).to(t) for t in results]
        found = torch.autograd.grad(results, list(leaves.values()), directions, allow_unused=True) if results else ()
    gradients: dict[str, Tensor | None] = dict(zip(leaves, found, strict=bool(found)))
    closed = torch.split(gates == 0, [group.width for group in groups])
    first = (
        next((m.tensor for m in members if _depends(gradients.get(m.tensor), m, mask)), None)
        for members, mask in zip(candidates, closed, strict=True)
    )
    return sorted({name for name in first if name is not None})


def _depends(gradient: Tensor | None, member: Member, closed: Tensor) -> bool:
    if gradient is None:
        return False
    return bool(gradient.movedim(member.dim, 0)[member.index[closed].reshape(-1).to(gradient.device)].any())


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def _weighted_norm(share: Tensor) -> Callable[..., Tensor]:
    """Statistics over the channels of a layer, group or RMS norm, weighted by ``share``."""

    def hook(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, groups = args[0], getattr(norm, "num_groups", 1)
        grouped = isinstance(norm, nn.GroupNorm)
        shape = (len(x), groups, len(share) // groups, -1) if grouped else (*x.shape[:-1], 1, len(share), 1)
        values, weights = x.reshape(shape), share.to(x).view(groups, -1, 1)
        total = (weights.sum(-2, keepdim=True) * values.shape[-1]).clamp_min(_TINY)

        def mean(v: Tensor) -> Tensor:
            return (v * weights).sum((-2, -1), keepdim=True) / total

        centered = values if isinstance(norm, nn.RMSNorm) else values - mean(values)
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        result = (centered * torch.rsqrt(mean(centered.square()) + eps)).reshape(x.shape)
        for name, operation in (("weight", torch.mul), ("bias", torch.add)):
            tensor = getattr(norm, name, None)
            if tensor is not None:
                result = operation(result, tensor.view(-1, *[1] * (x.dim() - 2)) if grouped else tensor)
        return result

    return hook


_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WRITERS = ("out", "bias", "norm")
