"""Replace convolutions of a CIFAR-10 ResNet by lighter operators, beside channel pruning and low rank at equal MACs.

    python benchmarks/substitution.py --data cifar10.npz --weights resnet20_cifar10.pt --kinds mixed channels

No training; operators are fitted and scored, and batch-norm statistics corrected, on 8 batches of 16 training images.
``--steps`` adds a short recovery. Latency: of the ONNX file, one thread, the median of
5 measurements in turns, over the dense network's.
"""

import argparse
import copy
import time
from pathlib import Path

import lightning as L
import torch
from cifar_resnet import EXAMPLE, Classifier, accuracy, macs, read
from depth import latencies
from nets import cifar_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.substitution import DepthwiseSeparable, Fire, Ghost, GroupShuffle, InvertedResidual

KINDS = {
    "depthwise": [DepthwiseSeparable(multiplier) for multiplier in (1, 2, 3, 4)],
    "group": [GroupShuffle(2), GroupShuffle(4)],
    "ghost": [Ghost(2), Ghost(4)],
    "fire": [Fire(0.25), Fire(0.5), Fire(0.75)],
    "inverted": [InvertedResidual(1.0), InvertedResidual(2.0)],
    "mixed": [DepthwiseSeparable(1), DepthwiseSeparable(4), GroupShuffle(2), Ghost(2), Fire(0.5), Fire(0.75)],
}


def compressed(kind: str, net: nn.Module, budget: ll.MACs, batches: list[Tensor], fit_steps: int) -> nn.Module:
    """Compress a copy of ``net``."""
    net = copy.deepcopy(net)
    if kind == "channels":
        ll.prune_channels(net, EXAMPLE, budget, data=batches)
    elif kind == "low rank":
        ll.factorize(net, EXAMPLE, budget, data=batches)
    else:
        plan = ll.substitute_operators(net, EXAMPLE, budget, operators=KINDS[kind], data=batches, fit_steps=fit_steps)
        chosen = [type(operator).__name__ for operator in plan.operators.values()]
        print(f"{kind}: {', '.join(f'{chosen.count(name)} {name}' for name in sorted(set(chosen)))}", flush=True)
    return net


def recovered(net: nn.Module, train: TensorDataset, steps: int) -> nn.Module:
    """Train ``net`` for some steps of 128 images."""
    module = Classifier(net.train(), 0.02)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=steps, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True))
    return module.net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--remaining", type=float, default=0.5)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "channels", "low rank"], default=[*KINDS, "channels"])
    parser.add_argument("--fit-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of recovery")
    parser.add_argument("--test-images", type=int, default=10_000)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = read(args.data)
    test = TensorDataset(*(tensor[: args.test_images] for tensor in data["test"].tensors))
    net = cifar_resnet(args.depth).eval()
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    batches = [x for (x, _), _ in zip(DataLoader(data["train"], 16, shuffle=True), range(8), strict=False)]
    nets, seconds = {"dense": net}, {"dense": 0.0}
    for kind in args.kinds:
        started = time.perf_counter()
        nets[kind] = compressed(kind, net, ll.MACs(args.remaining), batches, args.fit_steps)
        seconds[kind] = time.perf_counter() - started
    times, dense = latencies(nets), macs(net)
    print("| | MACs | latency | test accuracy | after recovery | seconds |\n|---|---|---|---|---|---|")
    for name, small in nets.items():
        before = accuracy(small, test)
        after = f"{accuracy(recovered(small, data['train'], args.steps), test):.2%}" if args.steps else ""
        row = f"{macs(small) / dense:.3f} | {times[name] / times['dense']:.2f} | {before:.2%} | {after}"
        print(f"| {name} | {row} | {seconds[name]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
