"""Expand convolutions to branches, and merge branches, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_light.copies import copy_network
from lightning_light.errors import LightningLightError, NoEffectWarning
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular, layer_lines
from lightning_light.merging import TOLERANCE, check_merged, merge_blocks
from lightning_light.reparameterization.apply import (
    Expansion,
    branched_layers,
    expand_layers,
    merge_layers,
    merged_tensors,
    plan_expansion,
)
from lightning_light.reparameterization.forms import Form
from lightning_light.surgery.attachment import attach, attach_if_kept
from lightning_light.surgery.checkpoint import load_from_checkpoint, save_converted
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import NonNegativeFloat, validated

__all__ = ["Merging", "expand_branches", "merge_branches", "merge_checkpoint"]


@dataclass(frozen=True)
class Merging(Tabular):
    """What was merged.

    Attributes:
        layers: expanded convolutions of this package that were merged.
        blocks: name of each other block that was merged -> the method of it that did it.
        error: largest difference of an output over the largest output; None without an example.
    """

    layers: tuple[str, ...]
    blocks: dict[str, str]
    error: float | None = None

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer or block."""
        merged = [f"{name}: merged" for name in self.layers]
        notes = (
            [] if self.error is None else [f"largest difference of an output: {self.error:.1e} of the largest output"]
        )
        return [layer_lines(merged + [f"{name}: merged by `{method}`" for name, method in self.blocks.items()], *notes)]


@validated
def expand_branches(
    model: nn.Module,
    example_inputs: Any,
    form: Form,
    *,
    targets: Targets | str | list[str] | None = None,
    initial_scale: NonNegativeFloat = 0.0,
    optimizers: Iterable[Optimizer] | None = None,
    tolerance: NonNegativeFloat = TOLERANCE,
) -> Expansion:
    """Expand the convolutions of ``model`` to parallel branches, in place.

    Its function stays the same, unless ``initial_scale`` is given.

    Args:
        model: any module. The checkpoints of a LightningModule know what was expanded.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `ExampleInput`;
            if given, the outputs before and after are compared on it. None to compare nothing.
        form: which branches: `ACB`, `RepVGG`, `Branches`, `DBB`, `OREPA`.
        targets: layers to expand, all convolutions by default: patterns or `Targets`.
        initial_scale: of every branch, see `Reparameterization`; the comparison is made with scales of zero.
        optimizers: each branch joins them behind the weight of its convolution.
        tolerance: of the comparison: largest difference over the largest output.

    Returns:
        What was expanded, and why other convolutions were left alone.

    Raises:
        TargetError: the targets match no layer.
        UnsupportedError: a later method, for instance quantization, has changed one of the layers.
        ParityError: the outputs differ; ``model`` is not changed.

    Example:
        >>> from lightning_light.reparameterization import RepVGG
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> expand_branches(model, torch.randn(1, 3, 8, 8), RepVGG())
        Expansion(layers={'0': [('conv', 1, 1)]}, skipped={'2': 'RepVGG has no branches for a 1x1 kernel'})
        >>> merge_branches(model).layers
        ('0',)
    """
    example = None if example_inputs is None else ExampleInput.of(example_inputs)
    plan = plan_expansion(model, form, as_targets(targets), optimizers=optimizers, example=example)
    if not plan.layers:
        warnings.warn(f"`expand_branches` had no effect: {plan.summary()}.", NoEffectWarning, stacklevel=3)
        return plan
    if example is not None:
        trial = copy_network(model)
        expand_layers(trial, plan.layers)
        check_merged(f"expand_branches({type(model).__name__}, ...)", model, trial, example, tolerance)
    compression_state = attach_if_kept(model)
    entry = expand_layers(model, plan.layers, initial_scale=initial_scale, optimizers=optimizers or ())
    if compression_state is not None:
        compression_state.record(entry)
    return plan


@validated
def merge_branches(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    optimizers: Iterable[Optimizer] = (),
    tolerance: NonNegativeFloat = TOLERANCE,
) -> Merging:
    """Merge the parallel branches of ``model``, in place; its function in evaluation mode stays the same.

    Merged are convolutions that `expand_branches` or `Reparameterization` has expanded, and blocks that merge
    themselves through a method ``fuse``, ``reparameterize`` or ``switch_to_deploy`` (of timm, RepVGG, YOLO). The latter
    are not in the checkpoints of a LightningModule: merge them for deployment, after the last one is written.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `ExampleInput`;
            if given, the outputs before and after are compared on it. None to compare nothing.
        optimizers: they keep the state of what is merged by this package; blocks that merge themselves have new
            parameters.
        tolerance: of the comparison: largest difference over the largest output.

    Raises:
        UnsupportedError: another method has changed a layer inside the branches.
        ParityError: the outputs differ, because the method of a block does something else; ``model`` is not changed.
    """
    error = None
    if example_inputs is not None:
        trial = copy_network(model)
        _merge(trial, ())
        call, example = f"merge_branches({type(model).__name__}, ...)", ExampleInput.of(example_inputs)
        error = check_merged(call, model, trial, example, tolerance)
    merging = _merge(model, optimizers)
    return Merging(merging.layers, merging.blocks, error)


@validated
def merge_checkpoint(cls: type[nn.Module], path: str | Path, out: str | Path, **load_options: Any) -> Merging:
    """Merge the expanded convolutions of a finished checkpoint into a new one.

    The new checkpoint holds weights, hyperparameters, epoch and step; `lightning_light.load_from_checkpoint` opens it.

    Args:
        cls: class of the LightningModule.
        path: the finished checkpoint, with convolutions that `Reparameterization` has expanded.
        out: the new checkpoint.
        load_options: of `load_from_checkpoint`.

    Raises:
        LightningLightError: no layer is expanded; nothing is written.
    """
    lightning_module: Any = cls
    module = load_from_checkpoint(lightning_module, path, **load_options)
    layers = tuple(branched_layers(module))
    if not layers:
        raise LightningLightError(
            f"`merge_checkpoint({str(path)!r})`: expected convolutions that `Reparameterization` has expanded, found "
            "none, and wrote nothing. Blocks that merge themselves are merged in exported files."
        )
    attach(module).record(merge_layers(module, merged_tensors(module)))
    save_converted(module, path, out)
    return Merging(layers, {})


def _merge(model: nn.Module, optimizers: Iterable[Optimizer]) -> Merging:
    layers = tuple(branched_layers(model))
    if layers:
        compression_state = attach_if_kept(model)
        entry = merge_layers(model, merged_tensors(model), optimizers=optimizers)
        if compression_state is not None:
            compression_state.record(entry)
    return Merging(layers, merge_blocks(model))
