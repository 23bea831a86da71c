"""Cost of a training step with fake quantization: ours, FX's `prepare_qat_fx`, PT2E's `prepare_qat_pt2e`, and float.

    python benchmarks/qat.py --rounds 30

All ways train copies of one network in one process, a step of each in turn; a round's overhead is a way's time over the
float step of the same round, less one. Observers observe and tensors are fake-quantized in all. Times are processor
times of one thread, which other processes on the machine change less than wall times.

Then what a validation batch costs: its time over the forward pass of a training batch, both fake-quantized.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from nets import cifar_resnet
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

import lightning_light as ll
from lightning_light.example_input import ExampleInput
from lightning_light.quantization.checkpoint_state import attach_fake_quantizer, begin, merge

SHAPES = {"resnet20": (3, 32, 32), "perceptron": (256,)}


def network(name: str) -> nn.Module:
    if name == "resnet20":
        return cifar_resnet(20)
    return nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, 10))


def ours(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """What `QuantizationAwareTraining` does at the end of a batch; its hooks do the rest."""
    state = {}
    begin(state, net, ExampleInput((x[:2],)), ll.Int8())
    quantizer = attach_fake_quantizer(net, state)
    quantizer.observing = True

    def after_batch() -> None:
        merge(state, quantizer, quantizer.observer.take(torch.device("cpu")), quantizer.observer.momentum)

    net(x)
    after_batch()
    quantizer.enabled = True
    return after_batch


def fx(net: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("x86"), (x,))


def pt2e(net: nn.Module, x: Tensor) -> nn.Module:
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(net.train(), (x,)).module()
    prepared = quantize_pt2e.prepare_qat_pt2e(exported, quantizer)
    return (
        quantize_pt2e.move_exported_model_to_train(prepared)
        if hasattr(quantize_pt2e, "move_exported_model_to_train")
        else prepared
    )


def step(net: nn.Module, x: Tensor, after_batch: Callable[[], None] | None) -> float:
    started = time.process_time()
    net(x).square().mean().backward()
    if after_batch is not None:
        after_batch()
    taken = time.process_time() - started
    for parameter in net.parameters():
        parameter.grad = None
    return taken


def evaluation(net: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Of each round: the time of a validation batch over the forward pass of a training batch."""
    ratios = []
    for turn in range(rounds + 3):
        started = time.process_time()
        net.train()(x)
        between = time.process_time()
        with torch.no_grad():
            net.eval()(x)
        if turn >= 3:
            ratios.append((time.process_time() - between) / (between - started))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in args.nets:
        torch.manual_seed(0)
        base, x = network(name).train(), torch.randn(args.batch, *SHAPES[name])
        quantized = copy.deepcopy(base)
        ways = {
            "float": (base, None),
            "ours": (quantized, ours(quantized, x)),
            "FX": (fx(copy.deepcopy(base), x), None),
            "PT2E": (pt2e(copy.deepcopy(base), x), None),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(args.rounds + 3):
            for way, (net, after_batch) in ways.items():
                taken = step(net, x, after_batch)
                if turn >= 3:
                    times[way].append(taken)
        print(f"{name}, batch {args.batch}, {args.rounds} rounds, torch {torch.__version__}")
        print("| | step, ms | overhead over float: median (quartiles) |\n|---|---|---|")
        over = {way: [a / b - 1 for a, b in zip(times[way], times["float"], strict=True)] for way in ways}
        for way in ways:
            low, middle, high = statistics.quantiles(over[way], n=4)
            print(f"| {way} | {1e3 * statistics.median(times[way]):.1f} | {middle:.1%} ({low:.1%} to {high:.1%}) |")
        ratios = [min(a, b) / c for a, b, c in zip(over["FX"], over["PT2E"], over["ours"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"the better peer's overhead over ours, of each round: {middle:.2f} ({low:.2f} to {high:.2f})")
        low, middle, high = statistics.quantiles(evaluation(quantized, x, args.rounds), n=4)
        print(f"a validation batch over the forward pass of a training batch: {middle:.2f} ({low:.2f} to {high:.2f})")
        print(flush=True)


if __name__ == "__main__":
    main()
