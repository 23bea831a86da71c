"""Prune CIFAR-10 ResNets in one cut by magnitude, Taylor and learned gates; no weight is trained.

    python benchmarks/gates.py --data cifar10.npz --weights resnet20_cifar10.pt --depth 20 --remaining 0.5

``--data`` and ``--weights`` as in ``cifar_resnet.py``. All criteria read the same batches of 64 images, randomly
cropped and flipped; the correction of batch-norm statistics uses 16 others, of 128. Processor time of one thread; 2 GB
of memory.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_resnet import EXAMPLE, accuracy, read
from nets import MEAN, STANDARD_DEVIATION, cifar_resnet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_light as ll
from lightning_light.batch_norm import measure_statistics, move_statistics
from lightning_light.criteria import LearnedGates
from lightning_light.dependency import trace_dependencies
from lightning_light.example_input import ExampleInput

BLACK = -(torch.tensor(MEAN) / torch.tensor(STANDARD_DEVIATION)).view(3, 1, 1)


class Batches:
    """Batches of one epoch in the order of ``seed``; each image, padded black, has its own crop and flip."""

    def __init__(self, data: TensorDataset, seed: int, size: int = 64) -> None:
        self.data, self.seed, self.size = data, seed, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = self.data.tensors
        for index in torch.randperm(len(labels), generator=generator).split(self.size):
            x = F.pad(images[index] - BLACK, (4, 4, 4, 4)) + BLACK
            top, left = torch.randint(9, (2, len(x), 1), generator=generator)
            flipped = torch.rand(len(x), 1, generator=generator) < 0.5
            rows, columns = top + torch.arange(32), left + torch.arange(32)
            columns = torch.where(flipped, columns.flip(1), columns)
            sample = torch.arange(len(x))[:, None, None]
            yield (
                x.movedim(1, -1)[sample, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous(),
                labels[index],
            )


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy against the labels, for Taylor."""
    return F.cross_entropy(output, batch[1])


def row(net: nn.Module, criterion: ll.criteria.Criterion, seed: int, args: argparse.Namespace, data: dict) -> str:
    """Prune a copy of ``net``: accuracy with the statistics as they were, and corrected."""
    pruned, started = copy.deepcopy(net), time.process_time()
    graph = trace_dependencies(net, (EXAMPLE,))
    plan = ll.prune_channels(
        pruned,
        EXAMPLE,
        ll.MACs(args.remaining),
        criterion=criterion,
        data=Batches(data["train"], seed),
        loss=loss,
        correct_batch_norm=False,
        graph=graph,
    )
    seconds = time.process_time() - started
    raw = accuracy(pruned, data["test"])
    calls = [ExampleInput((x,)) for x, _ in islice(Batches(data["train"], 1000 + seed, 128), 16)]
    before, after = measure_statistics(net, calls), measure_statistics(pruned, calls)
    move_statistics(pruned, before, after, graph.kept_positions(plan.kept))
    left = f"{plan.after / plan.before:.3f}"
    return f"{left} | {raw:.2%} | {accuracy(pruned, data['test']):.2%} | {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--remaining", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the batches; one row each")
    parser.add_argument("--steps", type=int, default=LearnedGates.steps)
    parser.add_argument("--criteria", nargs="+", default=["dense", "magnitude", "taylor", "gates"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read(args.data)
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    net.eval()
    criteria = {"magnitude": ll.Magnitude(), "taylor": ll.Taylor(), "gates": LearnedGates(args.steps)}
    dense = f", dense {accuracy(net, data['test']):.2%}" if "dense" in args.criteria else ""
    print(f"ResNet-{args.depth}, MACs({args.remaining}){dense}")
    print("| criterion | MACs | statistics as they were | corrected | choice |\n|---|---|---|---|---|")
    for name in (name for name in args.criteria if name in criteria):
        for seed in args.seeds[: 1 if name == "magnitude" else None]:
            print(f"| {criteria[name]!r}, seed {seed} | {row(net, criteria[name], seed, args, data)} |", flush=True)


if __name__ == "__main__":
    main()
