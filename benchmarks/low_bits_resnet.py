"""A CIFAR-10 ResNet in fewer bits, trained on from float weights: top-1 of all test images, as the Trainer computes it.

    python benchmarks/low_bits_resnet.py --data cifar10.npz --weights resnet20_cifar10.pt --recipe int8 --epochs 1

``--data`` and ``--weights`` as in ``cifar_resnet.py``. Weights of four bits and fewer keep the first and the last layer
at eight, as the papers do.
"""

import argparse
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from cifar_resnet import Classifier, accuracy, read
from nets import cifar_resnet
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


def ends_at_eight(recipe: ll.Recipe) -> ll.Mixed:
    """The papers' convention."""
    return ll.Mixed(default=recipe, first=ll.Int8(), last=ll.Int8())


RECIPES = {
    "int8": ll.Int8(),
    "int8-x86": ll.Int8(engine="x86"),
    "w4a8": ends_at_eight(ll.IntN(4, 8)),
    "w4a4": ends_at_eight(ll.IntN(4, 4)),
    "lsq4": ends_at_eight(ll.LSQ(4, 4)),
    "lsq+4": ends_at_eight(ll.LSQ(4, 4, offset=True)),
    "pact4": ends_at_eight(ll.PACT(4, 4)),
    "lsq2": ends_at_eight(ll.LSQ(2, 2)),
    "ternary": ends_at_eight(ll.Ternary()),
    "binary": ends_at_eight(ll.Binary()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--recipe", nargs="+", default=["int8"], choices=RECIPES)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--freeze", type=float, default=0.9, help="observers and batch norms, from this share on")
    parser.add_argument("--observe", type=int, default=32, help="batches that are observed at first")
    parser.add_argument("--precision", default="32-true", help="of training; all accuracies are in float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = read(args.data)
    train = TensorDataset(*(tensor[: args.images] for tensor in data["train"].tensors))
    settings = f"lr {args.lr}, frozen from {args.freeze}, seed {args.seed}, {args.precision}"
    print(f"ResNet-{args.depth}, {args.epochs} epochs of {args.images} images, {settings}")
    print("| | at first | after training | minutes |\n|---|---|---|---|", flush=True)
    for name in args.recipe:
        L.seed_everything(args.seed, verbose=False)
        net = cifar_resnet(args.depth)
        net.load_state_dict(torch.load(args.weights, weights_only=True))
        if name == args.recipe[0]:
            print(f"| float | {accuracy(net, data['test']):.2%} | | |", flush=True)
        module = OwnCrops(
            net.train().to(memory_format=torch.channels_last), args.lr
        )  # a Trainer leaves evaluation mode as it is
        qat = ll.QuantizationAwareTraining(
            RECIPES[name], observe_batches=args.observe, freeze_observers=args.freeze, freeze_batch_norm=args.freeze
        )
        at_first: list[float] = []

        class Look(L.Callback):
            """Top-1 when rounding has just begun."""

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == qat.observe_batches and not at_first:  # noqa: B023
                    at_first.append(accuracy(pl_module, data["test"]))  # noqa: B023
                    pl_module.train()

        trainer = L.Trainer(
            max_epochs=args.epochs, callbacks=[qat, Look()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", precision=args.precision,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
        minutes = (time.perf_counter() - started) / 60
        with ll.fake_quantized(module):
            right = accuracy(module, data["test"])
        first = f"{at_first[0]:.2%}" if at_first else ""
        print(f"| {name} | {first} | {right:.2%} | {minutes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
