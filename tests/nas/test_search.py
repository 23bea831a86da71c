"""`lightning_light.search` on small networks: budgets met, exactness, resume, and what it refuses."""

import copy
import itertools
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.example_input import ExampleInput
from lightning_light.measure import count_cost
from lightning_light.nas import BlockChoices, ChannelChoices, OperatorChoices, RankChoices, SearchTable
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Meter
from lightning_light.nas.evaluation import Evaluator
from lightning_light.nas.sensitivity import fill_table
from lightning_light.nas.solver import Solver
from lightning_light.substitution import DepthwiseSeparable
from lightning_light.surgery import manifest_of, restructure

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*stem, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(32, 3, 8, 8))  # statistics that fit
    return net.eval()


def batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 32, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def costs(net: nn.Module) -> tuple[int, int]:
    cost = count_cost(net, (EXAMPLE,))
    return cost.macs, cost.params


SPACE = [BlockChoices(), ChannelChoices((0.5,), targets="3.conv1"), RankChoices((0.5,), targets=["3.conv2", "4.conv?"])]


def run(net: nn.Module, budget: Any, **options: Any) -> Any:
    given = {"data": batches(), "space": SPACE, "calibration_batches": 2, "evaluation_batches": 2, "evaluations": 1}
    return ll.search(net, EXAMPLE, budget, **{**given, **options})


def test_two_budgets_are_met_in_place_and_the_edits_are_replayed() -> None:
    net, plain = network(), network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    result = run(net, [ll.MACs(0.6), ll.Params(0.7)], optimizers=[optimizer])
    macs, params = costs(net)
    dense_macs, dense_params = costs(plain)
    assert macs <= 0.6 * dense_macs
    assert params <= 0.7 * dense_params
    assert (macs, params) == (result.measured["macs"], result.measured["params"])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
    (axes,) = result.figure("params").axes
    drawn = [[tuple(map(float, place)) for place in dots.get_offsets()] for dots in axes.collections]
    chosen = (params, result.score.changed)
    compared = [(one.costs["params"], one.score.changed) for one in result.evaluated]
    assert drawn == [[(dense_params, 0.0), *compared, chosen], [chosen]]
    front = [tuple(map(float, place)) for place in axes.lines[0].get_xydata()]
    assert front == [
        a for a in sorted({*drawn[0]}) if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in drawn[0])
    ]
    assert "<svg" in result._repr_html_()
    rebuilt = restructure(network(), net.state_dict(), manifest_of(net))
    assert torch.equal(rebuilt.eval()(batches()[0]), net(batches()[0]))


def test_a_budget_that_is_met_changes_nothing_and_a_dry_run_neither() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    assert run(net, ll.MACs(1.0)).items == ()
    assert len(run(net, ll.MACs(0.5), dry_run=True).items) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_distance_of_an_item_is_that_of_the_changed_network_with_moved_statistics() -> None:
    net, small = network(), network()
    table = run(net, ll.MACs(0.9), space=[BlockChoices()], dry_run=True).table
    ll.prune_blocks(small, EXAMPLE, ll.MACs(0.9), targets="3", data=batches()[:2])
    found = [
        F.kl_div(small(x).log_softmax(1), net(x).log_softmax(1), reduction="batchmean", log_target=True)
        for x in batches()[2:]
    ]
    assert table.distances["3: blocks removed"] == pytest.approx(float(torch.stack(found).mean().detach()), rel=1e-4)


def test_an_operator_starts_as_in_substitution_and_may_be_chosen_beside_other_kinds() -> None:
    net, small = network(), network()
    operator, wide = DepthwiseSeparable(multiplier=4), DepthwiseSeparable(multiplier=9)
    space = [
        BlockChoices("4"),
        OperatorChoices([operator, wide], targets="3.conv?"),
        ChannelChoices((0.5,), targets="0"),
    ]
    result = run(net, ll.MACs(0.5), space=space)
    given = {"operators": [operator], "targets": "3.conv1", "data": batches()[:2], "fit_steps": 0}
    ll.substitute_operators(small, EXAMPLE, ll.MACs(0.95), **given)
    plain = network()
    found = [
        F.kl_div(small(x).log_softmax(1), plain(x).log_softmax(1), reduction="batchmean", log_target=True)
        for x in batches()[2:]
    ]
    names = [item.name for item in result.table.items if item.kind == "operators"]
    assert names == [f"3.conv{n}: operators DepthwiseSeparable(multiplier=4)" for n in (1, 2)]  # wide saves nothing
    assert result.table.distances[names[0]] == pytest.approx(float(torch.stack(found).mean().detach()), rel=1e-4)
    assert names[0] in [item.name for item in result.items]
    rebuilt = restructure(network(), net.state_dict(), manifest_of(net))
    assert torch.equal(rebuilt.eval()(batches()[0]), net(batches()[0]))


