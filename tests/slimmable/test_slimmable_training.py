"""`SlimmableTraining` in a Trainer: each step is that of hand-written code, and each width is a network of its own."""

import copy
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lightning_light as ll
from lightning_light.distillation import AttentionTransfer, OutputRegression
from lightning_light.errors import OrderError, TargetError, UnsupportedError
from lightning_light.measure import count_cost
from lightning_light.slimmable import SlimmableTraining, extract_width
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Body, Momentum, TwoOptimizers, module_class
from tests.contract.runs import differences, trainer

STEPS = {"max_steps": 3, "max_epochs": -1}
IMAGES = torch.zeros(2, 3, 8, 8)


def built(body: type[Body] = Body) -> Any:
    return module_class(body, lightning.pytorch)()


def fitted(*callbacks: Any, module: Any = None, **options: Any) -> Any:
    module = built() if module is None else module
    run = trainer(*callbacks, **{**STEPS, **options})
    run.fit(module)
    return run, module


def networks_of(module: Any) -> Any:
    state = state_of(module).state["slimmable_training"]
    return dict(zip(state["widths"], state["networks"], strict=True))


def with_zeros(module: Any, kept: Any) -> dict[str, Tensor]:
    """The parameters, with zeros at every position of a channel that is left out."""
    masked = {}
    for name, parameter in module.named_parameters():
        mask = torch.ones_like(parameter)
        for dim, index in kept.get(name, {}).items():
            mask *= (
                torch.zeros(parameter.shape[dim])
                .index_fill(0, index, 1.0)
                .view([-1 if d == dim else 1 for d in range(parameter.dim())])
            )
        masked[name] = parameter * mask
    return masked


@pytest.fixture(scope="module")
def trained() -> Any:
    """Three steps in double precision, with three widths."""
    slimmable = SlimmableTraining((1.0, 0.75, 0.5, 0.25), random_widths=1)
    return slimmable, *fitted(slimmable, module=built(Momentum), precision="64-true", limit_val_batches=0)


