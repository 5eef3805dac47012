"""Describe a model's codes as plain data, and attach them again to a plain model without encoding anything."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code, hold, holders
from lilliput.code.names import lists, original_names, plain_modules
from lilliput.code.spec import Spec
from lilliput.errors import StoreError, near


def describe(model: nn.Module) -> dict[str, Any]:
    """Which code, with which settings, stores which tensor, those of factors and kept weights included.

    Returns:
        By the name of each coded tensor (a tied one under its first): `spec`, the `shape` that it decodes to, and
        `inner`, the same of each theta that is stored by a code in turn.
    """
    described: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in plain_modules(model):
        for attribute, holder in lists(module).items():
            if isinstance(holder[0], Code) and id(holder) not in seen:
                seen.add(id(holder))
                described[f"{path}.{attribute}" if path else attribute] = _described(module, attribute)
    return described


def _described(module: nn.Module, attribute: str) -> dict[str, Any]:
    holder = lists(module)[attribute]
    with torch.no_grad():
        shape = list(getattr(module, attribute).shape)
    names = [name for name in original_names(holder) if name in lists(holder)]
    node = {"spec": Spec.of(holder[0]).data(), "shape": shape}
    return node | ({"inner": {name: _described(holder, name) for name in names}} if names else {})


def reattach(model: nn.Module, codes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Attach the codes that `describe` told of to a plain model, in place, with theta and buffers from its state.

    Args:
        model: plain tensors, of the names and shapes that the described model has when it is realized.
        codes: what `describe` returned.
        tensors: the described model's state_dict.

    Raises:
        KeyError: for a code that is not known, with what to install.
        StoreError: for a tensor that the model does not have, or a theta that the state does not have.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, node in codes.items():
        if name not in known:
            raise StoreError(f"restore: the model must have the tensor {name!r}, which is coded. {near(name, known)}")
        (module, attribute), *tied = holders(model, name)
        path = name.rpartition(".")[0]
        _reattach(module, attribute, node, tensors, f"{path}." if path else "")
        for other, key in tied:
            hold(other, key, lists(module)[attribute])


def _reattach(
    module: nn.Module, attribute: str, node: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> None:
    place = f"{prefix}parametrizations.{attribute}."
    mine = {key.removeprefix(place): value for key, value in tensors.items() if key.startswith(place)}
    inner = node.get("inner", {})
    names = ["original"] if "original" in {*mine, *inner} else []
    names += list(itertools.takewhile({*mine, *inner}.__contains__, (f"original{i}" for i in itertools.count())))
    if not names:
        raise StoreError(f"restore: the tensors must hold {place}original, and do not. The file is not whole.")
    theta = [mine[name] if name in mine else torch.zeros(inner[name]["shape"]) for name in names]
    code = Spec.of(node["spec"]).make({k.removeprefix("0."): v for k, v in mine.items() if k.startswith("0.")})
    code._shape = tuple(node["shape"])
    trains = getattr(module, attribute).requires_grad
    given = _Given(theta[0].clone() if names == ["original"] else tuple(part.clone() for part in theta))
    parametrize.register_parametrization(module, attribute, given, unsafe=True)
    holder = lists(module)[attribute]
    holder[0] = code
    for name in names:
        getattr(holder, name).requires_grad_(trains)
        if name in inner:
            _reattach(holder, name, inner[name], tensors, place)


class _Given(nn.Module):
    """What stands in for a code while a tensor is registered: theta is there already."""

    def __init__(self, theta: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__()
        self._theta = theta

    def forward(self, *theta: Tensor) -> Tensor:
        return theta[0]

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._theta