def test_the_exact_solution_is_the_least_of_all_feasible_sets() -> None:
    net = nn.Sequential(*network()[:3], *[Block(16) for _ in range(4)], *network()[5:]).eval()
    result = run(net, ll.MACs(0.6), space=[BlockChoices()], evaluations=0, dry_run=True)
    table, goal = result.table, result.goals["macs"]
    pairs = list(itertools.combinations(table.items, 2))
    saved = [table.costs["macs"] - sum(table.savings[item.name]["macs"] for item in pair) for pair in pairs]
    assert max(saved) <= goal < table.costs["macs"] - table.savings[table.items[0].name]["macs"]
    sums = [{p: sum(table.distances[i.name] ** p for i in pair) for p in (1.0, 0.5, 0.75)} for pair in pairs]
    best = {frozenset(min(zip(sums, pairs, strict=True), key=lambda one: one[0][p])[1]) for p in (1.0, 0.5, 0.75)}
    assert frozenset(result.items) in best


class Counted(nn.Sequential):
    """Count the samples of all forward passes, and the copies that exist at once."""

    samples, most = 0, 0
    copies: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.copies.add(self)
        Counted.most = max(Counted.most, len(self.copies))

    def forward(self, x: Tensor) -> Tensor:
        Counted.samples += len(x)
        out: Tensor = super().forward(x)
        return out


def test_the_table_takes_equal_work_per_choice_and_one_copy_at_a_time() -> None:
    example, net = ExampleInput.of(EXAMPLE), Counted(*network())
    meter = Meter([ll.MACs(0.5)], example, None, None)
    evaluator = Evaluator(net, example, SPACE[2:], *(map(ExampleInput.of, part) for part in (batches(1), batches(2))))
    items = SPACE[2].items(net, example)
    work = []
    for count in range(len(items) + 1):
        Counted.samples = 0
        fill_table(SearchTable("", items[:count]), evaluator, meter, None, progress_bar=False)
        work.append(Counted.samples)
    per_choice = {after - before for before, after in itertools.pairwise(work)}
    assert len(per_choice) == 1
    assert 96 <= per_choice.pop() < 110  # three batches of 32, and what the shapes are counted with
    assert Counted.most == 1


@dataclass(frozen=True)
class Weighed(ll.TorchScriptLite):
    """Record the bytes of all living copies of `Counted`, when a file is written and when it is loaded."""

    found: ClassVar[list[tuple[str, int]]] = []
    loaded: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def record(self, step: str) -> None:
        tensors = [tensor for network in Counted.copies for tensor in network.parameters()]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.found.append((step, sum(sizes.values())))

    def write(self, *arguments: Any) -> dict[str, Any]:
        self.record("write")
        return super().write(*arguments)

    def load(self, path: Path) -> Any:
        self.record("load")
        assert not self.loaded, "two files are in memory"
        run = super().load(path)
        self.loaded.add(run)
        return run


def test_the_network_and_one_copy_are_in_memory_while_a_file_is_written_and_one_file_while_it_is_timed() -> None:
    net, data = Counted(*network()), batches(2)
    size = sum(4 * tensor.numel() for tensor in net.parameters())
    Weighed.found.clear()
    budget, space = ll.Latency("1 s", runtime=Weighed()), [ChannelChoices((0.5,), targets="3.conv1")]
    ll.search(net, data[0], budget, data=data, space=space, evaluations=0, dry_run=True)
    plain, choice, solution = (size for step, size in Weighed.found if step == "write")
    assert plain == solution == size
    assert choice == size - 4 * (8 * 16 * 9 + 2 * 8 + 16 * 8 * 9)
    loads = [size for step, size in Weighed.found if step == "load"]
    assert loads == [0] * (1 + 2 * 2 * 5)  # the first file; then it and another in five turns, twice


def test_the_solution_of_each_kind_alone_is_compared_with_those_of_all() -> None:
    result = run(network(), ll.MACs(0.85), evaluations=0, dry_run=True)
    assert {"blocks", "channels", "ranks"} <= {"+".join({i.kind for i in one.items}) for one in result.evaluated}
    assert result.score.loss == min(one.score.loss for one in result.evaluated)


@pytest.mark.slow
def test_an_interrupted_table_continues_and_that_of_other_weights_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    class Interrupting(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Interrupting.calls += 1
            if Interrupting.calls == 45:
                raise KeyboardInterrupt
            out: Tensor = super().forward(x)
            return out

    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(*network()), ll.MACs(0.5), table=path)
    stored = json.loads(path.read_text())
    assert 0 < len(stored["distances"]) < len(stored["items"])
    whole = run(network(), ll.MACs(0.5), dry_run=True).table.distances
    name = next(iter(stored["distances"]))
    assert all(whole[item] == distance for item, distance in stored["distances"].items())
    stored["distances"][name] = 7.0
    path.write_text(json.dumps(stored))
    continued = run(network(), ll.MACs(0.5), table=path, dry_run=True).table.distances
    assert continued == {**whole, name: 7.0}
    other = network()
    other[7].bias.data += 1.0
    assert run(other, ll.MACs(0.5), table=path, dry_run=True).table.distances[name] != 7.0


