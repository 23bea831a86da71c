"""Online distillation: deeper exits, and two networks that teach each other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.budgets import Channels
from lightning_light.distillation import (
    AttentionTransfer,
    FeatureHint,
    KnowledgeDistillation,
    OnlineTeacher,
    SoftTargets,
    TeacherCache,
)
from lightning_light.errors import TargetError
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.distillation.runs import TEMPERATURE, WEIGHT, Net, Plain, fitted, weights

SOFT = SoftTargets(weight=WEIGHT, temperature=TEMPERATURE)


def by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.float(), teacher.detach().float()
    p, q = F.log_softmax(s / TEMPERATURE, 1), F.softmax(t / TEMPERATURE, 1)
    return WEIGHT * (F.kl_div(p, q, reduction="batchmean") * TEMPERATURE * TEMPERATURE)


class Trained(Plain):
    """Common steps; with ``teaching`` the distillation is written by hand in ``training_step``."""

    def __init__(self, teaching: bool = False, manual: bool = False) -> None:
        super().__init__(manual=manual)
        self.teaching = teaching

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def taught(self, first: Tensor, second: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.parts(batch)
        loss = F.cross_entropy(first, batch[1]) + F.cross_entropy(second, batch[1])
        if self.teaching:
            loss = loss + self.taught(first, second)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class TwoExits(Trained):
    """An early exit that learns from the last."""

    def __init__(self, teaching: bool = False, manual: bool = False) -> None:
        super().__init__(teaching, manual)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.exit = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.net.bn1(self.net.conv1(x)))
        return {"early": self.exit(x.mean((2, 3))), "last": self.net.fc(F.relu(self.net.conv2(x)).mean((2, 3)))}

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        outputs = self(batch[0])
        return outputs["early"], outputs["last"]

    def taught(self, first: Tensor, second: Tensor) -> Tensor:
        return by_hand(first, second)


class Pair(Trained):
    """Two networks that learn from each other."""

    def __init__(self, teaching: bool = False, manual: bool = False) -> None:
        super().__init__(teaching, manual)
        self.second = Net(4, seed=3)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), self.second(batch[0])

    def taught(self, first: Tensor, second: Tensor) -> Tensor:
        return by_hand(first, second) + by_hand(second, first)


def exits() -> list[Any]:
    return [KnowledgeDistillation(OnlineTeacher(), losses=[SOFT], output="early", teacher_output="last")]


def mutual() -> list[Any]:
    ways = (("net", "second"), ("second", "net"))
    return [KnowledgeDistillation(OnlineTeacher(b), losses=[SOFT], student=a) for a, b in ways]


HOW: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "accumulation": (False, {"accumulate_grad_batches": 4}),
    "bf16": (False, {"precision": "bf16-mixed"}),
    "manual": (True, {}),
}


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize(("body", "make"), [(TwoExits, exits), (Pair, mutual)])
def test_equals_hand_written_distillation(body: Any, make: Any, how: str) -> None:
    manual, options = HOW[how]
    expected = fitted(body(teaching=True, manual=manual), **options)
    found = fitted(body(manual=manual), *make(), **options)
    assert torch.equal(weights(expected), weights(found))
    assert not torch.equal(weights(fitted(body(manual=manual), **options)), weights(found))


def test_the_teacher_is_trained_and_hooks_are_removed() -> None:
    module = fitted(Pair(), *mutual())
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())


def test_projectors_between_two_layers_are_cut_with_both() -> None:
    hint = KnowledgeDistillation(OnlineTeacher(), losses=[FeatureHint(feature_layers={"net.bn1": "net.conv2"})])
    pruned = fitted(Plain(), hint, StructuredPruning(Channels(0.5), schedule=OneShot(at=0.5)))
    (kept,) = hint.state(pruned)["projectors"].values()
    assert kept["weight"].shape[:2] == (pruned.net.conv2.out_channels, pruned.net.conv1.out_channels)
    assert pruned.net.conv2.out_channels < 12


class Silent(Pair):
    """Never asks its second network."""

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), self.net(batch[0])


def live(path: str | None, *losses: Any, module: Any = None, **options: Any) -> Any:
    callback = KnowledgeDistillation(OnlineTeacher(path), losses=list(losses) or None, **options)
    return fitted(module or Pair(), callback)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: live(None), ValueError, "would be compared with itself"),
    (lambda: live("secnd", student="net"), TargetError, r"`OnlineTeacher\('secnd'\)`.*Nearest: 'second"),
    (lambda: live("second", student="nett"), TargetError, r"`KnowledgeDistillation\(student='nett'\)`.*Nearest: 'net"),
    (lambda: live("second", student="net", module=Silent()), ValueError, "expected `training_step` to call `second`"),
    (
        lambda: live("second", cache=TeacherCache()),
        ValueError,
        r"does not change, found `OnlineTeacher\(path='second'\)`",
    ),
    (
        lambda: live("second", AttentionTransfer(feature_layers={"conv1": "conv9"}), student="net"),
        TargetError,
        "Nearest: 'conv",
    ),
]


@pytest.mark.parametrize(("make", "kind", "sentence"), REFUSED, ids=[sentence[:30] for _, _, sentence in REFUSED])
def test_is_refused(make: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        make()
