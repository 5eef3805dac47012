"""share: objects in files that other processes map."""

import importlib.util
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lilliput
from lilliput.code.base import copy_model
from lilliput.registry import lookup, register
from lilliput.registry.entry import live
from lilliput.search.share import LARGE_BYTES, dump, dumps, load, loads

WIDE = 200  # 160,000 bytes of weights


def test_tied_weights_stay_tied_and_large_ones_lie_in_a_file_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE))
    net[1].weight = net[0].weight
    view = net[0].weight.detach()[:3].T
    dump({"net": net, "view": view}, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load(tmp_path)
    assert back["net"][0].weight is back["net"][1].weight
    assert torch.equal(back["net"][0].weight, net[0].weight) and torch.equal(back["view"], view)
    back["view"].zero_()  # one storage still
    assert not back["net"][0].weight[:3].any()


def test_what_one_process_writes_no_other_sees(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=LARGE_BYTES)
    dump((values, values, values[:10].copy(), torch.from_numpy(values)), tmp_path)
    first, same, few, tensor = load(tmp_path)
    assert first is same and isinstance(first, np.memmap) and np.array_equal(few, values[:10])
    first[:] = 0
    tensor.zero_()
    again = load(tmp_path)
    assert np.array_equal(again[0], values) and np.array_equal(again[3].numpy(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_every_type_comes_back(dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    back = loads(dumps([values, values[:, 1]]))
    assert torch.equal(back[0], values) and torch.equal(back[1], values[:, 1]) and back[1].dtype == dtype


def test_coded_and_parametrized_models_come_back() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))).eval()
    x = torch.randn(5, 8)
    task = lilliput.Task("values", train=(x, net(x).detach()), val=x, loss="mse", metric="mse")
    coded = lilliput.Quantize(4)(copy_model(net), task, None)
    for model in (net, coded):
        back = loads(dumps(model))
        assert type(back[2]).__mro__[1] is nn.Linear and torch.equal(back(x), model(x))
        assert list(back.state_dict()) == list(model.state_dict())
    back[2].weight = torch.zeros(4, 8)  # a parametrization's setter is there too
    assert not back(x).allclose(coded(x))


def test_a_file_of_the_user_goes_by_value(tmp_path: Path) -> None:
    (tmp_path / "mine_alone.py").write_text(
        "from functools import cache\n@cache\ndef scale():\n    return 3\ndef metric(x):\n    return scale() * x\n"
    )
    spec = importlib.util.spec_from_file_location("mine_alone", tmp_path / "mine_alone.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["mine_alone"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "data").write_bytes(dumps(module.metric))
    del sys.modules["mine_alone"]
    code = (
        "from pathlib import Path; from lilliput.search.share import loads; print(loads(Path('data').read_bytes())(4))"
    )
    (tmp_path / "mine_alone.py").unlink()
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True) == "12\n"


def test_what_was_registered_in_the_program_is_known_to_a_worker() -> None:
    @register("score", name="fourth power (test)")
    def fourth(weight: torch.Tensor) -> torch.Tensor:
        return weight**4

    fourth.__module__ = "__main__"
    data = dumps(1)
    del live["score", "fourth power (test)"]
    assert loads(data) == 1
    assert lookup("score", "fourth power (test)")(torch.tensor(2.0)) == 16
    del live["score", "fourth power (test)"]


def test_what_cannot_be_pickled_is_said() -> None:
    with pytest.raises(TypeError, match=r"must be such as cloudpickle takes, but it raised TypeError.*lock"):
        dumps({"lock": threading.Lock()})
