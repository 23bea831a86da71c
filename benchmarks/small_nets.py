"""Small networks of kinds that image libraries do not have: tokens, sound, segmentation, a branch on data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSTMTagger(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        both = kind is nn.LSTM
        self.embedding = nn.Embedding(200, 64)
        self.rnn, self.head = kind(64, 64, batch_first=True, bidirectional=both), nn.Linear(64 * (1 + both), 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


class TinyTransformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(200, width), nn.Parameter(torch.randn(1, 32, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 128, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.position).mean(1))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, width), _double(width, 2 * width)
        self.down3, self.up2 = _double(2 * width, 4 * width), nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2, self.up1 = _double(4 * width, 2 * width), nn.Upsample(scale_factor=2, mode="bilinear")
        self.join1, self.out = _double(3 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.join2(torch.cat([self.up2(self.down3(F.max_pool2d(second, 2))), second], 1))
        return self.out(self.join1(torch.cat([self.up1(y), first], 1)))


class Audio1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in [(1, 16, 80, 4), (16, 32, 3, 2), (32, 64, 3, 2), (64, 64, 3, 2)]:
            conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=False)
            layers += [conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(2)]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(-1))


class ControlFlow(nn.Module):
    """A branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if float(x.mean()) > -1e9:
            x = F.relu(self.conv2(x)) + x
        return self.head(x.mean((2, 3)))
