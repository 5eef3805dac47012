"""Style transfer in the palm of your hand (2016): a small network in a small runtime paints at interactive rates.

The style is a painter's filter that can be computed exactly, so that what the network learnt can be checked: every
pixel takes the mean of the calmest of the squares around it (Kuwahara), in warmer colours. A convolutional network
learns it from photographs, dense and with zeros, and the engine compiles it. The full size trains for seven minutes of
one core, once: trainings are kept in the cache.

Sources: Y. Jia and P. Vajda, Delivering real-time AI in the palm of your hand, Facebook engineering blog, Nov. 2016;
J. Johnson, A. Alahi and L. Fei-Fei, Perceptual losses for real-time style transfer, ECCV 2016, arXiv:1603.08155 (the
network: down, residual blocks, up); M. Kuwahara et al., Processing of RI-angiocardiographic images, 1976; G. Papari,
N. Petkov and P. Campisi, Artistic edge and corner enhancing smoothing, IEEE Trans. Image Processing, 2007 (weights).
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.data import cache_folder, package_file
from lilliput.export.onnx import Session, trace

SIZE, RADIUS = 256, 4
TRAIN = (
    "sklearn/china.jpg",
    "skimage/coffee.png",
    "skimage/rocket.jpg",
    "skimage/motorcycle_left.png",
    "skimage/camera.png",
    "skimage/grass.png",
    "skimage/gravel.png",
    "skimage/brick.png",
    "skimage/coins.png",
)
HELD_OUT = ("sklearn/flower.jpg", "skimage/astronaut.png", "skimage/chelsea.png")
FOLDERS = {"sklearn": ("datasets", "images"), "skimage": ("data",)}


# --------------------------------------------------------------------------------------------------------------- data


def photograph(name: str) -> Tensor:
    """(3, height, width) in [0, 1]: a photograph inside an installed package, read without importing it."""
    from PIL import Image

    package, _, file = name.partition("/")
    install = {"sklearn": "scikit-learn", "skimage": "scikit-image"}[package]
    with Image.open(package_file(package, *FOLDERS[package], file, install=install)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def painted(x: Tensor) -> Tensor:
    """The teacher: (n, 3, height, width) -> the same shape.

    m_i and s_i^2 are the mean colour and the variance of the brightness in the four squares of RADIUS + 1 pixels that
    have the pixel in a corner; y = sum_i w_i m_i with w_i ~ s_i^-8 (Papari's q = 8), then a curve for each colour.
    """
    side = RADIUS + 1
    grey = x.mean(1, keepdim=True)
    values = F.pad(torch.cat([x, grey, grey.square()], 1), (RADIUS,) * 4, mode="reflect")
    means = F.avg_pool2d(values, side, 1)
    height, width = x.shape[-2:]
    squares = torch.stack([means[..., i : i + height, j : j + width] for i in (0, RADIUS) for j in (0, RADIUS)])
    variance = (squares[:, :, 4:] - squares[:, :, 3:4].square()).clamp_min(0) + 1e-4
    weights = (-4 * variance.log()).softmax(0)
    y = (weights * squares[:, :, :3]).sum(0)
    return (y + y * (1 - y) * torch.tensor([0.5, 0.1, -0.4]).view(3, 1, 1)).clamp(0, 1)


def patches(names: tuple[str, ...], count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 3, side, side) squares cut out at random, and the same ones of the painted photographs."""
    draw, patches = np.random.default_rng(seed), []
    for name in names:
        x = photograph(name)
        both = torch.cat([x, painted(x[None])[0]])
        for _ in range(-(-count // len(names))):
            top, left = (int(draw.integers(0, n - side + 1)) for n in x.shape[1:])
            cut = both[:, top : top + side, left : left + side]
            patches.append(cut.flip(2) if draw.integers(2) else cut)
    together = torch.stack(patches)
    return together[:, :3].contiguous(), together[:, 3:].contiguous()


def squares(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Every whole square of SIZE pixels of some photographs, and the same painted."""
    patches = []
    for name in names:
        x = photograph(name)
        both = torch.cat([x, painted(x[None])[0]])
        patches += [
            both[:, i : i + SIZE, j : j + SIZE]
            for i in range(0, x.shape[1] - SIZE + 1, SIZE)
            for j in range(0, x.shape[2] - SIZE + 1, SIZE)
        ]
    together = torch.stack(patches)
    return together[:, :3].contiguous(), together[:, 3:].contiguous()


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal to noise in dB, by picture."""
    error = (output.clamp(0, 1) - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-12).log10()


def linear(task: lilliput.Task, side: int) -> nn.Conv2d:
    """The best linear filter of side x side pixels, by least squares over the training patches."""
    x, y = task.split("train")
    layer = nn.Conv2d(3, 3, side, padding=side // 2, padding_mode="reflect")
    rows = torch.cat([F.unfold(part, side).transpose(1, 2)[:, ::7].flatten(0, 1) for part in x[:256].split(32)])
    inner = side // 2
    cut = y[:256, :, inner : y.shape[2] - inner, inner : y.shape[3] - inner].flatten(2).transpose(1, 2)[:, ::7]
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
    eye = 1e-6 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(rows.T @ rows + eye, rows.T @ cut.flatten(0, 1).double()).float()
    with torch.no_grad():
        layer.weight.copy_(solved[:-1].T.reshape(layer.weight.shape))
        layer.bias.copy_(solved[-1])  # type: ignore[union-attr]
    return layer


# ------------------------------------------------------------------------------------------------------------ network


class Residual(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(self.conv1(x).relu())
        return y


class Painter(nn.Module):
    """Picture to picture: two strided convolutions down, residual blocks at a quarter of the size, and up again."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        half = channels // 2
        self.down1 = nn.Conv2d(3, half, 5, stride=2, padding=2)
        self.down2 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.up1 = nn.Conv2d(channels, half, 3, padding=1)
        self.up2 = nn.Conv2d(half, 12, 3, padding=1)
        self.larger = nn.Upsample(scale_factor=2, mode="nearest")
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x).relu()
        b = self.blocks(self.down2(a).relu())
        y: Tensor = x + self.shuffle(self.up2((self.up1(self.larger(b)) + a).relu()))
        return y


def trained(model: nn.Module, task: lilliput.Task, steps: int, sparsity: float, store: Path | None) -> nn.Module:
    """The network after so many steps; with a sparsity, its smallest weights go meanwhile, wherever they are."""
    rules = (lilliput.Prune(sparsity, allocation="global"),) if sparsity else ()
    train = lilliput.Train(steps, lr=lilliput.Cosine(2e-3), clip=1.0, rules=rules)
    return lilliput.realize(lilliput.run(model, task, lilliput.Recipe((train,)), store))


# ------------------------------------------------------------------------------------------------------------- measure


def times(runs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Processor seconds of each function, the median of `rounds` in which all take turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent[name].append(time.process_time() - began)
    return {name: float(np.median(found[2:])) for name, found in spent.items()}


def measure(quick: bool) -> dict[str, Any]:
    """A row for what paints without a network, and for each network: how close to the teacher, and how fast."""
    torch.set_num_threads(1)
    heard, unheard = (("sklearn/flower.jpg",), ("sklearn/china.jpg",)) if quick else (TRAIN, HELD_OUT)
    count, steps, channels, blocks, levels = (64, 20, 8, 1, (0.8,)) if quick else (1800, 2000, 32, 4, (0.8, 0.9))
    task = lilliput.Task("painting", train=patches(heard, count, 64, 0), val=squares(unheard), loss="mse", metric=psnr,
                         batch_size=16)  # fmt: skip
    pictures = task.split("val")[0]
    rows: list[dict[str, Any]] = [
        {"painter": "the photograph as it is", "psnr_db": round(task.score(nn.Identity()).value, 2)},
        {"painter": "the best linear filter of 9x9", "psnr_db": round(task.score(linear(task, 9)).value, 2)},
    ]
    store = None if quick else cache_folder() / "evidence"
    torch.manual_seed(0)
    dense = trained(Painter(channels, blocks), task, steps, 0.0, store)
    networks = {"dense": trained(dense, task, steps, 0.0, store)}
    networks |= {f"{100 * sparsity:g}% zeros": trained(dense, task, steps, sparsity, store) for sparsity in levels}
    with tempfile.TemporaryDirectory() as scratch:
        protos = {name: trace(net, task.example[..., :64, :64].repeat(1, 1, SIZE // 64, SIZE // 64)).proto
                  for name, net in networks.items()}  # fmt: skip
        engines = {name: lilliput.compile(proto, Path(scratch, name), shapes={"x": (1, 3, SIZE, SIZE)}, tune=not quick)
                   for name, proto in protos.items()}  # fmt: skip
        sessions = {name: Session(proto) for name, proto in protos.items()}
        x = np.ascontiguousarray(pictures[:1].numpy())
        y = np.empty_like(x)
        runs: dict[str, Any] = {}
        for name in networks:
            runs[f"engine {name}"] = partial(engines[name], x, out=y)
            runs[f"onnxruntime {name}"] = partial(sessions[name].run, sessions[name].feed(x))
        seconds = times(runs, 5 if quick else 60)
        for name, net in networks.items():
            painted_ = np.concatenate([engines[name](picture[None]) for picture in pictures.numpy()])
            other = sessions[name].outputs(pictures)
            weights = [w for w in net.parameters() if w.dim() > 1]
            mine, theirs = seconds[f"engine {name}"], seconds[f"onnxruntime {name}"]
            rows.append({
                "painter": name, "psnr_db": round(task.rate(torch.from_numpy(painted_), "val").value, 2),
                "weights": sum(w.numel() for w in weights), "nonzero": sum(int(w.count_nonzero()) for w in weights),
                "frames_per_s": round(1 / mine, 1), "onnxruntime_frames_per_s": round(1 / theirs, 1),
                "ratio": round(theirs / mine, 2), "ms": round(1e3 * mine, 3),
                "largest_difference": float(f"{np.abs(painted_ - other).max():.2g}"),
                "program_bytes": sum(file.stat().st_size for end in ("libmodel.so", "model.weights")
                                     if (file := Path(scratch, name, end)).exists()),
                "arena_bytes": engines[name].manifest["arena_bytes"],
            })  # fmt: skip
    return {
        "claim": "a small network in a small runtime paints pictures at interactive rates on a small processor",
        "baseline": "the filter that the network imitates (psnr_db is the distance from it, on photographs that were "
                    "held out); ONNX Runtime on the same files, one thread, interleaved, processor time. Pictures of "
                    f"{SIZE}x{SIZE}; every network was trained for as many steps as any other",
        "steps": 2 * steps, "pictures": len(pictures), "rows": rows,
    }  # fmt: skip
