"""Tokens and pixels in real runs on real images: a tagger of rows, and a segmentation; some positions do not count."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.distillation import (
    DIST,
    DKD,
    BatchFields,
    ChannelWise,
    FeatureHint,
    KnowledgeDistillation,
    LogitStandardization,
    OutputRegression,
    SoftTargets,
)
from tests.distillation.runs import fitted, weights

IGNORED = -100
IMAGES = Path(__file__).parents[2] / "examples" / "data" / "fashion_mnist_10k.npz"


def images() -> Tensor:
    """The first 400 clothes, in [0, 1]."""
    spec = importlib.util.spec_from_file_location("fashion_mnist", IMAGES.parents[1] / "fashion_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("fashion_mnist", example)
    spec.loader.exec_module(example)
    return torch.from_numpy(np.asarray(example.load(IMAGES)["x_train"][:400])).float() / 255


class Labeller(LightningModule):
    """Trained on labels of positions, some of which do not count; classes are the last dimension, or the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            self.body, self.head = self.parts(width)

    def parts(self, width: int) -> tuple[nn.Module, nn.Module]:
        raise NotImplementedError

    def classes(self, x: Tensor) -> Tensor:
        """Logits, classes second."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.classes(batch["x"]), batch["labels"], ignore_index=IGNORED)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.02)


class Tagger(Labeller):
    """A row of an image is a token: how many of its pixels belong to the piece of clothing, in four classes."""

    def parts(self, width: int) -> tuple[nn.Module, nn.Module]:
        return nn.GRU(28, width, batch_first=True), nn.Linear(width, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(x)[0])

    def classes(self, x: Tensor) -> Tensor:
        return self(x).movedim(2, 1)


class Segmenter(Labeller):
    """Pixels of half resolution: background, dark or light."""

    def parts(self, width: int) -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU()), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def classes(self, x: Tensor) -> Tensor:
        return self(x)


class Named(TensorDataset):
    """Batches as dicts."""

    def __getitem__(self, index: int) -> Any:
        return dict(zip(("x", "labels", "mask"), super().__getitem__(index), strict=True))


def rows() -> Named:
    """Tokens: the last rows of half of the images are padding."""
    x = images()
    labels = torch.bucketize((x > 0.1).sum(2).contiguous(), torch.tensor([1, 12, 20]))
    labels[::2, 20:] = IGNORED
    return Named(x, labels, labels != IGNORED)


def pixels() -> Named:
    """Labels of every second pixel; those at the edges of the image do not count."""
    x = images()[:, None]
    labels = torch.bucketize(x[:, 0, ::2, ::2].contiguous(), torch.tensor([0.05, 0.5]))
    labels[:, [0, -1]] = IGNORED
    return Named(x, labels, labels != IGNORED)


TASKS: dict[str, tuple[type[Labeller], Any, int]] = {"rows": (Tagger, rows, -1), "pixels": (Segmenter, pixels, 1)}


@pytest.fixture(scope="module", params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Any:
    """The class, its data, the dimension of the classes, a trained teacher and a student without one."""
    torch.manual_seed(0)
    body, make, dim = TASKS[request.param]
    data = DataLoader(make(), 20)
    teacher = fitted(body(24), data=data, max_epochs=3)
    return body, data, dim, teacher, fitted(body(5), data=data)


def apart(loss: Any, module: Labeller, teacher: Labeller, data: Any) -> float:
    """What the loss is, at the positions that count."""
    batch = torch.utils.data.default_collate([data.dataset[place] for place in range(200)])
    with torch.no_grad():
        return float(loss(module(batch["x"]), teacher(batch["x"]), labels=batch["labels"], mask=batch["mask"]))


LOSSES: dict[str, Any] = {
    "soft": lambda dim: SoftTargets(class_dim=dim, weight=2.0, temperature=2.0),
    "decoupled": lambda dim: DKD(class_dim=dim, beta=2.0, temperature=2.0),
    "numbers": lambda dim: OutputRegression(weight=0.5) if dim == -1 else ChannelWise(weight=3.0),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_loss_to_the_teacher_decreases(name: str, task: Any) -> None:
    body, data, dim, teacher, alone = task
    loss = LOSSES[name](dim)
    student = fitted(
        body(5), KnowledgeDistillation(teacher, losses=[loss], batch=BatchFields(ignore_index=IGNORED)), data=data
    )
    assert apart(loss, student, teacher, data) < apart(loss, alone, teacher, data)


def test_masked_positions_do_not_change_the_training(task: Any) -> None:
    body, data, dim, teacher, _ = task
    wrong = Astray(teacher, dim)
    found = []
    for network in (teacher, wrong):
        for fields in (BatchFields(ignore_index=IGNORED), BatchFields(mask="mask")):
            losses = [kind(class_dim=dim) for kind in (SoftTargets, LogitStandardization, DKD, DIST)]
            module = fitted(
                body(5), KnowledgeDistillation(network, losses=losses, batch=fields), data=data, max_epochs=1
            )
            found.append(weights(module))
    assert all(torch.equal(found[0], other) for other in found[1:])
    callback = KnowledgeDistillation(wrong, losses=[SoftTargets(class_dim=dim)])
    everywhere = fitted(body(5), callback, data=data, max_epochs=1)
    assert not torch.equal(weights(everywhere), found[0])


class Astray(nn.Module):
    """A teacher with wrong outputs at masked positions: in padded rows, and at the edges of images."""

    def __init__(self, teacher: nn.Module, dim: int) -> None:
        super().__init__()
        self.teacher, self.dim = teacher, dim

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.teacher(x)
        if self.dim == 1:
            outputs[:, 0, [0, -1]] = 50.0
        else:
            outputs[::2, 20:, 0] = 50.0
        return outputs


def test_feature_losses_of_tokens_ignore_the_padding() -> None:
    data, teacher = DataLoader(rows(), 50), Tagger(24)
    hint = FeatureHint(feature_layers={"body": "body"})
    found = []
    for padding in (0.0, 1.0):
        padded = Padded(teacher, padding)
        callback = KnowledgeDistillation(
            padded, losses=[hint], batch=BatchFields(mask="mask", inputs=lambda batch: (batch["x"], batch["mask"]))
        )
        found.append(weights(fitted(Tagger(5), callback, data=data, max_epochs=1)))
    assert torch.equal(*found)


class Padded(nn.Module):
    """Its features have other numbers where there is padding."""

    def __init__(self, teacher: Tagger, padding: float) -> None:
        super().__init__()
        self.teacher, self.padding, self.body = teacher, padding, nn.Identity()

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        features = self.teacher.body(x)[0].masked_fill(~counts[..., None], self.padding)
        return self.teacher.head(self.body(features))
