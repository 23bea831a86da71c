import copy
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_light.budgets import Latency, MACs
from lightning_light.depth import DepthPlan, DepthPruning, prune_blocks
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, export_model, load_exported
from lightning_light.lowrank import LowRankFactorization, RankAllocation, factorize
from lightning_light.measure.latency import measure_latency
from lightning_light.measure.latency_operators import COPIES, Operator, operator_calls
from lightning_light.measure.latency_table import CACHE, LatencyTable
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning, Widths, prune_channels
from lightning_light.substitution import DepthwiseSeparable, Fire, Substitution, SubstitutionPlan, substitute_operators
from tests.simulated_runtime import MEASURED, Simulated

EXAMPLE = ExampleInput((torch.zeros(2, 3, 8, 8),))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    MEASURED.clear()


def network(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def table(budget: Latency, known=None) -> LatencyTable:
    found = LatencyTable.of(budget, known)
    assert found is not None
    return found


def test_operators_are_those_of_one_sample_with_their_shapes() -> None:
    same, none = (1, 1), (0, 0)
    assert operator_calls(network(), EXAMPLE).operators == {
        Operator((1, 3, 8, 8), (32, 3, 3, 3), (same, same, same, none, 1, False)): 1,
        Operator((1, 32, 8, 8), (32, 1, 3, 3), (same, same, same, none, 32, False)): 1,
        Operator((1, 32, 8, 8), (32, 32, 1, 1), (same, none, same, none, 1, False)): 1,
        Operator((1, 32), (10, 32)): 1,
    }
    assert LatencyTable.of(MACs(0.5)) is None
    assert LatencyTable.of(Latency("1 ms")) is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.Conv1d(4, 4, 3),
        nn.Linear(9, 5),
    ],
    ids=repr,
)
def test_the_copies_of_an_operator_compute_it(layer: nn.Module) -> None:
    shapes = {nn.Linear: (1, 9), nn.Conv1d: (1, 4, 9)}
    call = ExampleInput((torch.zeros(shapes.get(type(layer), (1, 4, 9, 9))),))
    (operator,) = operator_calls(layer, call).operators
    assert operator_calls(*operator.copies()).operators == {operator: COPIES}


def test_estimates_are_exact_where_files_are_linear_in_their_operators() -> None:
    budget = Latency("1 s", Simulated(block=16, overhead=3e-6, slower=1.25))
    found = table(budget)
    for width in (64, 16):
        assert found.correct_by(network(width), EXAMPLE) == budget.measure(network(width), EXAMPLE)
    for width in (17, 32, 47):
        estimated = found.estimate(network(width), EXAMPLE)
        assert estimated == pytest.approx(budget.measure(network(width), EXAMPLE), rel=1e-12)
    part = network()[4]
    expected = 1.25 * Simulated(block=16).seconds(part, ExampleInput((torch.zeros(1, 32, 8, 8),)), 1)
    assert found.estimate_part(part, ExampleInput((torch.zeros(1, 32, 8, 8),))) == pytest.approx(expected)


def test_everything_is_measured_once_per_machine_and_settings(tmp_path: Path) -> None:
    budget = Latency("1 s", Simulated())
    first = table(budget).correct_by(network(), EXAMPLE)
    count = len(MEASURED)
    assert count == 5  # four operators and the file
    again = table(budget)
    assert again.correct_by(network(), EXAMPLE) == first
    assert len(MEASURED) == count
    table(Latency("1 s", Simulated(), threads=2)).correct_by(network(), EXAMPLE)
    assert len(MEASURED) == 2 * count
    files = [json.loads(file.read_text()) for file in (tmp_path / "latency").iterdir()]
    assert sorted(file["threads"] for file in files) == [1, 2]
    assert {file["runtime"] for file in files} == {"Simulated(block=1, overhead=0.0, slower=1.0), simulated 1.0"}


def test_what_a_run_has_measured_comes_before_what_is_on_disk() -> None:
    budget = Latency("1 s", Simulated())
    table(budget).correct_by(network(), EXAMPLE)
    first = table(budget)
    first.correct_by(network(), EXAMPLE)
    known = first.used
    known["seconds"] = {key: 2 * seconds for key, seconds in known["seconds"].items()}
    assert table(budget, known).file(network(), EXAMPLE) == 2 * first.file(network(), EXAMPLE)


