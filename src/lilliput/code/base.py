"""Code: how one tensor is stored. W = decode(theta), with theta cheaper than W.

A code is a parametrization of `torch.nn.utils.parametrize` (forward = decode, right_inverse = encode), so every module
type works unchanged, gradients reach theta, and `state_dict` holds everything. Codes nest: the theta of one (kept
weights, factors) may be stored by another, attached to the originals that it names in `inner`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.errors import NotSupported, near
from lilliput.proposal import Refusal
from lilliput.stored.base import Storage, Stored
from lilliput.stored.plain import Plain


class Code(nn.Module):
    """One way to store a tensor: plain settings, float theta as parameters, everything discrete as buffers.

    encode(W) gives theta (a tensor or a tuple), decode(*theta) gives W; both differentiable where they can be.
    `inner` lists which theta another code may store in turn. `pack(*theta)` takes theta as `Stored` values and returns
    the tensor's `Stored`; `storage()` of that is the predicted size of its section.
    """

    version: ClassVar[int] = 1
    inner: ClassVar[tuple[int, ...]] = ()

    def encode(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """theta for a tensor; overwritten by each code."""
        return weight

    def decode(self, *theta: Tensor) -> Tensor:
        """The tensor that theta stands for; overwritten by each code."""
        return theta[0]

    def pack(self, *theta: Stored) -> Stored:
        """theta as it goes into a file; overwritten by each code."""
        return theta[0]

    def settings(self) -> dict[str, Any]:
        """The plain values that the code was made with."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training" and isinstance(value, int | float | str | tuple)
        }

    def label(self) -> str:
        """Name the code and its settings in a few words, as a search shows it."""
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self.settings().items())})"

    @classmethod
    def proposals(cls, tensor: Tensor, statistics: Mapping[str, Tensor]) -> "Sequence[Code] | Refusal":
        """Offer codes for one tensor, from mild to strong; a search chooses among those of every registered code.

        Args:
            tensor: the trained tensor.
            statistics: what is known of it, by name (lilliput.statistics), each broadcastable to it.

        Returns:
            Codes that have not encoded anything yet, or why there are none.
        """
        return Refusal("never proposed by itself")

    def forward(self, *theta: Tensor) -> Tensor:
        return self.decode(*theta)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.encode(weight)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def find(model: nn.Module, where: str = "*", *, least_dim: int = 2, who: str = "find") -> list[str]:
    """The names of the tensors that `where` chooses, such as "layers.0.conv1.weight".

    where: glob patterns on module or tensor names, separated by commas; "*" takes every weight of at least
    `least_dim` dimensions. A name chosen outright is taken whatever its dimensions. Tied tensors are named once.

    Raises ValueError when nothing matches, with near misses.
    """
    owners = parameter_names(model)
    patterns = [pattern.strip() for pattern in where.split(",") if pattern.strip()]
    chosen = []
    for name, tensor in owners.items():
        module = name.rpartition(".")[0]
        by_glob = any(fnmatchcase(name, p) or fnmatchcase(module, p) for p in patterns)
        if by_glob and (tensor.dim() >= least_dim or name in patterns) and tensor.is_floating_point():
            chosen.append(name)
    if not chosen:
        modules = {name.rpartition(".")[0] or name for name in owners}
        raise ValueError(
            f"{who}: where must match a floating-point tensor of at least {least_dim} dimensions, got "
            f"{where!r}. {near(where, modules)}"
        )
    return chosen


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by the name it had before codes were attached, decoded; tied ones under their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in _plain_modules(model):
        for name in (*module._parameters, *_lists(module)):
            if parametrize.is_parametrized(module, name):
                identity = id(next(_originals(module, name)))
                with torch.no_grad():
                    tensor = getattr(module, name)
            else:
                tensor = module._parameters[name]
                identity = id(tensor)
            if tensor is not None and identity not in seen:
                seen.add(identity)
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _lists(module: nn.Module) -> Any:
    """The parametrization list of each parametrised tensor of a module, by attribute."""
    return module._modules.get("parametrizations") or {}  # getattr would raise, slowly, at every step of a rule


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, in the order and with the paths of `named_modules`, without what parametrizations hold."""
    seen, waiting = set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            waiting += [
                (f"{path}.{name}" if path else name, child)
                for name, child in reversed(module._modules.items())
                if child is not None and name != "parametrizations"
            ]


def _originals(module: nn.Module, name: str) -> Iterator[Tensor]:
    """The innermost tensors behind a parametrised one."""
    holder = _lists(module)[name]
    for original in _original_names(holder):
        if original in _lists(holder):
            yield from _originals(holder, original)
        else:
            yield getattr(holder, original)


def _original_names(holder: Any) -> list[str]:
    if getattr(holder, "is_tensor", True):
        return ["original"]
    return [f"original{i}" for i in range(holder.ntensors)]


def theta(model: nn.Module, name: str) -> Tensor:
    """The tensor that is trained for `name`: the first innermost one behind its codes, or the plain parameter itself.

    >>> net = nn.Linear(2, 2)
    >>> theta(net, "weight") is net.weight
    True
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return next(_originals(module, attribute)) if attribute in _lists(module) else module.get_parameter(attribute)


def holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds the parameter `name`: several where weights are tied."""
    path, _, attribute = name.rpartition(".")
    target = model.get_submodule(path)
    if parametrize.is_parametrized(target, attribute):
        return [(target, attribute)]
    parameter = target._parameters[attribute]
    return [
        (module, key)
        for _, module in _plain_modules(model)
        for key, value in module._parameters.items()
        if value is parameter
    ]


def attach(model: nn.Module, name: str, code: Code) -> None:
    """Store the tensor `name` of `model` by `code`, in place; on top of a code that is there, its inner theta.

    Raises NotSupported for a tied tensor, whose two readings would come apart, and for a code with nothing to nest in.
    """
    owners = holders(model, name)
    if len(owners) > 1:
        raise NotSupported(
            f"attach: {name} must be held by one module, but {len(owners)} modules share it. Leave it out with where=."
        )
    module, attribute = owners[0]
    _attach(module, attribute, name, code)


def _attach(module: nn.Module, attribute: str, name: str, code: Code) -> None:
    if not parametrize.is_parametrized(module, attribute):
        tensor = getattr(module, attribute)
        trains = tensor.requires_grad
        parametrize.register_parametrization(module, attribute, code, unsafe=True)
        for original in _originals(module, attribute):
            original.requires_grad_(trains)
        return
    holder = _lists(module)[attribute]
    originals = _original_names(holder)
    if not isinstance(holder[0], Code):
        raise NotSupported(f"attach: {name} must be a plain tensor, but {foreign(holder[0])}.")
    inner = holder[0].inner
    if not inner:
        raise NotSupported(
            f"attach: {name} must be stored by a code that others can nest in, got "
            f"{type(holder[0]).__name__}. Realize it first."
        )
    for k, i in enumerate(inner):
        _attach(holder, originals[i], name, code if k == 0 else copy.deepcopy(code))


def codes(model: nn.Module) -> dict[str, tuple[Code, ...]]:
    """The codes of each coded tensor, outermost first."""
    found: dict[str, tuple[Code, ...]] = {}
    for path, module in _plain_modules(model):
        for attribute, holder in _lists(module).items():
            if isinstance(holder[0], Code):
                found[f"{path}.{attribute}" if path else attribute] = tuple(_chain(module, attribute))
    return found


def foreign(parametrization: nn.Module) -> str:
    """Why a tensor with a parametrization that is no code (weight normalisation) is left alone."""
    name = type(parametrization).__name__.strip("_")
    return f"{name} computes it (torch.nn.utils.parametrize.remove_parametrizations makes it plain)"


def reason(model: nn.Module, name: str) -> str | None:
    """Why no code can store the tensor `name` (it is tied, another parametrization computes it), or None."""
    path, _, attribute = name.rpartition(".")
    lists = _lists(model.get_submodule(path))
    if attribute in lists:
        return None if isinstance(lists[attribute][0], Code) else foreign(lists[attribute][0])
    return "its weights are tied to another layer's" if len(holders(model, name)) > 1 else None


def _chain(module: nn.Module, attribute: str) -> Iterator[Code]:
    holder = _lists(module)[attribute]
    yield holder[0]
    for original in _original_names(holder):
        if parametrize.is_parametrized(holder, original):
            yield from _chain(holder, original)


def pack(model: nn.Module) -> dict[str, Stored]:
    """Every parameter and buffer of a model as it goes into a file, by the name it has in the realized state_dict."""
    found: dict[str, Stored] = {}
    with torch.no_grad():
        for path, module in _plain_modules(model):
            prefix = f"{path}." if path else ""
            for name in dict.fromkeys((*module._parameters, *_lists(module))):
                if parametrize.is_parametrized(module, name) or module._parameters.get(name) is not None:
                    found[prefix + name] = _pack(module, name)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[prefix + name] = Plain(_array(buffer, prefix + name))
    return found


def _array(tensor: Tensor, name: str) -> Any:
    """A tensor in a type that a file can hold."""
    if tensor.is_complex():
        raise NotSupported(
            f"pack: {name} must be real, got {tensor.dtype}. Keep its real and imaginary part as two "
            "tensors (torch.view_as_real)."
        )
    if tensor.dtype in (torch.bfloat16, torch.float64):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def _pack(module: nn.Module, name: str) -> Stored:
    if name in _lists(module) and isinstance(_lists(module)[name][0], Code):
        holder = _lists(module)[name]
        stored: Stored = holder[0].pack(*(_pack(holder, original) for original in _original_names(holder)))
        return stored
    tensor = getattr(module, name)
    return Plain(_array(tensor if tensor.is_complex() else tensor.float(), name))


def storage(model: nn.Module) -> dict[str, Storage]:
    """The predicted section of each tensor, from theta alone."""
    return {name: stored.storage() for name, stored in pack(model).items()}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy whose coded modules have classes of their own, so that realizing it leaves the original alone.

    `deepcopy` shares the class that a parametrization injects; removing it from the copy would delete the property
    from the original. A coded recurrent layer keeps its last decoded weights, which cannot be copied; the copy decodes
    its own.
    """
    memo: dict[int, Any] = {
        id(module._flat_weights): [None] * len(module._flat_weights)
        for module in model.modules()
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module)
    }
    result = copy.deepcopy(model, memo)
    for _, module in result.named_modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    return result


