"""Options of a search, with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_light.budgets import Budget, Latency, Size, require_reducible
from lightning_light.criteria.output_distance import Distance
from lightning_light.export.exporter import Exporter
from lightning_light.nas.block_choices import BlockChoices
from lightning_light.nas.channel_choices import ChannelChoices
from lightning_light.nas.choices import Choices
from lightning_light.nas.costs import runtime_of
from lightning_light.nas.rank_choices import RankChoices
from lightning_light.quantization import Recipe
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = ["DEFAULT_SPACE", "SearchOptions", "Space", "check_budgets"]

Space = Sequence[Choices | Recipe]
"""Kinds of choices, and at most one recipe: the file is then written in int8."""

DEFAULT_SPACE: Space = (BlockChoices(), ChannelChoices(), RankChoices())


@validated
@dataclass(frozen=True)
class SearchOptions:
    """What `lightning_light.search` and `ArchitectureSearch` have in common.

    Args:
        space: what may be done: `BlockChoices`, `OperatorChoices`, `ChannelChoices`, `RankChoices`, each at most once;
            a recipe beside them, ``Int8()``, if the file is to be int8. None: blocks, channels and ranks with their
            defaults.
        runtime: format and runtime of the file whose bytes `Size` counts; by default that of ``Latency(runtime=...)``;
            without either, the stored tensors count.
        distance: of the outputs: ``"kl"``, the Kullback-Leibler divergence of class probabilities, or ``"mse"``, the
            squared error relative to the variance, for all other outputs.
        class_dim: which dimension counts classes: -1 for ``(N, C)`` and tokens ``(N, T, C)``, 1 for ``(N, C, H, W)``.
        calibration_batches: on which batch-norm statistics are moved, and ranges of activations observed.
        evaluation_batches: other batches, held back, on which outputs are compared.
        evaluations: whole networks that are compared after the exact solutions for the sum of scores.
        seed: of these networks.
        table: path of the file in which the table is kept, entry by entry; an interrupted search continues from it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the space is empty, or has a kind twice.
    """

    space: Space | None = None
    runtime: Exporter | None = None
    distance: Distance = "kl"
    class_dim: int = -1
    calibration_batches: PositiveInt = 4
    evaluation_batches: PositiveInt = 8
    evaluations: NonNegativeInt = 20
    seed: NonNegativeInt = 0
    table: str | Path | None = None

    def __post_init__(self) -> None:
        kinds = [choices.kind for choices in self.choices]
        recipes = len(self.parts) - len(kinds)
        if not kinds or len(set(kinds)) < len(kinds) or recipes > 1:
            raise ValueError(
                f"`space={list(self.parts)}`: expected at least one of `BlockChoices`, `OperatorChoices`, "
                f"`ChannelChoices` and `RankChoices`, each at most once, and at most one recipe, found "
                f"{kinds or 'no choices'}"
                f"{f' and {recipes} recipes' if recipes else ''}. Without choices of structure use `quantize`."
            )

    @property
    def parts(self) -> Space:
        """The space that is searched."""
        return DEFAULT_SPACE if self.space is None else self.space

    @property
    def choices(self) -> list[Choices]:
        """The choices of structure."""
        return [choices for choices in self.parts if isinstance(choices, Choices)]

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the int8 file."""
        return next((recipe for recipe in self.parts if isinstance(recipe, Recipe)), None)

    def file_of(self, budgets: Sequence[Budget]) -> tuple[Exporter | None, Recipe | None]:
        """Return the runtime of the file and the recipe that count for ``budgets``; None where no file is written."""
        runtime = next((found for budget in budgets if (found := runtime_of(budget))), self.runtime)
        measured = any(isinstance(budget, Size) or runtime_of(budget) for budget in budgets)
        return (runtime, self.recipe) if runtime is not None and measured else (None, None)


def check_budgets(call: str, budget: Budget | Sequence[Budget], options: SearchOptions) -> list[Budget]:
    """Return the budgets as a list.

    Raises:
        ValueError: there is none, two limit the same quantity, the quantity is not reduced by the choices, or a runtime
            is missing, or another than that of `Latency`.
    """
    budgets = [budget] if isinstance(budget, Budget) else list(budget)
    for one in budgets:
        require_reducible(call, one, "factors")
    quantities = [one.quantity for one in budgets]
    if not budgets or len(set(quantities)) < len(quantities):
        raise ValueError(
            f"`{call}({budgets!r})`: expected one budget or several of different quantities, found "
            f"{quantities or 'none'}. Give for instance `[MACs(0.5), Size('200 kB')]`."
        )
    runtimes = [runtime_of(one) for one in budgets if isinstance(one, Latency)]
    found = {options.runtime, *runtimes} - {None}
    by_size = options.runtime is None and not any(runtimes) and any(isinstance(one, Size) for one in budgets)
    eager = None in runtimes
    if len(found) > 1 or (options.recipe is not None and (by_size or eager)):
        expected = "one runtime for all files" if len(found) > 1 else "the runtime of the int8 file"
        raise ValueError(
            f"`{call}({budgets!r}, space={list(options.parts)}, runtime={options.runtime!r})`: expected {expected}, "
            f"found {sorted(map(repr, found)) or 'none'}. Write `Latency(..., runtime=ONNX())`, or `runtime=ONNX()` "
            "where only `Size` is limited."
        )
    return budgets
