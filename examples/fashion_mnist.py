"""Fashion-MNIST for the examples: a part that ships with them, or the full set that you have downloaded.

Xiao et al., 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms".
https://arxiv.org/abs/1708.07747. See data/README.md for its licence. Importing it sets one thread for every example.
"""

import functools
import gzip
from pathlib import Path

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Array = npt.NDArray[np.uint8]

EMBEDDED = Path(__file__).parent / "data" / "fashion_mnist_10k.npz"
MEAN, STANDARD_DEVIATION = 0.286, 0.353  # of the training images
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}

torch.set_num_threads(1)  # small layers gain little from more, and lose much beside other processes


class FashionMNIST(L.LightningDataModule):
    """28 x 28 grey images of ten kinds of clothes; every tenth training image is kept for validation.

    Args:
        data: an ``.npz`` file with ``x_train``, ``y_train``, ``x_test``, ``y_test``, or a folder that holds the four
            official ``.gz`` files; by default the 10,000 training and 10,000 test images that ship with the examples.
        batch_size: training images a step.
    """

    def __init__(self, data: str | None = None, batch_size: int = 100) -> None:
        super().__init__()
        self.data, self.batch_size = data, batch_size

    def setup(self, stage: str) -> None:
        arrays = load(EMBEDDED if self.data is None else Path(self.data))
        images = {part: torch.from_numpy(arrays[f"x_{part}"]).float()[:, None] / 255 for part in ("train", "test")}
        labels = {part: torch.from_numpy(arrays[f"y_{part}"]).long() for part in ("train", "test")}
        images = {part: (pixels - MEAN) / STANDARD_DEVIATION for part, pixels in images.items()}
        held_out = torch.arange(len(labels["train"])) % 10 == 9
        self.train = TensorDataset(images["train"][~held_out], labels["train"][~held_out])
        self.val = TensorDataset(images["train"][held_out], labels["train"][held_out])
        self.test = TensorDataset(images["test"], labels["test"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, 500)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, 500)


@functools.cache  # what ships with the examples takes half a second to unpack
def load(path: Path) -> dict[str, Array]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test`` as bytes, images in the shape ``(n, 28, 28)``."""
    if path.is_dir():
        return {name: _read_idx(path / file) for name, file in IDX_FILES.items()}
    if not path.exists():
        raise FileNotFoundError(
            f"`data={path}`: expected an `.npz` file or a folder with {', '.join(IDX_FILES.values())}, found nothing. "
            "The four are at https://github.com/zalandoresearch/fashion-mnist; without `data` a part of them is used."
        )
    with np.load(path) as archive:
        names = {file.removesuffix("@med"): file for file in archive.files}
        arrays = {name: archive[names[name]] for name in IDX_FILES}
    return {name: _unpack(array) if names[name].endswith("@med") else array for name, array in arrays.items()}


def _read_idx(path: Path) -> Array:
    """The official format: two zero bytes, a type, the number of axes, the axes, the bytes."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _unpack(residuals: Array) -> Array:
    """Images ``(n, 1, h, w)`` stored as what the median edge predictor of LOCO-I did not foresee."""
    count, _, height, width = residuals.shape
    images = np.zeros((height + 1, width + 1, count), np.int16)
    for y, x in np.ndindex(height, width):
        west, north, corner = images[y + 1, x], images[y, x + 1], images[y, x]
        edge = np.clip(west + north - corner, np.minimum(west, north), np.maximum(west, north))
        predicted = west if y == 0 else north if x == 0 else edge
        images[y + 1, x + 1] = (residuals[:, 0, y, x] + predicted) & 255
    return images[1:, 1:].astype(np.uint8).transpose(2, 0, 1).copy()
