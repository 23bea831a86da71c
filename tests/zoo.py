"""Tiny nets, one trap each. ``ZOO[name]()`` builds one; ``args, kwargs = net.example`` calls it.

Every net keeps two samples in the batch and widths that differ, so that an index of the wrong tensor does not fit.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

Example = tuple[tuple[Any, ...], dict[str, Any]]


def noise(*shape: int) -> Tensor:
    """The same numbers at every call, whatever the global seed is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int, below: int) -> Tensor:
    """The same indices at every call."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A net that can say how it is called."""

    @property
    def example(self) -> Example:
        """Arguments and keyword arguments of one call; images unless a net says otherwise."""
        return (noise(2, 3, 8, 8),), {}

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Plain(Net):
    """No trap: convolution, batch norm, convolution, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Residual(Net):
    """Sums couple the layers on both sides: an identity shortcut, then one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))


class PaddedShortcut(Net):
    """A shortcut without parameters: pixels skipped, channels padded by zeros (He et al., option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(x.mean((2, 3)))


class Concat(Net):
    """Branches side by side: the reader's channels come from two layers of unequal width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 10, 1)
        self.bn = nn.BatchNorm2d(24)
        self.merge = nn.Conv2d(24, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(torch.cat([self.left(x), x, self.right(x)], dim=1)))
        return self.fc(F.relu(self.merge(x)).mean((2, 3)))


class Chunk(Net):
    """A gated unit: one layer's channels are cut in two halves that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.merge = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.bn(self.conv(x)).chunk(2, dim=1)
        return self.fc(F.relu(self.merge(value * gate.sigmoid())).mean((2, 3)))


class Depthwise(Net):
    """One filter a channel: inputs and outputs leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pointwise, self.bn2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.stem(x)))
        x = F.relu6(self.bn1(self.depthwise(x)))
        return self.fc(F.relu6(self.bn2(self.pointwise(x))).mean((2, 3)))


class Grouped(Net):
    """Four groups: each must lose as many channels as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped, self.bn = nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.grouped(F.relu(self.stem(x))))).mean((2, 3)))


class ChannelShuffle(Net):
    """A permutation between two grouped layers (ShuffleNet): channels leave by where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped, self.bn = nn.Conv2d(12, 12, 1, groups=2), nn.BatchNorm2d(12)
        self.merge = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.grouped(F.relu(self.stem(x)))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.fc(F.relu(self.merge(x)).mean((2, 3)))


class Transposed(Net):
    """Transposed convolutions hold their inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 12, 2, stride=2), nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn2(self.up(F.relu(self.bn1(self.down(x)))))))


class PixelShuffle(Net):
    """Channels become pixels: four of them are one channel of the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shuffle(self.conv(x))))


class UNet(Net):
    """A skip from the encoder into the decoder, by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.encode2, self.bn2 = nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.decode, self.bn3 = nn.Conv2d(14, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.encode1(x)))
        y = F.relu(self.bn2(self.encode2(F.max_pool2d(x, 2))))
        y = torch.cat([self.up(y), x], dim=1)
        return self.head(F.relu(self.bn3(self.decode(y))))


class SqueezeExcite(Net):
    """A side path scales every channel, so it must keep the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.fc((x * scale).mean((2, 3)))


