"""Per-layer quantization sensitivity, and an allocation of bits to layers by it, within a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_light.budgets import Size
from lightning_light.calibration import calls_from, explained, finite_outputs
from lightning_light.criteria.output_distance import Distance, output_distance
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular
from lightning_light.integer_program import choose_items
from lightning_light.isolation import isolated
from lightning_light.measure.cost import count_cost
from lightning_light.measure.metrics import local_copy
from lightning_light.nested import map_tensors, tensors_in
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.plan import QuantizationPlan, plan_quantization
from lightning_light.quantization.recipes import Bits, Engine, IntN, MixedPrecision
from lightning_light.quantization.trace import trace_ops
from lightning_light.validation import OpenFraction, validated

__all__ = ["BitBudget", "Sensitivity", "measure_sensitivity"]


@dataclass(frozen=True)
class Sensitivity(Tabular):
    """How much the outputs of a network change when the weight of one layer is quantized.

    Attributes:
        distances: layer -> bits of its weight -> distance; in the order in which layers are called.
        weights: layer -> how many weights it has.
        macs: layer -> multiply-accumulates for the first calibration batch.

    Example:
        >>> scan = Sensitivity({"stem": {4: 0.5, 8: 0.01}, "head": {4: 0.2, 8: 0.02}}, {"stem": 27, "head": 90}, {})
        >>> scan.most_sensitive(1)
        ['stem']
        >>> print(scan)
          layer  weights  4 bits  8 bits
         ────────────────────────────────
          stem        27     0.5    0.01
          head        90     0.2    0.02
    """

    distances: Mapping[str, Mapping[int, float]]
    weights: Mapping[str, int]
    macs: Mapping[str, int]

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that were measured, fewest first."""
        return tuple(sorted({bits for found in self.distances.values() for bits in found}))

    def most_sensitive(self, count: int, bits: int | None = None) -> list[str]:
        """The layers to exclude: ``Int8(exclude=scan.most_sensitive(2))``.

        Args:
            count: how many.
            bits: of their weights; the fewest that were measured by default.

        Raises:
            ValueError: ``bits`` were not measured.
        """
        at = self.widths[0] if bits is None else bits
        if at not in self.widths:
            raise ValueError(
                f"`most_sensitive({count}, bits={bits})`: expected bits that were measured, {self.widths}."
            )
        return sorted(self.distances, key=lambda layer: -self.distances[layer][at])[:count]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer and width, for a table or a plot: layer, bits, distance, weights, macs."""
        names = ("layer", "bits", "distance", "weights", "macs")
        found = [(layer, bits, one) for layer, row in self.distances.items() for bits, one in row.items()]
        return [dict(zip(names, (*row, self.weights[row[0]], self.macs.get(row[0], 0)), strict=True)) for row in found]

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer, one column per width."""
        lines = [
            (layer, str(self.weights[layer]), *(f"{found[bits]:.3g}" for bits in self.widths))
            for layer, found in self.distances.items()
        ]
        return [DataTable(("layer", "weights", *(f"{bits} bits" for bits in self.widths)), tuple(lines))]