@pytest.mark.parametrize("heads", [1, 2])
def test_products_of_attention_are_operators(heads: int) -> None:
    attention = nn.TransformerEncoderLayer(8, heads, 16, batch_first=True).eval()
    operators = operator_calls(attention, ExampleInput((torch.zeros(3, 5, 8),))).operators
    size = 8 // heads
    scores, values = Operator((heads, 5, size), (heads, size, 5)), Operator((heads, 5, 5), (heads, 5, size))
    assert operators[scores] == operators[values] == 1
    for operator in (scores, values):
        assert operator.key.startswith("product")
        assert operator_calls(*operator.copies()).operators == {operator: COPIES}


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": {"a": -1.0}}', '{"seconds": {"a": "1"}}'])
def test_a_damaged_table_is_measured_again_with_a_warning(text: str, tmp_path: Path) -> None:
    budget = Latency("1 s", Simulated())
    table(budget).correct_by(network(), EXAMPLE)
    (file,) = (tmp_path / "latency").iterdir()
    whole = file.read_text()
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"Latency table .*expected measured seconds, found a damaged file"):
        table(budget).correct_by(network(), EXAMPLE)
    assert file.read_text() == whole


def test_channels_are_removed_until_the_file_meets_the_latency() -> None:
    runtime = Simulated(block=8, overhead=2e-6)
    model = network(64)
    dense = runtime.seconds(model, EXAMPLE, 1)
    budget = Latency(0.5 * dense, runtime)
    plan = prune_channels(model, EXAMPLE, budget)
    assert plan.after == budget.measure(model, EXAMPLE) <= 0.5 * dense
    assert plan.estimated == pytest.approx(plan.after)
    assert plan.before == pytest.approx(dense)
    assert sum(mask.numel() for mask in plan.kept.values()) > plan.removed > 0
    wider = network(64)
    kept = prune_channels(wider, EXAMPLE, Latency(plan.after * 1.000001, runtime), widths=Widths(round_to=8))
    assert kept.after <= plan.after * 1.000001


def convolutions(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )


def test_factors_are_chosen_so_that_the_file_meets_the_latency() -> None:
    runtime = Simulated(block=8, overhead=2e-5, slower=1.5)
    model = convolutions()
    dense = runtime.seconds(model, EXAMPLE, 1)
    budget = Latency(0.6 * dense, runtime)
    plan = factorize(model, EXAMPLE, budget, allocation=RankAllocation(round_to=4))
    assert plan.after == budget.measure(model, EXAMPLE) <= 0.6 * dense
    assert plan.estimated == pytest.approx(plan.after, rel=1e-6)
    assert plan.after > 0.45 * dense
    assert "ms measured" in plan.summary()


@pytest.mark.slow
def test_the_depthwise_form_is_chosen_by_latency_only_where_it_is_faster() -> None:
    @dataclass(frozen=True)
    class SlowDepthwise(Simulated):
        @override
        def seconds(self, model: nn.Module, example: ExampleInput, threads: int) -> float:
            operators = operator_calls(model, example).operators
            grouped = sum(
                count for operator, count in operators.items() if operator.options and operator.options[4] > 1
            )
            return super().seconds(model, example, threads) + 1.0 * grouped

    forms = []
    for runtime in (Simulated(), SlowDepthwise()):
        torch.manual_seed(0)
        model = convolutions()
        with torch.no_grad():  # exact in one pair of a depthwise and a pointwise layer
            model[2].weight.copy_(torch.randn(32, 32, 1, 1) * torch.randn(1, 32, 3, 3))
        budget = Latency(0.75 * Simulated().seconds(model, EXAMPLE, 1), runtime)
        forms.append({name: layer.form for name, layer in factorize(model, EXAMPLE, budget).layers.items()})
    assert forms[0]["2"] == "depthwise"
    assert not {"depthwise", "pointwise"} & set(forms[1].values())
    by_macs = factorize(convolutions(), EXAMPLE, MACs(0.5)).layers
    assert not {"depthwise", "pointwise"} & {layer.form for layer in by_macs.values()}


