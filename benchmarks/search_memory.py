"""Measure the peak memory of a search, in sizes of the network.

    MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python benchmarks/search_memory.py

The resident memory of the process is read every two milliseconds; the network itself counts as one. The variable of the
environment lets the C library return every freed tensor at once.
"""

import argparse
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.nas import BlockChoices

CASES = {
    "multiply-accumulates": (ll.MACs(0.9), []),
    "bytes of a float file": (ll.Size("1 GB"), []),
    "latency of a float file": (ll.Latency("10 s", runtime=ll.ONNX()), []),
    "bytes of an int8 file": (ll.Size("1 GB"), [ll.Int8(engine="onnx")]),
    "latency of an int8 file": (ll.Latency("10 s", runtime=ll.ONNX()), [ll.Int8(engine="onnx")]),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.wide(x).relu())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """Return the resident memory before ``run``, and the most during it."""
    gc.collect()
    start, most, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    ended.set()
    thread.join()
    return start, most[0]


def search(name: str, width: int, blocks: int) -> float:
    """Search among the blocks of a network; return its peak memory."""
    budget, recipe = CASES[name]
    net = nn.Sequential(nn.Linear(64, width), *[Block(width) for _ in range(blocks)], nn.Linear(width, 10)).eval()
    data = list(torch.randn(3, 4, 64))
    runtime = None if name == "multiply-accumulates" else ll.ONNX()
    options = {"space": [BlockChoices(), *recipe], "runtime": runtime, "evaluations": 0, "dry_run": True}
    start, most = peak(lambda: ll.search(net, data[0], budget, data=data, progress_bar=False, **options))
    return 1 + (most - start) / sum(4 * tensor.numel() for tensor in net.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    for name in CASES:  # loads the libraries
        search(name, 8, 1)
    for name in CASES:
        print(f"{name}: {search(name, args.width, args.blocks):.2f} networks", flush=True)


if __name__ == "__main__":
    main()
