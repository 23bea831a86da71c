"""Search widths, ranks and depth of a CIFAR-10 ResNet-20 under the latency and the size of its int8 file.

    python benchmarks/search.py --data cifar10.npz --weights resnet20_cifar10.pt --table resnet20.json --seconds 0.7

Each kind of choice alone, and all jointly. Budgets are fractions of the dense network's int8 file in ONNX Runtime, one
thread; printed are those of the measured files. The table is kept, so that a second budget needs no new one. Recovery:
SGD, the dense network as teacher, the same for every row. Accuracies are those of the network in float.
"""

import argparse
import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from cifar_resnet import EXAMPLE, accuracy, read
from nets import cifar_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.example_input import ExampleInput
from lightning_light.nas import BlockChoices, ChannelChoices, RankChoices, SearchTable
from lightning_light.nas.costs import Meter
from lightning_light.nas.evaluation import Evaluator, split_batches
from lightning_light.nas.sensitivity import fill_table
from lightning_light.nas.solver import Solver

SPACE = [
    BlockChoices(),
    ChannelChoices((0.5, 0.25), targets="layer*.conv1"),
    RankChoices((0.5, 0.33, 0.25), targets="layer*.conv?"),
]
KINDS = {"blocks": {"blocks"}, "channels": {"channels"}, "ranks": {"ranks"}, "joint": {"blocks", "channels", "ranks"}}


def recover(net: nn.Module, dense: nn.Module, data: TensorDataset, steps: int) -> None:
    """Train with the dense network as teacher, on flipped images."""
    L.seed_everything(1, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps + 1)
    net.train()
    for x, _ in itertools.islice(DataLoader(data, 128, shuffle=True), steps):
        images = x.flip(-1) if torch.rand(()) < 0.5 else x
        with torch.no_grad():
            target = F.log_softmax(dense(images), 1)
        loss = F.kl_div(F.log_softmax(net(images), 1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.7, help="of the dense int8 file")
    parser.add_argument("--bytes", type=float, default=0.7, help="of the dense int8 file")
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="of recovery; 0 for none")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = read(args.data)
    test = TensorDataset(*(tensor[: args.test_images] for tensor in data["test"].tensors))
    net = cifar_resnet(20).eval()
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    dense = copy.deepcopy(net)
    started, example, recipe, runtime = time.process_time(), ExampleInput.of(EXAMPLE), ll.Int8(engine="onnx"), ll.ONNX()
    parts = split_batches("search", net, DataLoader(data["train"], 128, shuffle=True), 2, 4)
    evaluator = Evaluator(net, example, SPACE, *parts)
    meter = Meter([ll.Latency(1.0, runtime=runtime), ll.Size("1 GB")], example, runtime, recipe)
    items = [item for choices in SPACE for item in choices.items(net, example)]
    table = SearchTable.open("search", args.table, evaluator.digest(), items)
    fill_table(table, evaluator, meter, recipe, progress_bar=True)
    print(f"{len(items)} choices, {time.process_time() - started:.0f} s of processor time; {table.costs}", flush=True)
    print(
        f"dense: {accuracy(dense, test):.2%}\n| | seconds | bytes | predictions changed | test | after |\n{'|---' * 6}|"
    )
    goals = {"seconds": args.seconds * table.costs["seconds"], "bytes": args.bytes * table.costs["bytes"]}
    for name in args.kinds:
        kinds = KINDS[name]
        mine = replace(table, items=[item for item in items if item.kind in kinds], path=None)
        solver = Solver("search", mine, evaluator, meter, goals, recipe, 0)
        try:
            solver.check_reachable()
            best = solver.solve(args.evaluations, progress_bar=True)
        except ll.BudgetError as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        small = evaluator.changed(best.items)
        before = accuracy(small, test)
        if args.steps:
            recover(small, dense, data["train"], args.steps)
        costs = " | ".join(f"{best.measured[key] / table.costs[key]:.3f}" for key in ("seconds", "bytes"))
        row = f"{costs} | {best.score.changed:.3f} | {before:.2%} | {accuracy(small, test):.2%}"
        print(f"| {name} | {row} | {len(best.items)} items, {solver.evaluated} networks", flush=True)


if __name__ == "__main__":
    main()