def test_a_search_that_is_repeated_decides_by_the_latencies_in_its_table(tmp_path: Path) -> None:
    options = {"space": [BlockChoices()], "table": tmp_path / "table.json", "evaluations": 0, "dry_run": True}
    first, second = (run(network(), [ll.MACs(0.9), ll.Latency("10 s")], **options) for _ in range(2))
    assert first.measured == second.measured
    assert 0.0 < second.measured["seconds"] < 10.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_written_int8_file_meets_its_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net, recipe = network(), ll.Int8(engine="onnx")
    budgets = [ll.Size("18 kB"), ll.Latency("1 s", runtime=ll.ONNX())]
    result = run(net, budgets, space=[BlockChoices(), recipe], evaluations=0)
    with ll.fake_quantized(net):
        report = ll.export_model(net, EXAMPLE, tmp_path / "net.onnx", exporter=ll.ONNX(), batch="one", latency_runs=1)
    assert report.bytes == result.measured["bytes"] <= 18_000 < result.table.costs["bytes"]
    assert result.measured["bytes"] == pytest.approx(result.predicted["bytes"], rel=0.05)
    assert 0.0 < result.measured["seconds"] < 1.0


@pytest.mark.parametrize(
    ("budget", "options", "sentence"),
    [
        (ll.MACs(0.5), {"space": []}, r"expected at least one of `BlockChoices`.*found no choices"),
        (ll.MACs(0.5), {"space": [ll.Int8()]}, r"found no choices and 1 recipes.*use `quantize`"),
        (ll.MACs(0.5), {"space": [BlockChoices(), BlockChoices()]}, r"each at most once.*found \['blocks', 'blocks'\]"),
        ([ll.MACs(0.5), ll.MACs(0.4)], {}, r"budgets? of different quantities|different quantities, found"),
        ([], {}, r"expected one budget or several"),
        (ll.Sparsity(0.5), {}, r"expected a budget that low-rank factors can reach"),
        (ll.Size("10 kB"), {"space": [*SPACE, ll.Int8()]}, r"expected the runtime of the int8 file, found none"),
        (ll.MACs(0.01), {"space": [BlockChoices()]}, r"cannot reach the budget: expected macs <= .*, found \d"),
        (ll.MACs(0.5), {"data": batches(1)}, r"`search\(data=...\)`: expected at least two batches.*found 1"),
        (ll.MACs(0.5), {"data": []}, r"`search\(data=...\)`: expected at least two batches.*found 0"),
        (ll.MACs(0.5), {"space": [BlockChoices("7")]}, r"expected at least one choice, found no block"),
        (ll.MACs(0.5), {"data": L.LightningDataModule()}, r"Give a loader .*`data=data_module.train_dataloader\(\)`"),
        (ll.MACs(0.5), {"data": [one * torch.inf for one in batches()]}, r"expected finite outputs .*, found others"),
        (ll.MACs(0.5), {"class_dim": 2}, r"`class_dim=2` on `Sequential`: .* found the shape \(32, 5\)"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_changes_nothing(budget: Any, options: Any, sentence: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((TypeError, ValueError, ll.LightningLightError), match=sentence):
        run(net, budget, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_budgets_that_are_met_alone_and_not_together_are_one_sentence() -> None:
    fast, small = (Item("ranks", "3", choice, frozenset({"3"})) for choice in ("fast", "small"))
    table = SearchTable("", [fast, small], {fast.name: 0.1, small.name: 0.1}, costs={"seconds": 1.0, "bytes": 10.0})
    table.savings = {fast.name: {"seconds": 0.5, "bytes": 0.0}, small.name: {"seconds": 0.0, "bytes": 5.0}}
    runtime = ll.TorchScriptLite()
    meter = Meter([ll.Latency("1 s", runtime=runtime), ll.Size("1 kB")], ExampleInput.of(EXAMPLE), runtime, None)
    evaluator = Evaluator(network(), ExampleInput.of(EXAMPLE), [], [], [])
    Solver("search", table, evaluator, meter, {"seconds": 0.6, "bytes": 10.0}, None, 0).check_reachable()
    solver = Solver("search", table, evaluator, meter, {"seconds": 0.6, "bytes": 6.0}, None, 0)
    with pytest.raises(
        ll.BudgetError, match=r"cannot meet its budgets together: .* bytes <= 6, found 10 where seconds"
    ):
        solver.check_reachable()


def test_a_table_of_another_space_is_refused(tmp_path: Path) -> None:
    run(network(), ll.MACs(0.9), space=[BlockChoices()], table=tmp_path / "table.json", dry_run=True)
    with pytest.raises(ValueError, match=r"expected a table of this space \(.*found one of another \(2 items"):
        run(network(), ll.MACs(0.9), table=tmp_path / "table.json", dry_run=True)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a table of a search, found a file that is none"):
        run(network(), ll.MACs(0.9), table=tmp_path / "other.json", dry_run=True)
    with pytest.raises(ValueError, match=r"a file that is none \(IsADirectoryError"):
        run(network(), ll.MACs(0.9), table=tmp_path, dry_run=True)