def test_each_step_is_that_of_the_whole_network_with_zeros(trained) -> None:
    slimmable, _, module = trained
    twin = built(Momentum).double()
    optimizer = twin.configure_optimizers()
    statistics = {width: {name: b.clone() for name, b in twin.named_buffers()} for width in networks_of(module)}
    drawn = []
    for step, (x, y) in enumerate(twin.train_dataloader().batches[:3]):
        output = twin(x.double())
        loss = F.cross_entropy(output, y)
        drawn.append(slimmable._drawn(step))
        for width in drawn[-1]:
            tensors = {**with_zeros(twin, networks_of(module)[width]["kept"]), **statistics[width]}
            narrow = functional_call(twin, tensors, (x.double(),))
            target = output.detach().softmax(1)
            loss = loss + F.kl_div(narrow.log_softmax(1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [widths[0] for widths in drawn] == [0.25] * 3
    assert {widths[1] for widths in drawn} == {0.75, 0.5}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, dict(twin.named_parameters())[name], rtol=0, atol=1e-10)
    for width, network in networks_of(module).items():
        for name, value in network["statistics"].items():
            for dim, index in network["kept"].get(name, {}).items():
                statistics[width][name] = statistics[width][name].index_select(dim, index)
            torch.testing.assert_close(value, statistics[width][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [0.75, 0.5, 0.25])
def test_an_extracted_width_is_the_network_with_zeros(trained, width, tmp_path) -> None:
    _, run, module = trained
    x, network = module.train_dataloader().batches[3][0].double(), networks_of(module)[width]
    masked = copy.deepcopy(module).eval()
    masked.load_state_dict(with_zeros(module, network["kept"]), strict=False)
    for name, value in network["statistics"].items():
        kept = network["kept"].get(name, {}).get(0)
        masked.get_buffer(name)[... if kept is None else kept] = value
    small = extract_width(module, width).eval()
    assert small.features.conv1.weight.shape[:2] == (16 * width, 8 * width)
    torch.testing.assert_close(small(x), masked(x), rtol=0, atol=1e-10)
    assert module.features.conv1.weight.shape[:2] == (16, 8)
    assert extract_width(module, 1.0).features.conv1.weight.shape[:2] == (16, 8)

    run.save_checkpoint(tmp_path / "slimmable.ckpt")
    loaded = ll.load_from_checkpoint(type(module), tmp_path / "slimmable.ckpt", weights_only=True)
    again = extract_width(loaded.double(), width).eval()
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=1e-6)  # loaded in single precision
    rebuilt = ll.restructure(built().double(), small.state_dict(), ll.surgery.manifest_of(small)).eval()
    assert torch.equal(rebuilt(x), small(x))


def test_an_extracted_width_is_exported_and_compressed_further(trained, tmp_path) -> None:
    *_, module = trained
    small = extract_width(module, 0.5).float()
    report = ll.export_model(small, (IMAGES,), tmp_path / "small.ptl", latency_runs=2)
    assert report.parity.max_absolute < 1e-5
    ll.prune_channels(small, IMAGES, ll.Channels(0.5))
    assert small.features.conv1.out_channels < 8
    with ll.fake_quantized(ll.quantize(small, IMAGES, ll.Int8())):
        assert small(IMAGES).shape == (2, 5)


def test_what_has_several_widths_is_extracted_before_it_is_changed(trained) -> None:
    module = copy.deepcopy(trained[-1]).float()
    with pytest.raises(UnsupportedError, match=r"`structured_pruning` on .* found one that `slimmable_training` owns"):
        ll.prune_channels(module, IMAGES, ll.Channels(0.5))
    fitted(ll.QuantizationAwareTraining(ll.Int8(), start=0.0, calibration_batches=1), module=module)
    with pytest.raises(UnsupportedError, match=r"`slimmable_training` on .* `quantization_aware_training` owns"):
        extract_width(module, 0.5)


def test_validation_logs_the_agreement_of_the_extracted_networks() -> None:
    module = module_class(Body, lightning.pytorch)(lr=0.0)
    nn.init.zeros_(module.head.bias)  # so that several classes are predicted
    nn.init.zeros_(module.features.last.bias)
    run, module = fitted(SlimmableTraining((1.0, 0.5)), module=module, max_epochs=2, max_steps=-1, limit_val_batches=3)
    small, batches = extract_width(module, 0.5).eval(), module.val_dataloader().batches[:3]
    equal = torch.cat([small(x).argmax(1) == module.eval()(x).argmax(1) for x, _ in batches])
    assert 0 < equal.float().mean() < 1
    assert run.callback_metrics["slimmable_training/agreement_0.5"] == pytest.approx(equal.float().mean().item())


@pytest.mark.parametrize("body", [Body, TwoOptimizers])
def test_a_teacher_of_the_whole_network_does_not_see_the_narrower_calls(body) -> None:
    ends = []
    for order in (1, -1):
        callbacks = [SlimmableTraining((1.0, 0.5)), ll.KnowledgeDistillation("self", student="")][::order]
        ends.append(fitted(*callbacks, module=built(body), limit_val_batches=0)[1])
    for name, value in ends[0].state_dict().items():
        torch.testing.assert_close(value, ends[1].state_dict()[name])


def test_the_plan_of_a_run_has_the_costs_of_each_width() -> None:
    planned = str(ll.plan(built(), IMAGES, [SlimmableTraining((1.0, 0.5), start=0.2)]))
    small = extract_width(fitted(SlimmableTraining((1.0, 0.5)))[1], 0.5)
    cost = count_cost(small, (IMAGES[:1],))
    assert (cost.macs, cost.params) == (47_262, 973)
    assert "(width 0.5)     47.3k MACs (27.0%), 973 params (27.6%)" in planned
    assert "20% to 100% of the run" in planned


class Regression(Body):
    """One output."""

    def make(self) -> None:
        super().make()
        self.head = nn.Linear(12, 1)

    def loss(self, batch: Any) -> Tensor:
        self.losses.append(0.0)
        return F.mse_loss(self(batch[0]).squeeze(1), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_outputs_that_are_no_scores_are_regressed() -> None:
    with pytest.raises(ValueError, match=r"scores of two or more classes, found the shape \(8, 1\)"):
        fitted(SlimmableTraining((1.0, 0.5)), module=built(Regression))
    slimmable = SlimmableTraining((1.0, 0.5), loss=OutputRegression())
    run, module = fitted(slimmable, module=built(Regression), max_epochs=1, max_steps=-1)
    small, x = extract_width(module, 0.5).eval(), module.val_dataloader().batches[0][0]
    expected = F.mse_loss(small(x), module.eval()(x)).item()
    assert run.callback_metrics["slimmable_training/output_regression_0.5"] == pytest.approx(expected, rel=1e-4)


class Parts(Body):
    """The step calls two parts."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])


def test_one_part_of_two_is_narrowed_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"found calls of 'features', 'head'. Name the part to be narrowed"):
        fitted(SlimmableTraining(), module=built(Parts))
    slimmable = SlimmableTraining((1.0, 0.5), network="features", loss=OutputRegression())
    small = extract_width(fitted(slimmable, module=built(Parts))[1], 0.5)
    assert (small.features.conv1.out_channels, small.features.last.out_channels) == (8, 12)


class Direct(Body):
    """The step calls a part by its ``forward``."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.features.forward(batch[0])), batch[1])


def test_a_part_that_is_not_called_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"expected `training_step` to call `Direct.*\.features`"):
        fitted(SlimmableTraining(network="features"), module=built(Direct))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"widths": (1.0, 1.5)}, ValueError, r"`SlimmableTraining\(widths=.*1.5"),
        ({"widths": (1.0, 0.0)}, ValueError, r"`SlimmableTraining\(widths=.*0"),
        ({"widths": (0.5, 0.25)}, ValueError, "found no 1.0"),
        ({"widths": (1.0,)}, ValueError, "found 1.0 alone"),
        ({"widths": (1.0, 0.5, 0.5)}, ValueError, "found duplicates"),
        ({"criterion": ll.Taylor()}, UnsupportedError, "needs .*grad"),
        ({"loss": AttentionTransfer(feature_layers="features")}, UnsupportedError, "found one that reads features"),
        ({"loss": ll.losses.DKD()}, UnsupportedError, "found one that reads labels"),
    ],
)
def test_arguments_that_do_not_work_are_refused_at_construction(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        SlimmableTraining(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "error", "match"),
    [
        ([ll.StructuredPruning(ll.MACs(0.5)), SlimmableTraining()], OrderError, "SlimmableTraining beginning at 0%"),
        ([SlimmableTraining(), ll.QuantizationAwareTraining()], OrderError, "SlimmableTraining continues until 100%"),
        ([SlimmableTraining(), SlimmableTraining()], UnsupportedError, "expected one of them, found two"),
        ([SlimmableTraining(targets="head")], UnsupportedError, "expected layers that can lose channels, found none"),
        ([SlimmableTraining(targets="nothing")], TargetError, "nothing"),
        ([SlimmableTraining(network="feature")], TargetError, "Nearest: 'features'"),
        ([SlimmableTraining(network="alone")], UnsupportedError, "features.stem: kept .used outside of `alone`"),
        ([SlimmableTraining(output="logits")], ValueError, r"SlimmableTraining\(output='logits'\)"),
    ],
)
def test_runs_that_do_not_work_are_refused(callbacks, error, match) -> None:
    module = built()
    module.alone = nn.Linear(2, 2)
    with pytest.raises(error, match=match):
        fitted(*callbacks, module=module)
    assert len(module.losses) <= 1


