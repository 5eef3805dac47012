"""teacher: the dense network's outputs by whatever computes them fastest, always the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput.export.onnx import trace
from lilliput.search import share, teacher
from lilliput.search.desk import Desk
from lilliput.task import predict


class Two(nn.Module):
    """Two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.norm(self.conv(x)).relu().flatten(1)
        return {"logits": self.fc(h), "hidden": h}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Two()
    model.train()(torch.randn(32, 1, 8, 8))  # statistics that are not 0 and 1
    return model.eval()


def put(desk: Desk, thing: Any) -> Desk:
    share.dump(thing, desk.folder / teacher.FILE)
    return desk


def test_outputs_are_the_dense_networks(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(70, 1, 8, 8)
    expected = predict(model, x)
    by_torch = teacher.outputs(Desk(tmp_path, 0), model, x)
    file = trace(model, x[:1]).proto.SerializeToString()
    desk = put(Desk(tmp_path, 0), file)
    by_file = teacher.outputs(desk, model, x)
    for found in (by_torch, by_file):
        assert list(found) == ["logits", "hidden"]
        assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    parts = [teacher.outputs(desk, model, part)["logits"] for part in (x[:32], x[32:64], x[64:])]
    assert torch.equal(torch.cat(parts), by_file["logits"])


def test_a_file_that_computes_something_else_is_not_used(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(5, 1, 8, 8)
    other = Two().eval()
    for wrong in (trace(other, x[:1]).proto.SerializeToString(), b"no network"):
        folder = tmp_path / str(len(wrong))
        found = teacher.outputs(put(Desk(folder, 0), wrong), model, x)
        assert torch.allclose(found["logits"], predict(model, x)["logits"], atol=1e-4)


def test_a_network_that_needs_channels_first_is_run_as_it_is(tmp_path: Path) -> None:
    class Viewed(Two):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(self.norm(self.conv(x)).view(len(x), -1))}

    model, x = Viewed().eval(), torch.randn(20, 1, 8, 8)
    found = teacher.outputs(Desk(tmp_path, 0), model, x)
    assert torch.allclose(found["logits"], predict(model, x)["logits"], atol=1e-4)
