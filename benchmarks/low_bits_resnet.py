"""A CIFAR-10 ResNet in fewer bits, trained on from float weights: top-1 of all test images, as the Trainer computes it.

    python benchmarks/low_bits_resnet.py --data cifar10.npz --weights resnet20_cifar10.pt --recipe int8 --epochs 1

``--data`` and ``--weights`` as in ``cifar_resnet.py``. Weights of four bits and fewer keep the first and the last layer
at eight, as the papers do.
"""

import argparse
import copy
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from cifar_resnet import Classifier, accuracy, read
from nets import CIFARResNet, cifar_resnet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll


class OwnCrops(Classifier):
    """Every image has a crop and a flip of its own, as the statistics of batch norms ask for."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        count = len(batch[0])
        padded = F.pad(batch[0], (4, 4, 4, 4))
        rows, columns = (torch.randint(9, (count, 1)) + torch.arange(32) for _ in range(2))
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        crops = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return F.cross_entropy(self(crops.permute(0, 3, 1, 2)), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("top1", (self(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True)


class LookAtFirst(L.Callback):
    """Top-1 when fake quantization has just begun."""

    def __init__(self, after: int, data: TensorDataset) -> None:
        self.after, self.data, self.top1 = after, data, ""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after and not self.top1:
            self.top1 = f"{accuracy(pl_module, self.data):.2%}"
            pl_module.train()


def training_options(parser: argparse.ArgumentParser, epochs: int) -> None:
    """What `trained` and `trained_on` read."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=epochs, help="of training with fake quantization")
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--freeze", type=float, default=0.9, help="observers and batch norms, from this share on")
    parser.add_argument("--observe", type=int, default=32, help="batches that are observed at first")
    parser.add_argument("--precision", default="32-true", help="of training; all accuracies are in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", action="store_true", help="distill from the float network")


def trained(args: argparse.Namespace) -> CIFARResNet:
    """The float network."""
    net = cifar_resnet(args.depth)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    return net


def trained_on(
    net: CIFARResNet, recipe: ll.recipes.Recipe, data: dict[str, TensorDataset], args: argparse.Namespace
) -> tuple[OwnCrops, float, str]:
    """Trained with fake quantization: the module, the Trainer's top-1 of all test images, and what it was at first."""
    L.seed_everything(args.seed, verbose=False)
    teachers = [ll.KnowledgeDistillation(copy.deepcopy(net))] if args.teacher else []
    module = OwnCrops(net.train().to(memory_format=torch.channels_last), args.lr)  # a Trainer leaves evaluation as is
    qat = ll.QuantizationAwareTraining(
        recipe, start=0.0, calibration_batches=args.observe, freeze_observers=args.freeze, freeze_batch_norm=args.freeze
    )
    look = LookAtFirst(args.observe, data["test"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    train = TensorDataset(*(tensor[: args.images] for tensor in data["train"].tensors))
    trainer = L.Trainer(max_epochs=args.epochs, callbacks=[*teachers, qat, look], precision=args.precision, **quiet)
    trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
    tester = L.Trainer(callbacks=[qat], **quiet)
    (found,) = tester.test(module, DataLoader(data["test"], 500), verbose=False)
    return module, found["top1"], look.top1


def ends_at_eight(recipe: ll.recipes.Recipe) -> ll.MixedPrecision:
    """The papers' convention."""
    return ll.MixedPrecision(default=recipe, first=ll.Int8(), last=ll.Int8())


RECIPES = {
    "int8": ll.Int8(),
    "int8-x86": ll.Int8(engine="x86"),
    "w4a8": ends_at_eight(ll.IntN(4, 8)),
    "w4a4": ends_at_eight(ll.IntN(4, 4)),
    "lsq4": ends_at_eight(ll.LSQ(4, 4)),
    "lsq4-dampened": ends_at_eight(ll.LSQ(4, 4, dampening=0.01)),
    "lsq+4": ends_at_eight(ll.LSQ(4, 4, offset=True)),
    "pact4": ends_at_eight(ll.recipes.PACT(4, 4)),
    "lsq2-dampened": ends_at_eight(ll.LSQ(2, 2, dampening=0.01)),
    "lsq2": ends_at_eight(ll.LSQ(2, 2)),
    "ternary": ends_at_eight(ll.recipes.Ternary()),
    "binary": ends_at_eight(ll.recipes.Binary()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, epochs=1)
    parser.add_argument("--recipe", nargs="+", default=["int8"], choices=RECIPES)
    args = parser.parse_args()

    data = read(args.data)
    settings = f"lr {args.lr}, frozen from {args.freeze}, seed {args.seed}, {args.precision}"
    settings += ", teacher: the float network" * args.teacher
    print(f"ResNet-{args.depth}, {args.epochs} epochs of {args.images} images, {settings}")
    print("| | at first | after training | minutes |\n|---|---|---|---|")
    print(f"| float | {accuracy(trained(args), data['test']):.2%} | | |", flush=True)
    for name in args.recipe:
        started = time.perf_counter()
        _, right, at_first = trained_on(trained(args), RECIPES[name], data, args)
        minutes = (time.perf_counter() - started) / 60
        print(f"| {name} | {at_first} | {right:.2%} | {minutes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
