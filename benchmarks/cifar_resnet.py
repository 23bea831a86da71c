"""Prune CIFAR-10 ResNets with zero-padded shortcuts to half of their MACs, beside torch-pruning's own pruner.

    python benchmarks/cifar_resnet.py --data cifar10.npz --weights resnet20_cifar10.pt --depth 20

``--data`` is an archive with ``x_train`` (n, 32, 32, 3), ``y_train``, ``x_test``, ``y_test`` as bytes. ``--weights`` is
a state dict with the names of akamaster/pytorch_resnet_cifar10.
"""

import argparse
import copy
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from nets import MEAN, STANDARD_DEVIATION, cifar_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.measure import count_cost

EXAMPLE = torch.zeros(1, 3, 32, 32)
BREAKS = (RuntimeError, ValueError, IndexError, AssertionError)


class Classifier(L.LightningModule):
    """Fine-tuning: random crops and flips, SGD, one cosine."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.example_input_array = EXAMPLE

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = F.pad(batch[0], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        x = x[..., top : top + 32, left : left + 32]
        return F.cross_entropy(self(x.flip(-1) if torch.rand(()) < 0.5 else x), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read(path: Path) -> dict[str, TensorDataset]:
    """Normalized images and labels."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STANDARD_DEVIATION))
    sets = {}
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2).float() / 255
        sets[part] = TensorDataset((images - mean) / deviation, torch.from_numpy(arrays[f"y_{part}"]).long())
    return sets


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    """Top-1 accuracy."""
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in DataLoader(data, 500))
    return right / len(data)


def macs(net: nn.Module) -> int:
    """Multiply-accumulates per image."""
    return count_cost(net, (EXAMPLE,), shapes_only=False).macs


def theirs(net: nn.Module, ratio: float) -> nn.Module:
    """torch-pruning's pruner with global ranking, on a copy."""
    net = copy.deepcopy(net)
    pruner = tp.pruner.BasePruner(
        net,
        EXAMPLE,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[net.linear],
        max_pruning_ratio=0.9,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    return net


def by_their_ratio(net: nn.Module, remaining: float) -> nn.Module:
    """Bisection over torch-pruning's channel ratio, which is what it has instead of a budget."""
    low, high, dense = 0.0, 0.9, macs(net)
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(theirs(net, middle)) > remaining * dense else (low, middle)
    return theirs(net, high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--remaining", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning; 0 for none")
    parser.add_argument("--images", type=int, default=50_000, help="training images per epoch")
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = read(args.data)
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    dense, budget = macs(net), ll.MACs(args.remaining)
    print(f"ResNet-{args.depth}, {args.images} images per epoch, lr {args.lr}, torch {torch.__version__}")
    print("| | MACs | test accuracy |\n|---|---|---|")
    print(f"| dense | 1.000 | {accuracy(net, data['test']):.2%} |", flush=True)
    try:
        other = by_their_ratio(net, args.remaining)
        print(f"| torch-pruning, one cut | {macs(other) / dense:.3f} | {accuracy(other, data['test']):.2%} |")
    except BREAKS as error:
        print(f"| torch-pruning, one cut | | fails: {str(error).splitlines()[0]} |")
    for ranking in (ll.structured.Global(), ll.structured.Local()):
        for batches in (None, DataLoader(data["train"], 128)):
            pruned = copy.deepcopy(net)
            ll.prune_channels(pruned, EXAMPLE, budget, ranking=ranking, data=batches)
            name = f"one cut, {type(ranking).__name__}{'' if batches is None else ', batch norm corrected'}"
            print(f"| {name} | {macs(pruned) / dense:.3f} | {accuracy(pruned, data['test']):.2%} |", flush=True)
    if not args.epochs:
        return
    module = Classifier(copy.deepcopy(net).train(), args.lr)  # a Trainer leaves evaluation mode as it is
    train = TensorDataset(*(tensor[: args.images] for tensor in data["train"].tensors))
    pruning = ll.StructuredPruning(budget, schedule=ll.Window(ll.Cubic(), start=0.0, end=0.4))
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
    minutes = (time.perf_counter() - started) / 60
    remaining, right = macs(module.net) / dense, accuracy(module.net, data["test"])
    print(f"| pruned in {args.epochs} epochs of fine-tuning ({minutes:.0f} min) | {remaining:.3f} | {right:.2%} |")


if __name__ == "__main__":
    main()