@torch.no_grad()
@validated
def measure_sensitivity(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    bits: Sequence[Bits] = (2, 3, 4, 6, 8),
    distance: Distance = "kl",
    metric: Metric | None = None,
    engine: Engine = "qnnpack",
    progress_bar: bool = True,
) -> Sensitivity:
    """Quantize the weight of one layer at a time, and measure the change of the outputs on the calibration batches.

    The distance of ZeroQ: the mean of ``KL(softmax(y) || softmax(y_quantized))``, where the classes are the second
    dimension of images, else the last one. It shows which layers to exclude, and `BitBudget` allocates bits by
    it.

    Cai et al., 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", section 3.2. https://arxiv.org/abs/2001.00281

    Args:
        model: trained; it stays as it is.
        example_inputs: as for `quantize`.
        data: as for `quantize`; a few hundred images.
        bits: widths to measure.
        distance: ``"kl"`` for class scores; ``"mse"`` for any other output: the squared error relative to the variance.
        metric: of torchmetrics, updated with (outputs, target); its absolute change is then the distance. ``data`` has
            to be batches ``(inputs, target)``.
        engine: for whose kernels weights of eight bits are quantized.
        progress_bar: whether a terminal shows the progress.

    Raises:
        ValueError: no calibration data, or such as the model cannot be called with; outputs that are not finite; no
            layer to quantize, a width that no recipe has, or outputs that are no class
            scores although ``distance`` takes them for that; ``metric`` without targets.

    Example:
        >>> from lightning_light.quantization import Int8, measure_sensitivity
        >>> scan = measure_sensitivity(model, torch.randn(4, 3, 8, 8), bits=(4, 8))
        >>> Int8(exclude=scan.most_sensitive(1))
        Int8(exclude=['0'])
    """
    data, targets = _with_targets(data, metric)
    inputs = list(calls_from("measure_sensitivity", model, example_inputs, data))
    with explained("measure_sensitivity", model, inputs[0]):
        nodes = trace_ops(model, inputs[0].args, inputs[0].kwargs).nodes
    plans = {width: plan_quantization(model, nodes, IntN(width, None, engine=engine)) for width in bits}
    weights: dict[str, set[Tensor]] = {}
    for node in nodes:
        if node.id.module and any(node.id in plan.layers for plan in plans.values()):
            weights.setdefault(node.id.module, set()).add(node.named["weight"])
    if not weights:
        raise ValueError(
            f"`measure_sensitivity({type(model).__name__}, ..., bits={tuple(bits)})`: expected layers to quantize and "
            "widths, found 0 convolution or linear layers with a width."
        )
    found: dict[str, dict[int, float]] = {layer: {} for layer in weights}
    with isolated(model):
        before = finite_outputs("`measure_sensitivity(...)`", model, inputs)
        if metric is None:
            change = _change_of_outputs(model, inputs, before, distance)
        else:
            change = _change_of_metric(model, inputs, targets, metric)
        for layer in with_progress_bar(weights, len(weights), "Sensitivity", shown=progress_bar):
            for width, plan in plans.items():
                calls = {op: site for op, site in plan.layers.items() if op.module == layer}
                quantizer = FakeQuantizer(QuantizationPlan(layers=calls), engine)
                quantizer.enabled = True
                with quantizer.watching(model):
                    found[layer][width] = change()
    cost = count_cost(model, inputs[0].args, inputs[0].kwargs).macs_by_module
    sizes = {layer: sum(one.numel() for one in tensors) for layer, tensors in weights.items()}
    return Sensitivity(found, sizes, {layer: cost.get(layer, 0) for layer in weights})


def _change_of_outputs(
    model: nn.Module, inputs: Sequence[ExampleInput], before: Sequence[Any], distance: Distance
) -> Callable[[], float]:
    """The mean distance of the outputs from those ``before``."""
    plain = _precise(before)
    if distance == "kl" and (shapes := [tuple(one.shape) for one in plain if one.shape[_class_dim(one)] < 2]):
        raise ValueError(
            "`measure_sensitivity(..., distance='kl')`: expected scores of classes, found an output of shape "
            f"{shapes[0]}. Write `distance='mse'`."
        )

    def change() -> float:
        pairs = zip(_precise([model(*call.args, **call.kwargs) for call in inputs]), plain, strict=True)
        return float(torch.stack([output_distance(*pair, distance, _class_dim(pair[1])) for pair in pairs]).mean())

    return change


def _precise(outputs: Sequence[Any]) -> list[Tensor]:
    return [leaf.double() for leaf in tensors_in(outputs) if leaf.is_floating_point()]


def _class_dim(output: Tensor) -> int:
    return 1 if output.dim() > 3 else -1


def _change_of_metric(
    model: nn.Module, inputs: Sequence[ExampleInput], targets: Sequence[Any], metric: Metric
) -> Callable[[], float]:
    """The absolute change of ``metric`` over all batches, in copies of it."""

    def value() -> float:
        copied: Any = local_copy(metric)
        for call, target in zip(inputs, targets, strict=True):
            outputs = model(*call.args, **call.kwargs)
            device = next(tensors_in(outputs)).device
            copied.to(device).update(outputs, map_tensors(lambda tensor: tensor.to(device), target))  # noqa: B023
        return float(copied.compute())

    before = value()
    return lambda: abs(value() - before)


def _with_targets(data: Iterable[Any] | None, metric: Metric | None) -> tuple[Iterable[Any] | None, list[Any]]:
    """Return the batches and, for a metric, their targets."""
    if metric is None:
        return data, []
    batches = list(data or ())
    if not batches or not all(isinstance(batch, tuple | list) and len(batch) > 1 for batch in batches):
        kinds = sorted({type(batch).__name__ for batch in batches})
        raise ValueError(
            f"`measure_sensitivity(..., metric={type(metric).__name__}())`: expected `data`, batches "
            f"`(inputs, target)`, found {', '.join(kinds) or 'no batch'}. Pass `data=val_dataloader`."
        )
    return batches, [batch[1] for batch in batches]


