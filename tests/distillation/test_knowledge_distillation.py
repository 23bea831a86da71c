"""The callback with real Trainers: teachers of every kind, feature_layers, caches, surgery, refusals."""

import csv
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_light.budgets import Channels
from lightning_light.distillation import (
    AttentionTransfer,
    BatchFields,
    CheckpointTeacher,
    FeatureHint,
    KnowledgeDistillation,
    OutputRegression,
    SelfTeacher,
    SoftTargets,
    TeacherCache,
)
from lightning_light.distillation.distiller import gradient_factors
from lightning_light.errors import NoEffectWarning, TargetError
from lightning_light.measure.metrics import Top1Agreement
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import state_of
from tests.contract.runs import checkpoints
from tests.distillation.runs import Net, Plain, fitted, loader, mentor, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def distilled(*losses: Any, module: Any = None, data: Any = None, **arguments: Any) -> Any:
    """A module fitted with `mentor` as the teacher, unless the arguments name another."""
    teacher = arguments.pop("teacher", mentor)
    callback = KnowledgeDistillation(teacher, losses=list(losses) or None, **arguments)
    return fitted(module or Plain(), callback, data=data)


class Twin(Plain):
    """A teacher with the student's paths, and wider."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mentor()


# Teachers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript leaves, but is read
def test_all_sources_of_one_teacher_are_equivalent(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(mentor().eval(), torch.zeros(4, 3, 8, 8)), tmp_path / "teacher.pt")
    program = torch.export.export(mentor().eval(), (torch.zeros(4, 3, 8, 8),))
    torch.export.save(program, tmp_path / "teacher.pt2")
    run = trainer(max_epochs=0)
    run.fit(Twin(), loader())
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    checkpoint = CheckpointTeacher(f"{__name__}.Twin", str(tmp_path / "teacher.ckpt"))
    found = [
        weights(distilled(teacher=teacher))
        for teacher in (mentor(), mentor, checkpoint, str(tmp_path / "teacher.pt"), str(tmp_path / "teacher.pt2"))
    ]
    for other in found[1:3]:
        assert torch.equal(found[0], other)
    for other in found[3:]:
        torch.testing.assert_close(found[0], other)


def test_building_a_teacher_does_not_change_the_random_state_of_the_run() -> None:
    def drawing() -> nn.Module:
        torch.randn(3)
        return mentor()

    ends = []
    for teacher in (mentor, drawing):
        torch.manual_seed(0)
        distilled(teacher=teacher)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


def test_a_teacher_is_not_changed() -> None:
    teacher = mentor()
    teacher.conv1.eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distilled(teacher=teacher)
    assert [teacher.training, teacher.conv1.training, teacher.fc.training] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_no_checkpoint_has_the_teacher(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(mentor, losses=[SoftTargets()])
    fitted(Plain(), callback, *checkpoints(tmp_path))
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Plain().state_dict())
    assert checkpoint["lightning_light"]["state"]["distillation"]["used"] is True
    assert (tmp_path / "epoch=1.ckpt").stat().st_size < 60_000
    Plain.load_from_checkpoint(tmp_path / "epoch=1.ckpt")


def test_several_teachers_by_weight() -> None:
    both = distilled(SoftTargets(), teacher=[mentor, Net(4, seed=9)], teacher_weights=[1.0, 0.0])
    assert torch.equal(weights(both), weights(distilled(SoftTargets())))


def test_two_teachers_with_and_without_cache_equal_hand_written_distillation() -> None:
    class Two(Plain):
        def extra(self, student: Tensor, batch: Any) -> Tensor:
            with torch.no_grad():
                outputs = [teacher.eval()(batch[0]) for teacher in (mentor(), Net(4, seed=9))]
            return 0.7 * SoftTargets()(student, outputs[0]) + 0.3 * SoftTargets()(student, outputs[1])

    by_hand = weights(fitted(Two()))
    given: dict[str, Any] = {"teacher": [mentor, Net(4, seed=9)], "teacher_weights": [0.7, 0.3]}
    assert torch.equal(by_hand, weights(distilled(**given)))
    assert torch.equal(by_hand, weights(distilled(**given, cache=TeacherCache())))


def test_a_factory_is_called_when_a_fit_begins_and_for_no_other_command() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    calls: list[int] = []
    module, run = Validated(), trainer(KnowledgeDistillation(lambda: calls.append(1) or mentor()))
    run.validate(module, loader())
    assert not calls
    run.fit(module, loader(), loader())
    assert calls == [1]


def test_the_moving_average_follows_the_formula() -> None:
    live: list[Tensor] = []
    averages: list[Tensor] = []

    class Look(KnowledgeDistillation):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            live.append(weights(pl_module).clone())
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert self.averaged_model is not None
            averages.append(weights(self.averaged_model).clone())

    fitted(Plain(), Look(teacher=SelfTeacher(decay=0.9)))
    assert len(averages) == 16
    assert torch.equal(averages[0], live[0])
    for before, now, weight in zip(averages, averages[1:], live[1:], strict=False):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * weight)


# What is compared


def test_the_module_called_by_training_step_is_found() -> None:
    class CallsInside(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not called")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    found = distilled(module=CallsInside())
    assert torch.equal(weights(found), weights(distilled()))
    assert torch.equal(weights(distilled(module=CallsInside(), student="net")), weights(found))
    fitted(CallsInside(), KnowledgeDistillation("self"))  # the teacher is the same part of the copy


def test_outputs_and_inputs_are_selected() -> None:
    class Detector(Plain):
        def forward(self, image: Tensor, *, scale: float) -> dict[str, Any]:
            return {"logits": self.net(image * scale), "boxes": [1]}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0], scale=1.0)["logits"], batch[1])

    found = distilled(
        module=Detector(),
        output="logits",
        teacher_output=lambda out: out,
        batch=BatchFields(inputs=lambda batch: batch[0]),
    )
    assert torch.equal(weights(found), weights(distilled()))


def test_feature_layers_by_glob_by_pair_and_by_resolution(caplog: pytest.LogCaptureFixture) -> None:
    hint = FeatureHint(feature_layers={"net.conv[12]": "conv[12]"})
    found = distilled(hint)
    pairs = state_of(found).state["distillation"]["feature_layers"]["0"]
    assert pairs == [["net.conv1", "conv1"], ["net.conv2", "conv2"]]
    with caplog.at_level(logging.INFO):
        matched = distilled(AttentionTransfer(feature_layers="auto"), student="net")
    assert "feature_layers matched by resolution: {'0': [['bn1', 'bn1'], ['conv2', 'conv2']]}" in caplog.text
    pairs = state_of(matched).state["distillation"]["feature_layers"]["0"]
    assert pairs == [["bn1", "bn1"], ["conv2", "conv2"]]
    named = distilled(AttentionTransfer(feature_layers=["bn1", "conv2"]), student="net")
    assert torch.equal(weights(matched), weights(named))


def test_projectors_are_trained_and_are_not_in_the_state_dict() -> None:
    run = trainer(KnowledgeDistillation(Twin, losses=[FeatureHint(feature_layers="net.conv1")]))
    module = Plain()
    run.fit(module, loader())
    (kept,) = state_of(module).state["distillation"]["projectors"].values()
    (group,) = run.optimizers[0].param_groups
    assert kept["weight"].shape == (12, 6, 1, 1)
    assert torch.equal(group["params"][-1], kept["weight"])
    assert run.optimizers[0].state[group["params"][-1]]["step"] == 16
    assert len(module.state_dict()) == len(Plain().state_dict())


def test_projectors_are_cut_with_the_channels_of_the_student() -> None:
    seen: list[Tensor] = []

    class Look(KnowledgeDistillation):
        def on_surgery(self, trainer: Any, pl_module: Any, kept: Any) -> None:
            (state,) = self.state(pl_module)["projectors"].values()
            before, parameter = state["weight"].clone(), trainer.optimizers[0].param_groups[0]["params"][-1]
            moment = trainer.optimizers[0].state[parameter]["exp_avg"].clone()
            super().on_surgery(trainer, pl_module, kept)
            positions = kept["net.conv1.weight"][0]
            seen.append(positions)
            (state,) = self.state(pl_module)["projectors"].values()
            assert torch.equal(state["weight"], before[:, positions])
            assert trainer.optimizers[0].param_groups[0]["params"][-1] is parameter
            assert torch.equal(trainer.optimizers[0].state[parameter]["exp_avg"], moment[:, positions])

    distillation = Look(teacher=Twin, losses=[FeatureHint(feature_layers="net.bn1")])
    pruning = StructuredPruning(Channels(0.5), schedule=OneShot(at=0.5))
    module = fitted(Plain(), distillation, pruning)
    assert module.net.conv1.out_channels == len(seen[0]) < 6


def test_balancing_scales_the_losses() -> None:
    found = distilled(SoftTargets(weight=1000.0), balance_every_n_steps=4)
    factor = state_of(found).state["distillation"]["factors"]["soft_targets"]
    assert factor > 0
    scaled = distilled(SoftTargets(temperature=8.0), balance_every_n_steps=4)
    assert state_of(scaled).state["distillation"]["factors"]["soft_targets"] != factor


def test_balancing_factors_equalize_gradient_norms() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    task, terms = 3.0 * weight[0], [weight.sum() * 0.0, 5.0 * weight[1], (weight * torch.tensor([6.0, 8.0])).sum()]
    found = gradient_factors(task, terms, [weight], lambda mean: mean)
    assert found.tolist() == pytest.approx([1.0, 3.0 / 5.0, 3.0 / 10.0])


def test_the_teacher_is_called_only_while_a_loss_is_scheduled() -> None:
    calls: list[int] = []
    teacher = mentor()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    late = distilled(SoftTargets(schedule=OneShot(at=0.75)), teacher=teacher)
    assert len(calls) == 4
    assert not torch.equal(weights(late), weights(distilled(SoftTargets())))
    assert not torch.equal(weights(late), weights(fitted(Plain())))


def test_stop_ends_distillation_and_warns_if_it_never_started() -> None:
    calls: list[int] = []
    teacher = mentor()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    distilled(teacher=teacher, stop=1)
    assert len(calls) == 8
    with pytest.warns(NoEffectWarning, match="KnowledgeDistillation"):
        distilled(stop=0.0)


def test_losses_and_agreement_are_logged(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(mentor, losses=[SoftTargets(), SoftTargets(temperature=2.0)])
    logger = CSVLogger(tmp_path)
    fitted(Plain(), callback, logger=logger, log_every_n_steps=4)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = {f"distillation/{name}" for name in ("task_loss", "soft_targets_0", "soft_targets_1", "agreement")}
    assert columns <= set(lines[0].split(","))
    assert len(lines) == 1 + 4


def test_agreement_is_logged_with_feature_losses_alone(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    hint = KnowledgeDistillation(Twin, losses=[FeatureHint(feature_layers="net.conv1")])
    fitted(Plain(), hint, logger=logger, log_every_n_steps=4)
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"distillation/feature_hint", "distillation/agreement"} <= set(columns)


def test_two_callbacks_patch_one_step_and_undo_it() -> None:
    module = Plain()
    callbacks = [KnowledgeDistillation(mentor, losses=[SoftTargets(weight=0.5)]) for _ in range(2)]
    fitted(module, *callbacks)
    assert "training_step" not in vars(module)
    assert set(state_of(module).state) >= {"distillation", "distillation#2"}
    torch.testing.assert_close(weights(module), weights(distilled(SoftTargets(weight=1.0))))


def logged(folder: Path, **arguments: Any) -> list[dict[str, str]]:
    """The rows of curves of a run with `mentor` as the teacher."""
    logger = CSVLogger(folder)
    fitted(Plain(), KnowledgeDistillation(mentor, **arguments), logger=logger, log_every_n_steps=4)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_given_metrics_compare_the_outputs_of_student_and_teacher(tmp_path: Path) -> None:
    metrics = MetricCollection({"error": MeanSquaredError(), "agreement": Top1Agreement()})
    rows = logged(tmp_path / "given", metrics=metrics)
    defaults = logged(tmp_path / "default")
    assert [row["distillation/agreement"] for row in rows] == [row["distillation/agreement"] for row in defaults]
    assert all(float(row["distillation/error"]) > 0 for row in rows)
    assert not any(metric.update_called for metric in metrics.values())


def test_regression_has_no_agreement_by_default(tmp_path: Path) -> None:
    names = logged(tmp_path, losses=OutputRegression())[0].keys()
    assert "distillation/output_regression" in names
    assert "distillation/agreement" not in names


def test_one_loss_may_be_given_without_a_list() -> None:
    found = weights(fitted(Plain(), KnowledgeDistillation(mentor, losses=SoftTargets(temperature=2.0))))
    assert torch.equal(found, weights(distilled(SoftTargets(temperature=2.0))))


def test_the_teacher_has_no_default() -> None:
    with pytest.raises(TypeError, match=r"`KnowledgeDistillation\(...\)`: missing a required argument: 'teacher'"):
        KnowledgeDistillation()  # type: ignore[call-arg]


# The cache


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("index", [None, 2])
def test_with_a_cache_the_teacher_is_called_in_the_first_epoch_only(where: str, index: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    teacher = mentor()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    cache = TeacherCache("memory" if where == "memory" else str(tmp_path / "outputs"), sample_index=index)
    found = distilled(teacher=teacher, cache=cache)
    assert len(calls) == 8
    assert torch.equal(weights(found), weights(distilled()))
    if where == "files":
        assert torch.equal(weights(distilled(teacher=teacher, cache=cache)), weights(found))
        assert len(calls) == 8
        with pytest.raises(ValueError, match="expected outputs of this teacher"):
            distilled(teacher=Net(3, seed=4), cache=cache)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_resumes_with_a_half_filled_cache(where: str, tmp_path: Path) -> None:
    cache = TeacherCache("memory" if where == "memory" else str(tmp_path / "outputs"), half_precision=True)

    def callback() -> KnowledgeDistillation:
        return KnowledgeDistillation(mentor, cache=cache)

    whole = fitted(Plain(), callback(), *checkpoints(tmp_path))
    for file in tmp_path.glob("outputs.*"):
        file.unlink()
    fitted(Plain(), callback(), max_steps=3)
    again = fitted(Plain(), callback(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(weights(whole), weights(again))


def test_a_cache_refuses_augmented_views_unless_they_are_fixed() -> None:
    class Augmented:
        def __init__(self) -> None:
            self.dataset = loader().dataset
            self.epoch = 0

        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Any:
            self.epoch += 1
            for images, labels, numbers in loader():
                yield images + self.epoch, labels, numbers

    with pytest.raises(ValueError, match=r"cache=...\)`: expected the same content of every sample"):
        distilled(cache=TeacherCache(sample_index=2), data=Augmented())
    with pytest.raises(ValueError, match="expected at most 32 different inputs"):
        distilled(cache=TeacherCache(), data=Augmented())
    distilled(cache=TeacherCache(sample_index=2, fixed_views=True), data=Augmented())


# Refusals


class Silent(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return self.net.fc.weight.sum()


class Grey(nn.Module):
    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        return x


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: distilled(FeatureHint(feature_layers="net.conv9")), TargetError, r"Nearest: .*'net.conv[12]'"),
    (
        lambda: distilled(FeatureHint(feature_layers={"net.conv*": "conv1"})),
        TargetError,
        "equally many modules in student and teacher",
    ),
    (
        lambda: distilled(FeatureHint(feature_layers={"net.fc": "conv3"})),
        TargetError,
        r"of the teacher .*Nearest: 'conv",
    ),
    (lambda: distilled(teacher=nn.Sequential(nn.Flatten(), nn.Linear(192, 7))), ValueError, r"\(4, 5\) and \(4, 7\)"),
    (lambda: distilled(teacher=nn.Linear(3, 5)), ValueError, r"does not take \(\(4, 3, 8, 8\)\).*inputs="),
    (lambda: distilled(teacher=Grey()), ValueError, r"Its signature: missing a required argument: 'length'"),
    (lambda: distilled(output="logits"), ValueError, r"output='logits'\)`: expected to find a tensor, found"),
    (lambda: distilled(module=Silent()), ValueError, "expected `training_step` to call `Silent`"),
    (
        lambda: distilled(FeatureHint(feature_layers="net.conv1"), teacher=Twin, cache=TeacherCache()),
        ValueError,
        "Leave `cache`",
    ),
    (
        lambda: distilled(FeatureHint(feature_layers={"net.conv1": "conv1"}, projector="none")),
        ValueError,
        "or, for features, a",
    ),
    (
        lambda: distilled(teacher=SelfTeacher(decay=0.5), cache=TeacherCache()),
        ValueError,
        r"found `SelfTeacher\(decay=0.5\)",
    ),
    (lambda: distilled(teacher="nowhere.pt"), ValueError, "found no such file"),
    (lambda: distilled(teacher=__file__), ValueError, r"found one that torch does not load as such.*CheckpointTeacher"),
    (lambda: distilled(teacher=lambda: 3), TypeError, "expected a function that returns a module"),
    (lambda: KnowledgeDistillation(SelfTeacher), TypeError, "For self-distillation write"),
    (lambda: KnowledgeDistillation(mentor, losses=SoftTargets), TypeError, r"Pass an instance: `SoftTargets\(\)`"),  # type: ignore[arg-type]
    (lambda: KnowledgeDistillation(mentor, cache="memory"), TypeError, "expected a TeacherCache"),  # type: ignore[arg-type]
    (lambda: KnowledgeDistillation(3), TypeError, "expected a Module, a TeacherSource"),  # type: ignore[arg-type]
    (lambda: KnowledgeDistillation(mentor, losses=[3]), TypeError, "expected a DistillationLoss, a list"),  # type: ignore[list-item]
    (lambda: KnowledgeDistillation(mentor, losses=[]), ValueError, "at least one teacher and one loss"),
    (lambda: KnowledgeDistillation(mentor, stop=1.5), ValueError, "a fraction of the run"),
    (lambda: KnowledgeDistillation(mentor, teacher_weights=[1.0, 2.0]), ValueError, "for each of 1 teachers"),
    (lambda: KnowledgeDistillation(mentor, balance_every_n_steps=-1), ValueError, "expected an integer >= 1"),
    (lambda: SelfTeacher(decay=1.0), ValueError, "expected 0 < decay < 1"),
]


@pytest.mark.parametrize(("make", "kind", "sentence"), REFUSED, ids=[sentence[:30] for _, _, sentence in REFUSED])
def test_is_refused(make: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        make()


def test_a_wrong_feature_layer_leaves_the_teacher_unchanged() -> None:
    teacher = mentor()
    with pytest.raises(TargetError):
        distilled(FeatureHint(feature_layers={"net.conv1": "conv1", "net.conv9": "conv2"}), teacher=teacher)
    assert all(part.training and not part._forward_hooks for part in teacher.modules())


@pytest.mark.parametrize("manual", [False, True])
def test_shapes_that_do_not_fit_are_found_before_the_first_step(manual: bool) -> None:
    for teacher in (nn.Linear(3, 5), nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), Grey()):
        module = Plain(manual=manual)
        before = weights(module).clone()
        with pytest.raises(ValueError, match="expected"):
            distilled(module=module, teacher=teacher)
        assert torch.equal(before, weights(module))
        assert "training_step" not in vars(module)
        assert not any(part._forward_hooks for part in module.modules())


def test_a_module_in_the_optimizer_cannot_be_a_separate_teacher() -> None:
    module = Plain()
    with pytest.raises(ValueError, match="For self-distillation write `KnowledgeDistillation\\('self'\\)`"):
        distilled(module=module, teacher=module.net)


def test_a_teacher_without_modules_has_no_feature_layers(tmp_path: Path) -> None:
    program = torch.export.export(mentor().eval(), (torch.zeros(4, 3, 8, 8),))
    torch.export.save(program, tmp_path / "teacher.pt2")
    with pytest.raises(ValueError, match="expected a teacher made of modules"):
        distilled(FeatureHint(feature_layers={"net.conv1": "conv1"}), teacher=str(tmp_path / "teacher.pt2"))


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_self_teacher_of_a_module_that_cannot_be_deep_copied(decay) -> None:
    class Locked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.last = loss["loss"] if isinstance(loss, dict) else loss  # a tensor that deepcopy refuses
            return loss

    locked, plain = Locked(), Plain()
    locked.last = next(locked.net.parameters()) * 2
    assert torch.equal(*(weights(distilled(teacher=SelfTeacher(decay=decay), module=one)) for one in (locked, plain)))
