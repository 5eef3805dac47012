"""SLaK: kernels far larger than three, as rectangles, become trainable by sparse training whose shares SNIP gives.

Source: Liu, Chen, Chen, Chen, Xiao, Wu, Karkkainen, Pechenizkiy, Mocanu and Wang, More ConvNets in the 2020s: scaling
up kernels beyond 51x51 using sparsity, ICLR 2023, arXiv:2207.03620, section 3.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.data import digits
from lilliput.prune.masks import masks
from lilliput.prune.sparse import SET


class LargeKernel(nn.Module):
    """A depthwise kernel of size x size as a tall, a wide and a small one."""

    def __init__(self, channels: int, size: int, small: int) -> None:
        super().__init__()
        shapes = ((size, small), (small, size), (small, small))
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, shape, padding=(shape[0] // 2, shape[1] // 2), groups=channels)
            for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 1),
        LargeKernel(16, 13, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.fixture(scope="module")
def task() -> lilliput.Task:
    x, y = digits.images()
    x = F.avg_pool2d(x, 4)
    return lilliput.Task("digits", (x[::5], y[::5]), (x[1::5], y[1::5]), batch_size=50)


def test_shares_by_snip_then_sparse_training(task: lilliput.Task) -> None:
    net = network()
    by_name = masks(lilliput.Prune(0.4, "snip", allocation="global")(net, task, None))
    shares = tuple((name, code.sparsity) for name, code in by_name.items())
    assert {f"1.branches.{i}.weight" for i in range(3)} <= set(by_name)
    assert sum(int((~code.mask).sum()) for code in by_name.values()) == round(
        0.4 * sum(code.mask.numel() for code in by_name.values())
    )
    training = lilliput.Train(120, lilliput.Cosine(1e-2), (SET(allocation=shares, every=10),))
    made = lilliput.run(net, task, [training])
    moved = masks(made)
    for name, code in by_name.items():
        assert int(moved[name].mask.sum()) == int(code.mask.sum()), "each layer keeps SNIP's share"
    assert any(not torch.equal(moved[name].mask, by_name[name].mask) for name in by_name)
    assert task.score(lilliput.realize(made), "val").value > 0.8