def test_factors_out_of_reach_are_refused_with_the_model_unchanged() -> None:
    model = convolutions()
    with pytest.raises(BudgetError, match=r"`Latency\(.*expected seconds of at most 0.001, found 0.001"):
        factorize(model, EXAMPLE, Latency("1 ms", Simulated(overhead=1e-3)))
    assert type(model[2]) is nn.Conv2d


class Skip(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x).relu()


def operators(model: nn.Module, budget: Latency) -> SubstitutionPlan:
    lighter = [DepthwiseSeparable(), Fire(0.5)]
    return substitute_operators(model, EXAMPLE, budget, operators=lighter, fit_steps=0, progress_bar=False)


def blocks(model: nn.Module, budget: Latency) -> DepthPlan:
    return prune_blocks(model, EXAMPLE, budget)


@pytest.mark.parametrize("compress", [operators, blocks])
def test_operators_and_blocks_change_until_the_file_meets_the_latency_and_each_structure_is_measured_once(
    compress: Any,
) -> None:
    runtime, model = Simulated(), nn.Sequential(nn.Conv2d(3, 16, 3), *[Skip(16) for _ in range(3)])
    dense = runtime.seconds(model, EXAMPLE, 1)
    MEASURED.clear()
    plan = compress(model, Latency(0.7 * dense, runtime))
    assert len(set(MEASURED)) == len(MEASURED)
    assert plan.before == dense
    assert plan.after == pytest.approx(runtime.seconds(model, EXAMPLE, 1))
    assert 0.2 * dense < plan.after <= 0.7 * dense


@pytest.mark.slow
@pytest.mark.parametrize("compress", [operators, blocks])
def test_the_written_file_is_faster_by_what_was_asked_for(compress: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *[Skip(64) for _ in range(3)])
    dense, x = copy.deepcopy(model), EXAMPLE.args[0][:1]
    found = table(Latency("1 s", ONNX()))
    plan = compress(model, Latency(0.6 * found.file(model, EXAMPLE), ONNX()))
    assert plan.after <= 0.6 * found.file(dense, EXAMPLE)
    files = []
    for name, network in (("small", model), ("dense", dense)):
        export_model(network, (x,), tmp_path / f"{name}.onnx", latency_runs=1)
        files.append(load_exported(tmp_path / f"{name}.onnx"))
    turns = [[measure_latency(lambda f=file: f(x), warmup=1, runs=5).p10 for file in files] for _ in range(20)]
    assert median(small / large for small, large in turns) < 0.85  # on a machine that may be busy


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            convolutions(16), Skip(16), Skip(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        )
        self.example_input_array = EXAMPLE.args[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


METHODS = {
    "channels": lambda budget: StructuredPruning(budget, schedule=OneShot(0.6)),
    "factors": lambda budget: LowRankFactorization(
        budget, schedule=OneShot(0.6), allocation=RankAllocation(round_to=2)
    ),
    "operators": lambda budget: Substitution(budget, start=0.6, operators=[DepthwiseSeparable()], fit_steps=0),
    "blocks": lambda budget: DepthPruning(budget, schedule=OneShot(0.6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_plans_by_what_was_measured_before(method: str, tmp_path: Path, monkeypatch) -> None:
    runtime = Simulated(block=2, overhead=1e-6)
    budget = Latency(0.7 * runtime.seconds(Trained(), EXAMPLE, 1), runtime)
    data = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 2), batch_size=4)

    def fit(resume: str | None = None) -> Trained:
        torch.manual_seed(0)
        module = Trained()
        trainer = L.Trainer(
            max_epochs=4,
            callbacks=[METHODS[method](budget), *([] if resume else [SaveHalfway()])],
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=resume)
        return module

    whole = fit()
    assert budget.measure(whole, EXAMPLE) <= budget.seconds
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["lightning_light"]["state"]
    assert state[METHODS[method](budget).method]["latency"]["seconds"]
    monkeypatch.setattr(Simulated, "seconds", lambda *_: 1.0)  # the machine is busy
    resumed = fit(str(tmp_path / "half.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class SaveHalfway(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


def test_a_latency_out_of_reach_is_refused_with_the_model_unchanged() -> None:
    runtime = Simulated(overhead=1e-3)
    model = network()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"`Latency\(.*\)` cannot be reached: expected seconds <= 0.001, found 0.001"):
        prune_channels(model, EXAMPLE, Latency("1 ms", runtime))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
