"""The factors of a layer, in a module that has the readable attributes of the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.lowrank.spectra import DEPTHWISE
from lightning_light.surgery.effective import EffectiveLayer

__all__ = ["Factors", "compose", "factor_form"]

_FIRST = {
    "linear": ("in_features",),
    "embedding": ("num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
_FIRST_OF_CONVOLUTION = ("in_channels", "groups", "transposed")
_KERNEL_LAYER = {"tucker2": 1, "pointwise": 1}
"""Form -> which of its layers has the kernel, if it is not the first."""
_KERNEL = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding")


class Factors(EffectiveLayer, nn.Sequential):
    """The factors of a layer, called in order.

    ``weight`` and ``bias`` are the product of the factors and the bias of the last one, differentiable and read-only.

    Attributes:
        factorized_form: see `lightning_light.lowrank.spectra.Spectrum`.
    """

    @override
    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
        last: Any = self[-1]
        if name == "weight":
            return self._product, self._shape(), last.weight
        bias = last.bias if factor_form(self) != "embedding" else None
        return None if bias is None else (lambda: bias, bias.shape, bias)

    @override
    def read(self, name: str) -> Any:
        form = factor_form(self)
        if form is None:  # under construction
            return super().read(name)
        first, last = self[0], self[-1]
        widths = {"linear": ("out_features", "out_features"), "embedding": ("embedding_dim", "out_features")}
        own, of_last = widths.get(form, ("out_channels", "out_channels"))
        if name == own:
            return getattr(last, of_last)
        if form in DEPTHWISE and name == "groups":
            return 1
        if name in _FIRST.get(form, _FIRST_OF_CONVOLUTION):
            return getattr(first, name)
        return self._of_kernel(name) if name in _KERNEL and form not in _FIRST else super().read(name)

    def _of_kernel(self, name: str) -> Any:
        if factor_form(self) != "spatial":
            return getattr(self[_KERNEL_LAYER.get(str(factor_form(self)), 0)], name)
        vertical, horizontal = getattr(self[0], name), getattr(self[1], name)
        return vertical if isinstance(vertical, str) else (vertical[0], horizontal[1])

    def _shape(self) -> tuple[int, ...]:
        if factor_form(self) == "embedding":
            return self.num_embeddings, self.embedding_dim
        if factor_form(self) == "linear":
            return self.out_features, self.in_features
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _product(self) -> Tensor:
        layers: list[Any] = list(self)
        product = compose(str(factor_form(self)), [layer.weight for layer in layers], getattr(layers[0], "groups", 1))
        return product.flatten(0, 1).to(layers[0].weight.dtype)


def factor_form(module: nn.Module) -> str | None:
    """Return the form in which ``module`` was factorized, or None."""
    return vars(module).get("factorized_form")


def compose(form: str, factors: Sequence[Tensor], groups: int) -> Tensor:
    """Multiply factors to the weight ``(groups, out, in, *kernel)``; an embedding gives ``(1, words, width)``.

    Args:
        form: of the factors.
        factors: in the order in which they are applied.
        groups: of the first layer.
    """
    pieces = [factor if factor.dtype == torch.float64 else factor.float() for factor in factors]
    if form == "embedding":
        return (pieces[0] @ pieces[1].mT)[None]
    if form == "linear":
        return (pieces[1] @ pieces[0])[None]
    if form == "depthwise":
        kernels, last = pieces[0].reshape(groups, -1, *pieces[0].shape[2:]), pieces[1]
        return torch.einsum("oit,it...->oi...", last.reshape(len(last), *kernels.shape[:2]), kernels)[None]
    if form == "pointwise":
        inputs, last = pieces[0].flatten(1), pieces[1]
        return torch.einsum("ot...,oti->oi...", last, inputs.reshape(*last.shape[:2], -1))[None]
    first, *rest = (piece.reshape(groups, -1, *piece.shape[1:]) for piece in pieces)
    if form == "tucker2":
        return torch.einsum("gop,gpq...,gqi->goi...", rest[1].flatten(3)[..., 0], rest[0], first.flatten(3)[..., 0])
    if form == "spatial":
        return torch.einsum("grix,gory->goixy", first.flatten(3), rest[0].flatten(3))
    return torch.einsum("gor,gri...->goi...", rest[0].flatten(3)[..., 0], first)
