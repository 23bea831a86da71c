import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_light.formatting import short_names
from lightning_light.measure.history import History
from lightning_light.measure.snapshot import take_snapshot
from lightning_light.monitors.heat_map import colored, heat_map
from lightning_light.report.figures import report_image
from tests.measure.test_comparison import net


def grown(moments: int) -> History:
    before = take_snapshot(net())
    history = History.of(before, ["0", "2", "4"])
    for moment in range(moments):
        now = take_snapshot(net(first=max(1, 16 - moment)))
        history = history.extended(10 * moment, before, now)
    return history


def pixels(fractions: Tensor) -> Tensor:
    """Return the colors of ``fractions``, with a dimension of red, green and blue at the end."""
    return torch.from_numpy(np.array(colored(fractions, len(fractions)))).float()


def test_a_history_has_a_column_for_every_change() -> None:
    before, after = take_snapshot(net()), take_snapshot(net(first=4))
    history = History.of(before, ["0", "2"])
    for step, now in ((0, before), (5, before), (10, after), (15, after)):
        history = history.extended(step, before, now)
    assert (history.steps, history.end) == ((0, 10), 15)
    assert history.channels == ((1.0, 1.0), (0.25, 1.0))
    assert history.weights[1] == (0.25, pytest.approx(888 / 3480, abs=1e-4))
    assert history.totals[1]["params"] == pytest.approx(after.params / before.params, abs=1e-4)


def test_a_history_survives_a_checkpoint(tmp_path: Path) -> None:
    history = grown(moments=5)
    torch.save(history.plain(), tmp_path / "history.pt")
    assert History.from_plain(torch.load(tmp_path / "history.pt", weights_only=True)) == history


def test_a_long_history_stays_short_and_keeps_its_ends() -> None:
    before = take_snapshot(net())
    history = History.of(before, ["0"])
    for step in range(1000):
        row = dataclasses.replace(before.rows[0], sparsity=step / 1000)
        history = history.extended(step, before, dataclasses.replace(before, rows=(row, *before.rows[1:])))
    assert 128 <= len(history.steps) <= 256
    assert (history.steps[0], history.steps[-1], history.end) == (0, 999, 999)
    assert len(history.weights) == len(history.channels) == len(history.totals) == len(history.steps)


@pytest.mark.parametrize("quantity", ["channels", "weights"])
@pytest.mark.parametrize("moments", [1, 2, 12])
def test_a_heat_map_is_an_image_that_pillow_reads_back(quantity: str, moments: int, tmp_path: Path) -> None:
    image = heat_map(grown(moments), quantity)
    assert (image.dtype, image.ndim, image.shape[2]) == (torch.uint8, 3, 3)
    Image.fromarray(image.numpy()).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as read:
        assert read.size == (image.shape[1], image.shape[0])


def test_a_layer_fades_as_its_channels_are_removed() -> None:
    image = heat_map(grown(moments=13)).float()
    row = image[40 + 5]  # the first layer's, below the title
    field = row[(row != 255).any(dim=1)]
    dark, pale = pixels(torch.tensor([[1.0, 4 / 16]]))[0]
    assert (row == dark).all(dim=1).any()
    assert (row == pale).all(dim=1).any()
    assert field.sum() > 0


def test_hundreds_of_layers_still_fit_on_a_page() -> None:
    names = tuple(f"net.blocks.{index}.a_rather_long_name_of_a_projection.inside" for index in range(400))
    ones = (1.0,) * len(names)
    history = History(names, (0,), (ones,), (ones,), ({"params": 1.0},), end=10)
    height, width, _ = heat_map(history).shape
    assert height < 1800
    assert width < 1100


def test_an_empty_history_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"0 layers at 0 steps: expected at least one"):
        heat_map(History())


def test_brightness_falls_with_the_fraction() -> None:
    brightness = pixels(torch.linspace(0, 1, 101).unsqueeze(0))[0] @ torch.tensor([0.299, 0.587, 0.114])
    assert (brightness.diff() < 0).all()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["net.a.conv", "net.b.conv"], ["a.conv", "b.conv"]),
        (["net.a.x", "net.a.y"], ["x", "y"]),
        (["net.fc"], ["fc"]),
        (["model.net.0", "model.net.3"], ["net.0", "net.3"]),
        (["stem", "net.fc"], ["stem", "net.fc"]),
        ([""], ["model"]),
        (["a" * 100], ["a" * 19 + "…" + "a" * 20]),
    ],
)
def test_names_are_shown_without_what_they_share(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_a_report_is_one_picture_of_costs_metrics_and_layers(tmp_path: Path) -> None:
    accuracy = {"test accuracy": [(0, 0.1), (60, 0.8)]}
    report_image(grown(moments=12), tmp_path / "report.png", metrics=accuracy, title="Pruned", dpi=60)
    with Image.open(tmp_path / "report.png") as read:
        assert read.width == 480
    with pytest.raises(ValueError, match=r"`report_image` of 0 layers at 0 steps"):
        report_image(History(), tmp_path / "none.png")
