import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_light.measure import deflated_bytes, file_bytes, tensor_bytes


def test_tensor_bytes_count_what_a_checkpoint_keeps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert tensor_bytes(model) == kept == 4 * (112 + 4 * 4) + 8

    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert tensor_bytes(model) == kept


def test_tied_tensors_count_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[1].weight = model[0].weight
    assert tensor_bytes(model) == 4 * 120


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float64, 8), (torch.int8, 1), (torch.bool, 1)]
)
def test_bytes_of_dtypes(dtype: torch.dtype, width: int) -> None:
    model = nn.Module()
    model.register_buffer("table", torch.ones(10, 3, dtype=dtype).t())
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    assert tensor_bytes(model) == 31 * width
    assert 0 < deflated_bytes(model) < 31 * width + 20


def test_file_bytes_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 23)
    assert file_bytes(tmp_path / "a") == 100
    assert file_bytes(str(tmp_path)) == 123


def test_deflated_bytes_of_a_file(tmp_path: Path) -> None:
    noise, zeros = os.urandom(3_000_000), bytes(3_000_000)
    (tmp_path / "noise").write_bytes(noise)
    (tmp_path / "zeros").write_bytes(zeros)
    assert deflated_bytes(tmp_path / "noise") == len(zlib.compress(noise))
    assert deflated_bytes(tmp_path / "zeros") == len(zlib.compress(zeros)) < 3_100
    assert deflated_bytes(tmp_path) < 3_010_000


def test_zeros_reduce_only_the_deflated_size() -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 200)
    dense = deflated_bytes(model)
    with torch.no_grad():
        model.weight[torch.rand(200, 200) < 0.9] = 0.0
    assert tensor_bytes(model) == 4 * 200 * 201
    assert deflated_bytes(model) < 0.25 * dense


@pytest.mark.parametrize("measure", [file_bytes, deflated_bytes])
def test_a_file_that_is_not_there(measure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a file or a folder"):
        measure(tmp_path / "nothing")
