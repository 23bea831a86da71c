"""Expand a compressed checkpoint with zeros, so that the original class loads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.atomic import atomic_save
from lightning_light.errors import ManifestError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.host.modules import BUILDER
from lightning_light.nested import tensors_in
from lightning_light.surgery.attachment import attach, release
from lightning_light.surgery.manifest import KEY, Kept, Manifest, check_fingerprint, naming_file
from lightning_light.surgery.structure import PRIVATE_PREFIX
from lightning_light.validation import validated

__all__ = ["expand_checkpoint"]

# What belongs to the compressed run, and would not fit the expanded network.
_OF_THE_RUN = (KEY, "optimizer_states", "lr_schedulers", "callbacks", "current_model_state", "averaging_state")

# Layers whose output for one channel depends on how many others there are.
_COUPLED = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.Softmax, nn.LogSoftmax, nn.Softmax2d)


@validated
def expand_checkpoint(path: str | Path, out: str | Path, model: nn.Module, *, example_input: Any = None) -> None:
    """Write a checkpoint that the original, uncompressed class loads and that computes what the compressed one does.

    Removed channels are zeros, at their original positions. For those who need the original shapes: the file is as
    large and as slow as the original. It has weights and hyper-parameters, no optimizer state.

    Args:
        path: a checkpoint of a network whose channels were pruned.
        out: the file to write.
        model: the network as it was built, of the original class; not changed.
        example_input: if given, or if the model has an ``example_input_array``, the outputs of both networks on it are
            compared before anything is written.

    Raises:
        ManifestError: the checkpoint has no manifest, or is of another network.
        UnsupportedError: zeros would change the output (channels of a LayerNorm or GroupNorm were removed), or layers
            were replaced, or the positions of the removed channels are not known.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if KEY not in checkpoint:
        raise ManifestError(f"`expand_checkpoint({str(path)!r})`: expected a checkpoint with a manifest, found none.")
    with naming_file(path):
        manifest = Manifest.decode(checkpoint[KEY])
        check_fingerprint(model, manifest.fingerprint, PRIVATE_PREFIX)
    kept = _refuse(model, manifest)
    first_names = _first_names(model)
    full = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    expanded = {
        name: _pad(name, tensor, full.get(name), kept.get(first_names.get(name, name), {}))
        for name, tensor in checkpoint["state_dict"].items()
    }
    example = getattr(model, "example_input_array", None) if example_input is None else example_input
    if example is not None:
        _compare(model, checkpoint, expanded, ExampleInput.of(example))
    rest = {key: value for key, value in checkpoint.items() if key not in _OF_THE_RUN}
    rest.get("hyper_parameters", {}).pop(BUILDER, None)
    atomic_save({**rest, "state_dict": expanded}, out)


def _refuse(model: nn.Module, manifest: Manifest) -> Kept:
    """Return the positions that are left; refuse where padding with zeros would be wrong."""
    other = sorted({str(entry["op"]) for entry in manifest.edit_log} - {"channels"})
    if other:
        raise UnsupportedError(
            f"`expand_checkpoint`: expected a network of which only channels were removed, found operations {other}. "
            "Load it with `lightning_light.load_from_checkpoint`, or export it."
        )
    if manifest.kept is None:
        raise UnsupportedError(
            "`expand_checkpoint`: expected an edit log with the positions of the removed channels, found one made "
            "from a bare state dict. Expand the checkpoint that those weights were taken from."
        )
    cut = {path for entry in manifest.edit_log for path in entry["attributes"]}
    cut |= {name.rpartition(".")[0] for name in manifest.kept}
    modules = dict(model.named_modules(remove_duplicate=False))
    coupled = sorted(f"{path} ({type(modules[path]).__name__})" for path in cut if _is_coupled(modules[path], manifest))
    if coupled:
        raise UnsupportedError(
            f"`expand_checkpoint`: expected removed channels to be independent of the others, found {coupled}, where a "
            "zero would change its neighbours. Load the small network with `lightning_light.load_from_checkpoint`."
        )
    return manifest.kept


def _is_coupled(module: nn.Module, manifest: Manifest) -> bool:
    if isinstance(module, nn.MultiheadAttention):  # scores are scaled by the width of a head
        widths = [e["attributes"][path].get("head_dim") for e in manifest.edit_log for path in e["attributes"]]
        return any(width not in (None, module.head_dim) for width in widths)
    return isinstance(module, _COUPLED)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, for every name of a tied tensor, the name that a cut uses."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _pad(name: str, tensor: Any, shape: tuple[int, ...] | None, kept: Mapping[int, Tensor]) -> Any:
    if not isinstance(tensor, Tensor) or shape is None:
        return tensor
    neutral = 1 if name.endswith("running_var") else 0  # a variance of zero would divide by almost nothing
    for dim, positions in kept.items():
        size = [shape[dim] if place == dim else length for place, length in enumerate(tensor.shape)]
        tensor = tensor.new_full(size, neutral).index_copy(dim, positions.long(), tensor)
    if tuple(tensor.shape) != shape:
        raise ManifestError(
            f"`expand_checkpoint`: expected `{name}` to have shape {shape} after expansion, found "
            f"{tuple(tensor.shape)}. The checkpoint is damaged, or its tensors are of another step than its manifest."
        )
    return tensor


def _compare(
    model: nn.Module, checkpoint: Mapping[str, Any], expanded: Mapping[str, Any], example: ExampleInput
) -> None:
    small, large = copy.deepcopy(model), copy.deepcopy(model)
    attach(small).load(small, checkpoint)
    release(small)
    small.load_state_dict(checkpoint["state_dict"])
    large.load_state_dict(expanded)
    with torch.no_grad():
        outputs = [net.eval()(*example.to(net).args, **example.to(net).kwargs) for net in (small, large)]
    for wanted, found in zip(*map(tensors_in, outputs), strict=True):
        if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-3, atol=1e-4):
            raise UnsupportedError(
                f"`expand_checkpoint`: expected the expanded `{type(model).__name__}` to compute what the "
                f"compressed one does, found outputs that differ by more than rounding (shapes {tuple(found.shape)} "
                f"and {tuple(wanted.shape)}). "
                "Something in its `forward` couples channels; load the small network with "
                "`lightning_light.load_from_checkpoint`."
            )