class ReshapeFlatten(Net):
    """A flattened map: each channel is sixteen columns of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(10 * 4 * 4, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.reshape(x.shape[0], -1))))


class BatchNormFree(Net):
    """No norm, no bias: the weights alone show what a channel is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 12, 3, bias=False)
        self.fc = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class PReLUs(Net):
    """One learned slope a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.slope1 = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.conv2, self.slope2 = nn.Conv2d(8, 12, 3, padding=1), nn.PReLU()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.slope2(self.conv2(self.slope1(self.conv1(x)))).mean((2, 3)))


class GroupNorms(Net):
    """Statistics over groups of channels: the groups must stay of equal width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(1, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class ConvNeXt(Net):
    """Channels last inside the block, layer norm, and a free parameter that scales each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8, eps=1e-6)
        self.expand, self.reduce = nn.Linear(8, 20), nn.Linear(20, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.reduce(F.gelu(self.expand(y)))
        return self.fc((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class TokenNet(Net):
    """A net that reads tokens of a vocabulary of eleven."""

    @property
    def example(self) -> Example:
        return (tokens(2, 6, below=11),), {}


class TiedEmbedding(TokenNet):
    """The head is the embedding: one tensor with two owners."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head(self.norm(x + F.relu(self.hidden(x))))


class Reused(Net):
    """One layer called twice: what it writes is what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.stem(x))))
        return self.fc(F.relu(self.last(F.relu(self.twice(x)))).mean((2, 3)))


class Attention(Net):
    """`nn.MultiheadAttention`: the three projections lie in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    @property
    def example(self) -> Example:
        return (noise(2, 7, 6),), {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Encoder(TokenNet):
    """`nn.TransformerEncoderLayer`, whose fast path in eval mode skips its own submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=20, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.embedding(x)).mean(1))


class FusedQKV(Net):
    """A vision transformer's block: one layer for query, key and value; `cls_token` and `pos_embed` are free."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.proj(y)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class Recurrent(TokenNet):
    """Gates are stacked in one tensor, and the next layer reads both directions."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embedding(x))[0].mean(1))


class DictInputs(Net):
    """One dictionary in, one dictionary out, and an argument by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.numbers = nn.Linear(4, 10)
        self.hidden, self.fc = nn.Linear(18, 12), nn.Linear(12, 5)

    @property
    def example(self) -> Example:
        return ({"image": noise(2, 3, 8, 8), "numbers": noise(2, 4)},), {"scale": 2.0}

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Tensor]:
        image = F.relu(self.bn(self.image(batch["image"]))).mean((2, 3))
        both = torch.cat([image, F.relu(self.numbers(batch["numbers"]))], dim=1)
        return {"logits": scale * self.fc(F.relu(self.hidden(both)))}


class ControlFlow(Net):
    """Python decides by the data which way to go, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        way = self.wide if bool(x.mean() < 1.0) else self.narrow
        x = way(F.relu(self.bn(self.stem(x))))
        while float(x.detach().abs().max()) > 100.0:
            x = x / 2
        return self.fc(F.relu(x).mean((2, 3)))


class WeightNormHook(Plain):
    """The weight is rebuilt by a forward pre-hook from `weight_g` and `weight_v` (the deprecated kind)."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
            self.conv1 = nn.utils.weight_norm(self.conv1)
            self.conv2 = nn.utils.weight_norm(self.conv2)


class WeightNorm(Plain):
    """The weight is a parametrization of two originals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(self.conv1)
        self.conv2 = parametrizations.weight_norm(self.conv2)


ZOO: dict[str, Callable[[], Net]] = {
    "attention": Attention,
    "batch_norm_free": BatchNormFree,
    "channel_shuffle": ChannelShuffle,
    "chunk": Chunk,
    "concat": Concat,
    "control_flow": ControlFlow,
    "convnext": ConvNeXt,
    "depthwise": Depthwise,
    "dict_inputs": DictInputs,
    "encoder": Encoder,
    "fused_qkv": FusedQKV,
    "group_norm": GroupNorms,
    "grouped": Grouped,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "padded_shortcut": PaddedShortcut,
    "pixel_shuffle": PixelShuffle,
    "plain": Plain,
    "prelu": PReLUs,
    "reshape_flatten": ReshapeFlatten,
    "residual": Residual,
    "reused": Reused,
    "squeeze_excite": SqueezeExcite,
    "tied_embedding": TiedEmbedding,
    "transposed": Transposed,
    "unet": UNet,
    "weight_norm": WeightNorm,
    "weight_norm_hook": WeightNormHook,
}


class Boring(L.LightningModule):
    """The smallest module that a Trainer fits: ``Trainer(...).fit(Boring(), Boring.data())``."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Residual() if net is None else net

    @staticmethod
    def data(samples: int = 32, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
        """Noise of fixed seed, in fixed order."""
        labels = tokens(samples, below=5)
        return DataLoader(TensorDataset(noise(samples, 3, 8, 8), labels), batch_size=batch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
