"""Draw a heat map of what remains of each layer over the steps of a run, with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_light.formatting import human_count, short_names
from lightning_light.measure.history import History
from lightning_light.validation import validated

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["Quantity", "colored", "heat_map"]

Quantity = Literal["channels", "weights"]

# From ColorBrewer's YlGnBu (Brewer, 2002, https://colorbrewer2.org), which is safe for color-blind readers.
_COLORS = ("#ffffd9", "#41b6c4", "#081d58")  # of the fractions 0, 0.5 and 1

_PLOT_WIDTH, _MARGIN = 200, 8  # a card of TensorBoard shows about 300 pixels
_ROW, _MIN_ROW, _MAX_HEIGHT = 22, 3, 1600
_FONT, _TITLE = 15, 16
_LONGEST_NAME = 14
_INK, _FAINT = (34, 34, 34), (120, 120, 120)
_TITLES = {"channels": "Remaining output channels", "weights": "Remaining nonzero weights"}


@validated
def heat_map(history: History, quantity: Quantity = "channels") -> Tensor:
    """Return an image of shape ``(height, width, 3)`` in 8 bits: a row per layer, training steps from left to right.

    Each row ends with the remaining fraction of its layer at the last step; dark is all, pale is none. The text is
    large enough for a small picture.

    Args:
        history: at least one step of at least one layer.
        quantity: what is shown.

    Raises:
        ValueError: the history is empty.

    Example:
        >>> from lightning_light.monitors import History, take_snapshot
        >>> before, after = take_snapshot(nn.Linear(8, 4)), take_snapshot(nn.Linear(8, 2))
        >>> history = History.of(before, [""]).extended(0, before, before).extended(10, before, after)
        >>> heat_map(history).shape[-1]
        3
    """
    from PIL import Image, ImageDraw

    if not history.layers or not history.steps:
        raise ValueError(
            f"`heat_map` of {len(history.layers)} layers at {len(history.steps)} steps: expected at least one of "
            "each. Record a step first: `history.extended(step, before, now)`."
        )
    font, title_font = _font(_FONT), _font(_TITLE)
    row = max(_MIN_ROW, min(_ROW, _MAX_HEIGHT // len(history.layers)))
    labels = short_names(history.layers, _LONGEST_NAME)
    left = _MARGIN + round(max(font.getlength(label) for label in labels)) + 8
    top, bottom = _MARGIN + 2 * _TITLE, row * len(history.layers)
    size = (left + _PLOT_WIDTH + 52 + _MARGIN, top + bottom + 48)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    columns = history.channels if quantity == "channels" else history.weights
    draw.text((_MARGIN, _MARGIN), _TITLES[quantity], fill=_INK, font=title_font)
    picture.paste(colored(_by_pixel(history, columns), bottom), (left, top))
    _draw_rows(draw, labels, columns[-1], (left, top, row), font)
    _draw_axis(draw, history, (left, top + bottom), font)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)


def colored(fractions: Tensor, height: int) -> Image:
    """Draw fractions in [0, 1], shape ``(rows, width)``, as an image of ``height``: pale for 0, dark for 1."""
    from PIL import Image, ImageOps

    gray = Image.fromarray((fractions.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    low, middle, high = _COLORS
    return ImageOps.colorize(gray, low, high, middle).resize((gray.width, height), Image.Resampling.NEAREST)


def _by_pixel(history: History, columns: Sequence[Sequence[float]]) -> Tensor:
    """Return the fractions of each layer per pixel, shape ``(layers, pixels)``: each column as wide as it lasted."""
    steps = torch.tensor(history.steps)
    pixels = torch.linspace(history.steps[0], max(history.end, history.steps[0] + 1), _PLOT_WIDTH)
    index = (torch.searchsorted(steps, pixels, right=True) - 1).clamp(min=0)
    return torch.tensor(columns).T[:, index]


def _draw_rows(
    draw: ImageDraw, labels: Sequence[str], now: Sequence[float], place: tuple[int, int, int], font: _Font
) -> None:
    left, top, row = place
    every = -(-(_FONT + 1) // row)  # label only some rows where rows are low
    if row > 2 * _MIN_ROW:
        for below in range(top + row, top + row * len(labels) + 1, row):
            draw.line((left, below - 1, left + _PLOT_WIDTH - 1, below - 1), fill="white")
    for index in range(0, len(labels), every):
        middle = top + index * row + row // 2
        draw.text((left - 8, middle), labels[index], fill=_INK, font=font, anchor="rm")
        draw.text((left + _PLOT_WIDTH + 8, middle), f"{now[index]:.0%}", fill=_INK, font=font, anchor="lm")


def _draw_axis(draw: ImageDraw, history: History, place: tuple[int, int], font: _Font) -> None:
    left, top = place
    first, last = history.steps[0], max(history.end, history.steps[0] + 1)
    for fraction in (0.0, 0.5, 1.0):
        x = left + round(fraction * (_PLOT_WIDTH - 1))
        draw.line((x, top, x, top + 4), fill=_FAINT)
        draw.text((x, top + 6), f"{human_count(first + fraction * (last - first))}", fill=_INK, font=font, anchor="mt")
    draw.text((left + _PLOT_WIDTH / 2, top + 24), "training step", fill=_INK, font=font, anchor="mt")


def _font(size: int) -> _Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


if TYPE_CHECKING:
    _Font = FreeTypeFont | ImageFont