def test_another_fit_needs_the_same_widths() -> None:
    _, module = fitted(SlimmableTraining((1.0, 0.5)))
    kept = copy.deepcopy(networks_of(module)[0.5]["kept"])
    fitted(SlimmableTraining((1.0, 0.5)), module=module)
    assert not differences(kept, networks_of(module)[0.5]["kept"])
    with pytest.raises(UnsupportedError, match=r"widths that this network was trained with, found \[1.0, 0.5\]"):
        fitted(SlimmableTraining((1.0, 0.25)), module=module)


@pytest.mark.parametrize("order", [1, -1])
def test_a_learning_rate_finder_leaves_the_run_as_it_is_without(order) -> None:
    finder = lightning.pytorch.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    ends = [
        fitted(*beside, limit_val_batches=0)[1]
        for beside in ([SlimmableTraining()], [finder, SlimmableTraining()][::order])
    ]
    for module in ends:
        assert state_of(module).state["slimmable_training"]["steps"] == 3
    assert not differences(*(dict(module.state_dict()) for module in ends))
    assert not differences(*map(networks_of, ends))


def test_a_width_that_was_not_trained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`extract_width\(Body.*, 0.5\)`: expected a width .* found none"):
        extract_width(built(), 0.5)
    with pytest.raises(ValueError, match=r"found the widths \[1.0, 0.5\]"):
        extract_width(fitted(SlimmableTraining((1.0, 0.5)))[1], 0.25)
