"""Time dependency tracing in process time, with torch-pruning's graph beside it.

    python benchmarks/tracing.py [--nets ResNet-50 ...] [--threads 1]

The small networks have the structures that make tracing slow: sizes, positions and head widths that the code fixes.
torch-pruning is given nothing but the example; a dash stands for a network that it cannot trace.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from imagenet_nets import NETS as IMAGENET
from torch import Tensor, nn

from lightning_light.dependency import trace_dependencies

TORCH_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class Decoder(nn.Module):
    """A decoder block as transformers writes it: the number of heads follows from a fixed ``head_dim``."""

    def __init__(self, width: int = 32, head_dim: int = 8, repeats: int = 1) -> None:
        super().__init__()
        self.head_dim, self.repeats = head_dim, repeats
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // repeats), nn.Linear(width, width // repeats)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        y, (b, n) = self.norm1(x), x.shape[:2]
        q, k, v = (layer(y).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.repeats > 1:
            k, v = (self.repeated(z) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, n, size = x.shape
        return x[:, :, None].expand(b, heads, self.repeats, n, size).reshape(b, heads * self.repeats, n, size)


class FusedAttention(nn.Module):
    """Attention of a vision transformer as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SplitAttention(nn.Module):
    """Attention of LeViT: keys narrower than values, positions from a table of biases."""

    def __init__(self, width: int, heads: int, key_dim: int, value_dim: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.qkv = nn.Linear(width, heads * (2 * key_dim + value_dim), bias=False)
        self.bn = nn.BatchNorm1d(heads * (2 * key_dim + value_dim))
        self.proj, self.bn2 = nn.Linear(heads * value_dim, width, bias=False), nn.BatchNorm1d(width)
        self.biases = nn.Parameter(torch.zeros(heads, tokens))
        offsets = torch.arange(tokens)
        self.register_buffer("offsets", (offsets[:, None] - offsets).abs())

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x)
        y = self.bn(y.flatten(0, 1)).reshape_as(y)
        q, k, v = y.view(b, n, self.heads, -1).split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        scores = q @ k * self.key_dim**-0.5 + self.biases[:, self.offsets]
        y = self.proj(F.hardswish((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.value_dim)))
        return x + self.bn2(y.flatten(0, 1)).reshape_as(y)


class Slices(nn.Module):
    """A block of Res2Net: convolutions on slices of fixed width, one added to the next."""

    def __init__(self, width: int = 64, slices: int = 4) -> None:
        super().__init__()
        self.size = width // slices
        self.first, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.inner = nn.ModuleList(nn.Conv2d(self.size, self.size, 3, padding=1) for _ in range(slices - 1))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.norm(self.first(x)), self.size, dim=1)
        done = [parts[0]]
        for number, layer in enumerate(self.inner):
            done.append(layer(parts[number + 1] + (done[-1] if number else 0)))
        return F.relu(x + self.last(torch.cat(done, dim=1)))


class PartialShortcut(nn.Module):
    """A block of ReXNet: the shortcut is added to the first channels of a wider output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.up, self.down = nn.Conv2d(inputs, 6 * inputs, 1, bias=False), nn.Conv2d(6 * inputs, outputs, 1, bias=False)
        self.depthwise = nn.Conv2d(6 * inputs, 6 * inputs, 3, padding=1, groups=6 * inputs, bias=False)
        self.norm = nn.BatchNorm2d(6 * inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.relu6(self.norm(self.depthwise(F.silu(self.up(x))))))
        return torch.cat([y[:, : self.inputs] + x, y[:, self.inputs :]], dim=1)


class Shuffle(nn.Module):
    """A block of ShuffleNetV2: half of the channels pass, then all are shuffled."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.Conv2d(half, half, 1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.branch(right)], dim=1)
        b, c, height, width = y.shape
        return y.view(b, 2, c // 2, height, width).transpose(1, 2).contiguous().view(b, c, height, width)


class Image(nn.Module):
    """A stem, a body on feature maps or on tokens, and a classifier."""

    def __init__(self, width: int, body: nn.Module, outputs: int | None = None, *, tokens: bool = False) -> None:
        super().__init__()
        self.stem, self.body, self.tokens = nn.Conv2d(3, width, 4, 4), body, tokens
        self.head = nn.Linear(outputs or width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(x.flatten(2).transpose(1, 2) if self.tokens else x)
        return self.head(x.mean(1) if self.tokens else x.mean((2, 3)))


def decoders(depth: int, repeats: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Embedding(64, 32), *(Decoder(repeats=repeats) for _ in range(depth)), nn.RMSNorm(32), nn.Linear(32, 64)
    )


def stacked(width: int, blocks: Callable[[], list[nn.Module]], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Image(width, nn.Sequential(*blocks()), **options)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "Res2Net-like": stacked(64, lambda: [Slices() for _ in range(6)]),
    "ReXNet-like": stacked(16, lambda: [PartialShortcut(16 + 4 * i, 20 + 4 * i) for i in range(8)], outputs=48),
    "ShuffleNetV2-like": stacked(48, lambda: [Shuffle() for _ in range(6)]),
    "LeViT-like": stacked(64, lambda: [SplitAttention(64, 4, 8, 16, 64) for _ in range(6)], tokens=True),
    "ViT-like": stacked(64, lambda: [FusedAttention(64, 4) for _ in range(6)], tokens=True),
    **{f"decoder, {depth} blocks": decoders(depth) for depth in (2, 4, 8, 16, 32)},
    "decoder, grouped queries, 8 blocks": decoders(8, repeats=2),
}
NETS = {**IMAGENET, **SMALL}


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """A network and its example input."""
    torch.manual_seed(0)
    size = 224 if name.startswith("ViT-B") else 64 if name in IMAGENET else 32
    example = torch.randint(64, (2, 7)) if name.startswith("decoder") else torch.randn(2, 3, size, size)
    return NETS[name](), example


def ours(name: str) -> tuple[float, int, int]:
    """Seconds, groups, and groups that can be pruned."""
    model, example = prepared(name)
    started = time.process_time()
    graph = trace_dependencies(model, (example,))
    seconds = time.process_time() - started
    return seconds, len(graph.groups), sum(group.reason is None for group in graph.groups)


def theirs(name: str) -> str:
    """Seconds of torch-pruning's graph alone."""
    model, example = prepared(name)
    started = time.process_time()
    try:
        torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    except TORCH_ERRORS:
        return "-"
    return f"{time.process_time() - started:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| network | torch-pruning's graph | ours | groups | can be pruned |\n|---|---|---|---|---|")
    for name in arguments.nets:
        seconds, groups, free = ours(name)
        print(f"| {name} | {theirs(name)} | {seconds:.2f} s | {groups} | {free} |", flush=True)


if __name__ == "__main__":
    main()
