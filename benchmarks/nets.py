"""Networks of the benchmarks that no dependency brings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what published CIFAR weights expect


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the width doubles, the shortcut skips pixels and pads channels by zeros.

    With ``convolution`` the shortcut is a 1x1 convolution that starts with the same function.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, convolution: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.shortcut = _zero_padding(inputs, outputs, stride) if convolution and self.padding else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CIFARResNet(nn.Module):
    """He et al., 2016, "Deep Residual Learning for Image Recognition", section 4.2. https://arxiv.org/abs/1512.03385

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110.
        classes: outputs.
        convolution: whether shortcuts that change the shape are convolutions.
    """

    def __init__(self, depth: int, classes: int = 10, convolution: bool = False) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"`CIFARResNet(depth={depth})`: expected 6n + 2, for instance 20 or 56.")
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks, convolution)
        self.layer3 = _stage(32, 64, 2, blocks, convolution)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def cifar_resnet(depth: int, convolution: bool = False) -> CIFARResNet:
    """A CIFAR-10 ResNet whose state dict has the names of akamaster/pytorch_resnet_cifar10."""
    return CIFARResNet(depth, convolution=convolution)


def _zero_padding(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[(outputs - inputs) // 2 :][:inputs, :, 0, 0] = torch.eye(inputs)
    return layer


def _stage(inputs: int, outputs: int, stride: int, blocks: int, convolution: bool = False) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, convolution)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
