"""Small networks of other people's kinds on pictures, with invented data: bench/kinds.py."""

import torch
from kinds_tables import Kind, explained
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 12


# --------------------------------------------------------------------------------------------------------------- data


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of stripes in four directions."""
    labels, grid = torch.randint(0, 4, (count,)), torch.arange(float(SIDE))
    angle, shift = labels * torch.pi / 4, torch.rand(count) * 6
    across = grid[None, :, None] * angle.cos()[:, None, None] + grid[None, None] * angle.sin()[:, None, None]
    return ((across + shift[:, None, None]).sin() + 0.9 * torch.randn(count, SIDE, SIDE))[:, None], labels


def boxes(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures with a box in them: noisy, clean, the kind of the box (full, hollow, grid), its corners in [0, 1]."""
    kind = torch.randint(0, 3, (count,))
    low, size = torch.randint(0, 6, (count, 2)), torch.randint(4, 7, (count, 2))
    high, grid = low + size, torch.arange(SIDE)
    inside = [(grid >= low[:, i : i + 1]) & (grid < high[:, i : i + 1]) for i in (0, 1)]
    core = [(grid > low[:, i : i + 1]) & (grid < high[:, i : i + 1] - 1) for i in (0, 1)]
    full = inside[0][:, :, None] & inside[1][:, None]
    hollow = full & ~(core[0][:, :, None] & core[1][:, None])
    chequered = full & ((grid[:, None] + grid) % 2 == 0)
    clean = torch.stack([full, hollow, chequered])[kind, torch.arange(count)].float()[:, None]
    corners = torch.cat([low, high], 1).float() / SIDE
    return clean + 0.3 * torch.randn_like(clean), clean, kind, corners


def regions(count: int) -> tuple[Tensor, Tensor]:
    """The kind of each pixel: background, or that of the box."""
    noisy, clean, kind, _ = boxes(count)
    return noisy, (clean[:, 0] * (kind + 1)[:, None, None]).long()


def noise(count: int) -> tuple[Tensor, Tensor]:
    noisy, clean, _, _ = boxes(count)
    return noisy, clean


def objects(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    noisy, _, kind, corners = boxes(count)
    return noisy, (kind, corners)


# ----------------------------------------------------------------------------------------------------------- networks


class CNN(nn.Module):
    """Convolutions with batch norm, then linear layers on the flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.inner, self.out = nn.Linear(16 * 9, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.inner(torch.flatten(self.features(x), 1))))
        return y


class Reshaping(CNN):
    """Written with `len(x)` and `x.size(0)`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.reshape(len(x), 1, SIDE, SIDE))
        y: Tensor = self.out(F.relu(self.inner(x.view(x.size(0), -1))))
        return y


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """A ResNet of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.pool, self.out = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.pool(self.blocks(self.stem(x))).flatten(1))
        return y


class Inverted(nn.Module):
    """The block of a MobileNet: expand, filter by depth, narrow, with squeeze-and-excite where asked."""

    def __init__(self, width: int, wide: int, squeeze: bool = False) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.excite = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), nn.ReLU(), nn.Conv2d(wide // 4, wide, 1),
                nn.Hardsigmoid(),
            )
            if squeeze
            else None
        )  # fmt: skip
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        if self.excite is not None:
            y = y * self.excite(y)
        return x + self.project(y)


class Mobile(nn.Module):
    """A MobileNet of two blocks."""

    def __init__(self, squeeze: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(Inverted(8, 32, squeeze), Inverted(8, 32, squeeze))
        self.out = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.blocks(self.stem(x)).mean([2, 3]))
        return y


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, channels, height, width = x.size()
    x = x.view(n, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(n, -1, height, width)


class Shuffle(nn.Module):
    """Grouped convolutions whose channels are shuffled between them, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.one, self.deep = nn.Conv2d(16, 32, 1, groups=4), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.two, self.out = nn.Conv2d(32, 16, 1, groups=4), nn.Linear(16, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (16, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        y = shuffled(F.relu(self.norms[1](self.one(x))), 4)
        x = F.relu(x + self.norms[2](self.two(self.deep(y))))
        z: Tensor = self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return z


def double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Down, up, and the maps of the way down concatenated on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double(1, 8), double(8, 12), double(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.join2, self.join1, self.out = double(24, 12), double(16, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.join2(torch.cat([two, self.up2(x)], dim=1))
        y: Tensor = self.out(self.join1(torch.cat([one, self.up1(x)], dim=1)))
        return y


class Denoiser(nn.Module):
    """Strided convolutions, then transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(12, 24, 3, 2, 1), nn.LeakyReLU(0.1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(24, 12, 3, 2, 1, output_padding=1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(12, 1, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


class Detector(nn.Module):
    """The kind of a box and its corners, from one backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.neck = nn.Linear(16 * 36, 16)
        self.kind, self.corners = nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.neck(self.backbone(x).flatten(1)))
        return {"kind": self.kind(h), "corners": self.corners(h).sigmoid()}


def detection_loss(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs["kind"], targets[0]) + 5 * F.smooth_l1_loss(outputs["corners"], targets[1], beta=0.1)


def detected(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the kind is right and the boxes overlap by at least a half."""
    a, b = outputs["corners"], targets[1]
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    either = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common
    return ((outputs["kind"].argmax(1) == targets[0]) & (common >= 0.5 * either)).float()


class ViT(nn.Module):
    """A vision transformer with its queries, keys and values from one layer, as in timm."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 10, width))
        self.blocks = nn.ModuleList(Attending(width) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.out(self.norm(x)[:, 0])
        return y


class Attending(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.width = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, -1)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


KINDS: dict[str, Kind] = {
    "CNN with batch norm": Kind(CNN, stripes, chance=0.25),
    "CNN with len(x) and x.size(0)": Kind(Reshaping, stripes, chance=0.25),
    "residual CNN": Kind(Residual, stripes, chance=0.25),
    "mobile CNN": Kind(Mobile, stripes, chance=0.25, last=("out.1",)),
    "squeeze-and-excite": Kind(lambda: Mobile(squeeze=True), stripes, chance=0.25, last=("out.1",)),
    "channel shuffle": Kind(Shuffle, stripes, chance=0.25),
    "U-Net": Kind(UNet, regions, chance=0.88),
    "transposed convolutions": Kind(Denoiser, noise, {"loss": "mse", "metric": explained}, last=("decoder.2",)),
    "detector": Kind(Detector, objects, {"loss": detection_loss, "metric": detected}, last=("kind", "corners")),
    "vision transformer": Kind(ViT, stripes, chance=0.25, heads={"blocks.0.qkv": 2, "blocks.1.qkv": 2}),
}
