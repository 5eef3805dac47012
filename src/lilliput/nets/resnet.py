"""Residual networks for small images."""

from collections.abc import Sequence

from torch import Tensor, nn

from lilliput.registry import register


class Block(nn.Module):
    """Compute two 3x3 convolutions around a shortcut: relu(F(x) + S(x)).

    Shapes: (n, channels_in, height, width) -> (n, channels_out, height / stride, width / stride). The shortcut S is the
    identity where the shape stays, else a 1x1 convolution with batch normalisation (the paper's option B).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.short: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.short = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.relu1(self.bn1(self.conv1(x)))
        y: Tensor = self.relu2(self.bn2(self.conv2(h)) + self.short(x))
        return y


@register("net")
class ResNet(nn.Module):
    """Classify small images by a residual network, (n, channels_in, height, width) -> (n, classes).

    Every group of blocks but the first halves the image. ResNet-20 is widths (16, 32, 64) with three blocks each: 20
    layers with weights, 272,186 values for one input channel and ten classes, and 40.5 million multiply-adds at 32x32.

    Args:
        widths: The channels of each group of blocks.
        blocks: How many blocks each group has.
        channels_in: The channels of the image.
        classes: Outputs.
        stride: The stride of the first convolution.

    Raises:
        ValueError: Unless widths and blocks have one length and are at least 1.

    Example:
        >>> import torch
        >>> from lilliput.nets.resnet import ResNet
        >>> ResNet()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in ResNet().parameters())
        272186

    Source:
        K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385,
        section 4.2.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (3, 3, 3),
        channels_in: int = 1,
        classes: int = 10,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(blocks) or min(*widths, *blocks) < 1:
            raise ValueError(
                f"ResNet: widths and blocks must be of one length and at least 1 each, got {tuple(widths)} and "
                f"{tuple(blocks)}. ResNet-20 is widths=(16, 32, 64), blocks=(3, 3, 3)."
            )
        self.conv = nn.Conv2d(channels_in, widths[0], 3, stride, 1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU()
        layers: list[nn.Module] = []
        channels = widths[0]
        for group, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(Block(channels, width, 2 if group and not block else 1))
                channels = width
        self.layers, self.pool, self.flat = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.flat(self.pool(self.layers(self.relu(self.bn(self.conv(x)))))))
        return y
