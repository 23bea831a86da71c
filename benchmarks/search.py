"""Search widths, ranks and depth of a CIFAR-10 ResNet-20 under the latency and the size of its int8 file, or its MACs.

    python benchmarks/search.py --data cifar10.npz --weights resnet20_cifar10.pt --work runs --seconds 0.7 --bytes 0.8
    python benchmarks/search.py --data cifar10.npz --weights resnet20_cifar10.pt --work runs --macs 0.7265

Each kind of choice alone, and all jointly, by the same number of evaluations; the same recovery for every row: SGD on
flipped images, the outputs of the dense network as targets, under bfloat16 mixed precision. Budgets and costs are
fractions of the dense network's int8 file in ONNX Runtime, one thread; accuracies are those of the written int8 files,
under MACs those of the float network too.
The table and every row are kept: a second budget needs no new table, and an interrupted run continues.
"""

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from cifar_resnet import EXAMPLE, accuracy, read
from nets import cifar_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.atomic import atomic_write
from lightning_light.example_input import ExampleInput
from lightning_light.export.loading import load_exported
from lightning_light.nas import BlockChoices, ChannelChoices, RankChoices, SearchResult, SearchTable
from lightning_light.nas.apply import apply_items
from lightning_light.nas.costs import Meter
from lightning_light.nas.evaluation import Evaluator, split_batches
from lightning_light.nas.sensitivity import fill_table
from lightning_light.nas.solver import Solver
from lightning_light.nas.table import savings_of
from lightning_light.report.figures import svg

SPACE = [
    BlockChoices(),
    ChannelChoices((0.75, 0.5, 0.25), targets="layer*.conv1"),
    RankChoices((0.5, 0.33, 0.25), targets="layer*.conv?"),
]
KINDS = {"joint": {"blocks", "channels", "ranks"}, "blocks": {"blocks"}, "ranks": {"ranks"}, "channels": {"channels"}}
RESULTS = Path(__file__).parent / "results" / "search.json"
RECIPE, RUNTIME = ll.Int8(engine="onnx"), ll.ONNX()


class Search:
    """The table, and the assignments that are found with it."""

    def __init__(self, dense: nn.Module, data: TensorDataset, table: Path) -> None:
        L.seed_everything(0, verbose=False)
        self.dense, self.example = dense, ExampleInput.of(EXAMPLE)
        self.parts = split_batches("search", dense, DataLoader(data, 128, shuffle=True), 2, 4)
        self.evaluator = Evaluator(dense, self.example, SPACE, *self.parts)
        self.meter = Meter([ll.Latency(1.0, runtime=RUNTIME), ll.Size("1 GB")], self.example, RUNTIME, RECIPE)
        items = [item for choices in SPACE for item in choices.items(dense, self.example)]
        self.table = SearchTable.open("search", table, self.evaluator.digest(), items)
        fill_table(self.table, self.evaluator, self.meter, RECIPE, progress_bar=True)

    def count(self) -> None:
        """Replace the costs by multiply-accumulates, which shapes alone decide."""
        self.meter = Meter([ll.MACs(1.0)], self.example, None, None)
        shapes = Evaluator(self.dense, self.example, SPACE, (), ())
        table = replace(self.table, costs=self.meter.count(self.dense), path=None)
        found = {i.name: savings_of(table, self.meter.count(shapes.changed([i]))) for i in table.items}
        self.table = replace(table, savings=found)

    def assignment(self, kind: str, limits: dict[str, float], evaluations: int, figure: Path | None) -> dict[str, Any]:
        """Return the items of the best network, with what it costs, or the least that the kind can reach."""
        mine = replace(self.table, items=[i for i in self.table.items if i.kind in KINDS[kind]], path=None)
        dense = self.table.costs
        goals = {quantity: fraction * dense[quantity] for quantity, fraction in limits.items()}
        recipe = RECIPE if self.meter.of_file else None
        solver = Solver("search", mine, self.evaluator, self.meter, goals, recipe, 0)
        try:
            solver.check_reachable()
            best = solver.solve(evaluations, progress_bar=True)
        except ll.BudgetError as error:
            return {"error": str(error)}
        if figure is not None:
            predicted, evaluated = solver.predicted(best.items), tuple(solver.evaluated)
            result = SearchResult(best.items, True, mine, goals, predicted, best.costs, best.score, evaluated)
            figure.write_text(svg(result.figure()))
        return {
            "items": [item.name for item in best.items],
            "costs": {key: best.costs[key] / dense[key] for key in goals},
            "changed": best.score.changed,
            "evaluated": len(solver.evaluated),
        }

    def network(self, names: list[str]) -> nn.Module:
        """Return a copy of the dense network with the items carried out."""
        small = copy.deepcopy(self.dense)
        items = [item for item in self.table.items if item.name in names]
        apply_items(small, self.example, SPACE, items, calls=self.parts[0])
        return small

    def file_accuracy(self, net: nn.Module, test: TensorDataset, path: Path) -> float:
        """Quantize a copy after training, write its file, and run that over the test images."""
        net = copy.deepcopy(net).eval()
        ll.quantize(net, self.parts[0][0], RECIPE, data=self.parts[0], progress_bar=False)
        with ll.fake_quantized(net):
            ll.export_model(net, EXAMPLE, path, exporter=RUNTIME, batch="one", latency_runs=1)
        run = load_exported(path, exporter=RUNTIME, batch="one")
        right = sum(int(run(x[None]).argmax(1) == y) for x, y in test)
        return right / len(test)