def realize(model: nn.Module) -> nn.Module:
    """A copy with plain parameters: every coded tensor is decoded once and stored densely."""
    result = copy_model(model)
    for _, module in list(_plain_modules(result)):
        if parametrize.is_parametrized(module):
            for attribute in list(_lists(module)):
                with torch.no_grad():
                    dense = getattr(module, attribute).detach().clone()
                trains = any(original.requires_grad for original in _originals(module, attribute))
                _strip(module, attribute)
                setattr(module, attribute, nn.Parameter(dense, requires_grad=trains))
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return result


def _strip(module: nn.Module, attribute: str) -> None:
    """Remove a (nested) parametrization whatever its inner structure, restoring the class when it was the last."""
    del _lists(module)[attribute]
    delattr(type(module), attribute)
    if not len(_lists(module)):
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]


def build(model: nn.Module) -> nn.Module:
    """A copy in which codes that can compute without decoding do so (a factorised layer becomes two layers)."""
    result = copy_model(model)
    for path, module in list(_plain_modules(result)):
        if not path or not parametrize.is_parametrized(module, "weight"):
            continue
        builder: Callable[[nn.Module], nn.Module] | None = getattr(_lists(module)["weight"][0], "build", None)
        if builder is not None:
            parent, _, key = path.rpartition(".")
            setattr(result.get_submodule(parent), key, builder(module))
    return result
