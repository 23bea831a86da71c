"""Loaded files run on batches of any size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_light.errors import UnsupportedError
from lightning_light.export import ONNX, ExecuTorch, TorchScriptLite, export_model, load_exported
from tests.zoo import Plain, noise

EXPORTERS = [TorchScriptLite(), ONNX(), ExecuTorch(max_batch=2)]


class Both(nn.Module):
    """Two outputs, in a dict whose keys are not in order."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(x), "mean": x.mean((1, 2, 3))}


class Pooled(nn.Module):
    """One output for a whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((0, 2, 3))


@pytest.mark.parametrize("exporter", EXPORTERS, ids=str)
def test_outputs_equal_the_networks_for_any_number_of_samples(exporter: Any, tmp_path: Path) -> None:
    model, path = Plain().eval(), tmp_path / f"model{exporter.suffix}"
    export_model(model, (noise(2, 3, 8, 8),), path, exporter=exporter, latency_runs=1)
    images = noise(7, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(path, exporter=exporter)(images), model(images))


@pytest.mark.parametrize("exporter", EXPORTERS, ids=str)
def test_several_outputs_are_a_list_in_the_order_of_their_keys(exporter: Any, tmp_path: Path) -> None:
    model, path = Both().eval(), tmp_path / f"model{exporter.suffix}"
    export_model(model, (noise(2, 3, 8, 8),), path, exporter=exporter, latency_runs=1)
    images = noise(5, 3, 8, 8)
    with torch.no_grad():
        right = model(images)
    torch.testing.assert_close(load_exported(path, exporter=exporter)(images), [right["mean"], right["scores"]])


def test_a_file_for_one_sample_is_run_sample_by_sample(tmp_path: Path) -> None:
    model, path = nn.Sequential(Plain(), nn.Unflatten(0, (1, 1)), nn.Flatten(0, 1)).eval(), tmp_path / "model.ptl"
    export_model(model, (noise(1, 3, 8, 8),), path, batch="one", latency_runs=1)
    images = noise(3, 3, 8, 8)
    with torch.no_grad():
        right = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(load_exported(path, batch="one")(images), right)


def test_outputs_without_a_batch_dimension_cannot_be_run_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "model.ptl"
    export_model(Pooled(), (noise(1, 3, 8, 8),), path, batch="one", latency_runs=1)
    file = load_exported(path, batch="one")
    assert file(noise(1, 3, 8, 8)).shape == (3,)
    with pytest.raises(UnsupportedError, match=r"model\.ptl', run on 2 samples in parts: expected .* found \[\[3\]\]"):
        file(noise(2, 3, 8, 8))


def test_a_missing_file_and_a_wrong_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`load_exported\('.*model.ptl'\)`: expected a file .* found none"):
        load_exported(tmp_path / "model.ptl")
    with pytest.raises(ValueError, match=r"model.onnx'` with `exporter=TorchScriptLite"):
        load_exported(tmp_path / "model.onnx", exporter=TorchScriptLite())