@validated
@dataclass(frozen=True)
class BitBudget:
    """Allocate bits to each layer, within a budget for the whole network.

    Of all ways to give each layer one of the widths that keep the budget, it takes the one with the smallest sum of
    measured distances, by dynamic programming over the Pareto front of cost and distance. Layers are assumed to change
    the outputs independently of each other, as HAWQ and ZeroQ do.

    Dong et al., 2020, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks".
    https://arxiv.org/abs/1911.03852
    Cai et al., 2020, "ZeroQ: A Novel Zero Shot Quantization Framework". https://arxiv.org/abs/2001.00281

    Example:
        >>> from lightning_light.quantization import Sensitivity
        >>> scan = Sensitivity({"stem": {4: 0.5, 8: 0.01}, "head": {4: 0.2, 8: 0.02}}, {"stem": 90, "head": 90}, {})
        >>> BitBudget(size=140).solve(scan)
        {'stem': 8, 'head': 4}

    Args:
        size: bytes of the weights of all layers with one, packed: ``"40 kB"``, or an int. Biases and normalizations
            are not counted: they are not quantized.
        bops: instead of it, the remaining fraction of the bit operations (MACs times bits of the weight times bits of
            the activation), of those with the widest width in all layers; in (0, 1].
        widths: that a layer may have; all that were measured by default.

    Raises:
        ValueError: neither or both of ``size`` and ``bops``, or one out of range; widths that no recipe has.
    """

    size: int | str | None = None
    bops: OpenFraction | None = None
    widths: Sequence[Bits] | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bops is None):
            raise ValueError(
                f"`{self!r}`: expected one of `size` and `bops`, found {'none' if self.size is None else 'both'}. "
                "Write for instance `BitBudget(size='40 kB')`."
            )
        if self.size is not None:
            Size(self.size)

    def solve(self, scan: Sensitivity) -> dict[str, int]:
        """Return layer -> bits.

        Args:
            scan: of the network, with all ``widths``.

        Raises:
            ValueError: a width was not measured.
            BudgetError: even the smallest width in all layers is too much.
        """
        widths = sorted(scan.widths if self.widths is None else self.widths)
        if unknown := set(widths) - set(scan.widths):
            raise ValueError(
                f"`{self!r}`: expected widths that were measured, {scan.widths}, found {sorted(unknown)} besides. "
                f"Measure them: `measure_sensitivity(..., bits={tuple(widths)})`."
            )
        units = scan.weights if self.bops is None else scan.macs
        least, most = (sum(units[layer] for layer in scan.distances) * widths[end] for end in (0, -1))
        if self.size is not None:
            limit, remains = 8.0 * Size(self.size).bytes, f"the weights still take {-(-least // 8)} bytes"
        else:
            limit, remains = (self.bops or 0.0) * most, f"{least / max(most, 1):.3f} of the bit operations remain"
        if least > limit:
            raise BudgetError(f"`{self!r}`: with {widths[0]} bits in every layer {remains}.")
        fewest, losses = widths[0], scan.distances
        items = [(layer, width) for layer in losses for width in widths[1:]]  # in place of the fewest bits
        found = choose_items(
            [losses[layer][width] - losses[layer][fewest] for layer, width in items],
            [[units[layer] * (width - fewest) for layer, width in items]],
            [limit - least],
            exclusive=[{place for place, item in enumerate(items) if item[0] == layer} for layer in losses],
        )
        assert found is not None  # the fewest bits are within the limit
        return dict.fromkeys(losses, fewest) | dict(items[place] for place in found)

    def recipe(self, scan: Sensitivity, base: IntN = IntN()) -> MixedPrecision:
        """Return ``base`` with the bits that `solve` allocates to the weight of each layer.

        Args:
            scan: of the network.
            base: determines the rest: bits of activations, observer, engine.

        Raises:
            ValueError: as `solve`.
            BudgetError: as `solve`.
        """
        plain = replace(base, exclude=None)
        solved = self.solve(scan)
        inner_first = sorted(solved, key=lambda layer: -layer.count("."))  # a pattern names what is inside, too
        layers = {f"re:{re.escape(layer)}": replace(plain, weights=solved[layer]) for layer in inner_first}
        return MixedPrecision(layers, default=plain, exclude=base.exclude)
