"""Batch norm folding: the same function, fewer operations, nothing folded that someone else reads."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput import NotSupported
from lilliput.graph import fold_batchnorm

CASES = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), lambda: nn.BatchNorm1d(6), (2, 3, 9)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), lambda: nn.BatchNorm2d(4), (2, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, 2), lambda: nn.BatchNorm2d(6), (2, 3, 5, 5)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(5, 7), lambda: nn.BatchNorm1d(7), (4, 5)),
    "norm without weights": (lambda: nn.Linear(5, 7), lambda: nn.BatchNorm1d(7, affine=False), (4, 5)),
}


def lived(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights as after a training."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None:
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_the_folded_network_computes_the_same(name: str) -> None:
    layer, norm, shape = CASES[name]
    model = lived(nn.Sequential(layer(), norm(), nn.ReLU()))
    x = torch.randn(shape)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_batchnorm(model, x)
    assert norms(folded) == 0 and norms(model) == 1
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert folded[0].bias is not None and folded[0].weight.requires_grad


class Read(nn.Module):
    """A convolution whose output goes to `how` besides its norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.conv(x)
        if self.how == "added":
            return self.bn(h) + h
        if self.how == "returned":
            return self.bn(h), h
        if self.how == "called twice":
            return self.bn(self.conv(h))
        if self.how == "norm called twice":
            return self.bn(self.bn(h))
        if self.how == "another between":
            return self.bn(h.relu())
        if self.how == "changed in place":
            h.mul_(2)
            return self.bn(h)
        assert h.shape[1] == 3 and h.size(0) and h.dim() == 4  # looking at its shape reads no value
        return self.bn(h)


@pytest.mark.parametrize(
    "how", ["added", "returned", "called twice", "norm called twice", "another between", "changed in place"]
)
def test_what_others_read_stays(how: str) -> None:
    model, x = lived(Read(how)), torch.randn(2, 3, 5, 5)
    folded = fold_batchnorm(model, x)
    assert norms(folded) == 1
    got, want = folded(x), model(x)
    got, want = (got[0], want[0]) if isinstance(got, tuple) else (got, want)
    assert torch.equal(got, want)


def test_looking_at_a_shape_is_no_reading() -> None:
    assert norms(fold_batchnorm(lived(Read("")), torch.randn(2, 3, 5, 5))) == 0


def test_tied_convolutions_and_norms_without_statistics_stay() -> None:
    tied = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    tied[2].weight = tied[0].weight
    assert norms(fold_batchnorm(lived(tied), torch.randn(1, 2, 3, 3))) == 1
    fresh = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    assert norms(fold_batchnorm(fresh, torch.randn(2, 2, 3, 3))) == 1


def test_a_norm_over_positions_stays() -> None:
    """Linear on (N, L, C) followed by BatchNorm1d(L) normalises positions, not features."""
    model = lived(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 4)
    assert norms(fold_batchnorm(model, x)) == 1


def test_dictionary_inputs_and_modes_are_kept() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = lived(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.net(x)}

    model = Named().train()
    folded = fold_batchnorm(model, {"x": torch.randn(2, 3)})
    assert norms(folded) == 0 and model.training and model.net[1].training and folded.training


def test_codes_are_refused() -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", Half())
    with pytest.raises(NotSupported, match=r"coded '0'\. Call realize"):
        fold_batchnorm(model, torch.rand(1, 2))
