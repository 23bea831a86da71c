"""A picture of layers over time, drawn without a plotting library: the darker, the more is left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_light.monitors.history import History

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["Quantity", "colors", "heat_map", "short_names"]

Quantity = Literal["channels", "weights"]

# ColorBrewer's YlGnBu (Brewer, 2002, https://colorbrewer2.org): one hue direction, safe for color-blind readers.
_ANCHORS = torch.tensor(
    [
        [255, 255, 217],
        [237, 248, 177],
        [199, 233, 180],
        [127, 205, 187],
        [65, 182, 196],
        [29, 145, 192],
        [34, 94, 168],
        [37, 52, 148],
        [8, 29, 88],
    ],
    dtype=torch.float32,
)

_PLOT_WIDTH, _MARGIN = 560, 16
_ROW, _SMALLEST_ROW, _MOST_HEIGHT = 20, 3, 1600  # pixels
_FONT, _TITLE = 13, 16
_INK, _FAINT = (34, 34, 34), (120, 120, 120)
_TITLES = {
    "channels": "Output channels left in each layer",
    "weights": "Weights left in each layer (neither cut nor zero)",
}


def heat_map(history: History, quantity: Quantity = "channels") -> Tensor:
    """An image of shape ``(height, width, 3)``, 8 bits: a row a layer, training steps from left to right.

    Each row ends with what is left of its layer now; a scale is at the bottom. Drawn with Pillow, which TensorBoard
    needs for any image.

    Args:
        history: at least one moment of at least one layer.
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
            f"`heat_map` of {len(history.layers)} layers at {len(history.steps)} moments: expected at least one of "
            "each. Look at the model first: `history.extended(step, before, now)`."
        )
    font, title_font = _font(_FONT), _font(_TITLE)
    row = max(_SMALLEST_ROW, min(_ROW, _MOST_HEIGHT // len(history.layers)))
    labels = short_names(history.layers)
    left = _MARGIN + round(max(font.getlength(label) for label in labels)) + 8
    top, bottom = _MARGIN + 2 * _TITLE, row * len(history.layers)
    size = (left + _PLOT_WIDTH + 64 + _MARGIN, top + bottom + 92)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    columns = history.channels if quantity == "channels" else history.weights
    draw.text((left, _MARGIN), _TITLES[quantity], fill=_INK, font=title_font)
    picture.paste(Image.fromarray(_cells(history, columns, row).numpy()), (left, top))
    _draw_rows(draw, labels, columns[-1], (left, top, row), font)
    _draw_axis(draw, history, (left, top + bottom), font)
    _draw_scale(picture, draw, (left, top + bottom + 52), font)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)


def colors(shares: Tensor) -> Tensor:
    """RGB in 8 bits for shares in [0, 1], one more axis at the end: pale for 0, dark for 1.

    Example:
        >>> colors(torch.tensor([0.0, 1.0])).tolist()
        [[255, 255, 217], [8, 29, 88]]
    """
    place = shares.clamp(0, 1) * (len(_ANCHORS) - 1)
    lower = place.floor().long().clamp(max=len(_ANCHORS) - 2)
    weight = (place - lower).unsqueeze(-1)
    return ((1 - weight) * _ANCHORS[lower] + weight * _ANCHORS[lower + 1]).round().to(torch.uint8)


def _cells(history: History, columns: Sequence[Sequence[float]], row: int) -> Tensor:
    """The colored field: each column as wide as it lasted."""
    steps = torch.tensor(history.steps)
    at = torch.linspace(history.steps[0], max(history.end, history.steps[0] + 1), _PLOT_WIDTH)
    index = (torch.searchsorted(steps, at, right=True) - 1).clamp(min=0)
    field = colors(torch.tensor(columns).T[:, index]).repeat_interleave(row, dim=0)
    if row > 2 * _SMALLEST_ROW:
        field[row - 1 :: row] = 255  # a hair of white between layers
    return field.contiguous()


def short_names(layers: Sequence[str], most: int = 40) -> list[str]:
    """Names without the part that all share, long ones without their middle."""
    parents = [layer.split(".")[:-1] for layer in layers]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False)))
    names = [".".join(layer.split(".")[shared:]) or "model" for layer in layers]
    return [name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}" for name in names]


def _draw_rows(
    draw: ImageDraw, labels: Sequence[str], now: Sequence[float], place: tuple[int, int, int], font: _Font
) -> None:
    left, top, row = place
    every = -(-(_FONT + 1) // row)  # where rows are low, only some have their name
    for index in range(0, len(labels), every):
        middle = top + index * row + row // 2
        draw.text((left - 8, middle), labels[index], fill=_INK, font=font, anchor="rm")
        draw.text((left + _PLOT_WIDTH + 8, middle), f"{now[index]:.0%}", fill=_INK, font=font, anchor="lm")


def _draw_axis(draw: ImageDraw, history: History, place: tuple[int, int], font: _Font) -> None:
    left, top = place
    first, last = history.steps[0], max(history.end, history.steps[0] + 1)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + round(share * (_PLOT_WIDTH - 1))
        draw.line((x, top, x, top + 4), fill=_FAINT)
        draw.text((x, top + 6), f"{first + share * (last - first):,.0f}", fill=_FAINT, font=font, anchor="mt")
    draw.text((left + _PLOT_WIDTH / 2, top + 22), "training step", fill=_FAINT, font=font, anchor="mt")


def _draw_scale(picture: object, draw: ImageDraw, place: tuple[int, int], font: _Font) -> None:
    from PIL import Image

    assert isinstance(picture, Image.Image)
    left, top = place
    width = _PLOT_WIDTH // 3
    bar = colors(torch.linspace(0, 1, width)).expand(10, width, 3).contiguous()
    picture.paste(Image.fromarray(bar.numpy()), (left, top))
    draw.rectangle((left, top, left + width - 1, top + 9), outline=_FAINT)
    for share, text in ((0.0, "0%"), (0.5, "50%"), (1.0, "100% left")):
        draw.text((left + share * width, top + 14), text, fill=_FAINT, font=font, anchor="mt")


def _font(size: int) -> _Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


if TYPE_CHECKING:
    _Font = FreeTypeFont | ImageFont