@torch.no_grad()
def targets_of(dense: nn.Module, data: TensorDataset, path: Path) -> Tensor:
    """Return the log probabilities of the dense network, shape ``(2, images, classes)``: plain and flipped images."""
    if not path.exists():
        images = data.tensors[0].split(500)
        found = [torch.cat([dense(x.flip(-1) if flip else x) for x in images]) for flip in (False, True)]
        torch.save(torch.stack(found).log_softmax(2), path)
    return torch.load(path, weights_only=True)


def recover(net: nn.Module, images: Tensor, targets: Tensor, steps: int, lr: float, seed: int) -> None:
    """Train ``steps`` batches of 128 images, in channels-last format under bfloat16 mixed precision."""
    L.seed_everything(seed, verbose=False)
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    order = torch.cat([torch.randperm(len(images)) for _ in range(steps * 128 // len(images) + 1)])
    for chosen in order[: steps * 128].split(128):
        flipped = torch.rand(len(chosen)) < 0.5
        x = images[chosen]
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        target = targets[flipped.long(), chosen]
        loss = F.kl_div(out.float().log_softmax(1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().to(memory_format=torch.contiguous_format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the table and of files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=0.7, help="of the dense int8 file")
    parser.add_argument("--bytes", type=float, default=0.8, help="of the dense int8 file")
    parser.add_argument("--macs", type=float, help="of the dense network, in place of the file's latency and size")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--steps", type=int, default=390, help="of recovery; 390 are one epoch")
    parser.add_argument("--lr", type=float, default=0.05, help="of recovery, the largest")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--figure", type=Path, help="SVG of the networks that the joint search compares")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="of the recovery")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}

    def keep(key: str, compute: Any) -> Any:
        """Return a result, computed if the file does not have it."""
        if key not in results:
            started = time.process_time()
            found = compute()
            results[key] = {**found, "processor_seconds": round(time.process_time() - started, 1)}
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(args.results) as part:
                part.write_text(json.dumps(results, indent=1))
        print(key, json.dumps(results[key]), flush=True)
        return results[key]

    data, dense = read(args.data), cifar_resnet(20).eval()
    dense.load_state_dict(torch.load(args.weights, weights_only=True))
    targets = targets_of(dense, data["train"], args.work / "targets.pt")
    started = time.process_time()
    search = Search(dense, data["train"], args.work / "table.json")
    print(f"{len(search.table.items)} choices, {time.process_time() - started:.0f} s; {search.table.costs}", flush=True)
    file = args.work / "network.onnx"
    test = TensorDataset(*(tensor[: args.test_images] for tensor in data["test"].tensors))

    def recovered(items: list[str], seed: int) -> dict[str, float]:
        small = search.network(items)
        recover(small, data["train"].tensors[0], targets, args.steps, args.lr, seed)
        found = {"float": accuracy(small, test)} if "macs" in limits else {}
        return {**found, "after": search.file_accuracy(small, test, file)}

    limits = {"seconds": args.seconds, "bytes": args.bytes}
    if args.macs is not None:
        limits = {"macs": args.macs}
        search.count()
    budget = ", ".join(f"{quantity} {limit:g}" for quantity, limit in limits.items())
    rate = "" if args.lr == parser.get_default("lr") else f" lr {args.lr:g},"
    found = {}
    for kind in args.kinds:
        figure = args.figure if kind == "joint" else None
        found[kind] = keep(f"{budget}: {kind}", lambda: search.assignment(kind, limits, args.evaluations, figure))  # noqa: B023
    for seed in args.seeds:
        for kind, one in found.items():
            if "items" in one:
                name = f"{budget}: {kind}, {args.steps} steps,{rate} seed {seed}"
                keep(name, lambda one=one, seed=seed: recovered(one["items"], seed))
    keep(f"dense, {len(test)} images", lambda: {"after": search.file_accuracy(dense, test, file), **search.table.costs})


if __name__ == "__main__":
    main()
