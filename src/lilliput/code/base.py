"""Code: how one tensor is stored. W = decode(theta), with theta cheaper than W.

A code is a parametrization of `torch.nn.utils.parametrize` (forward = decode, right_inverse = encode), so every module
type works unchanged, gradients reach theta, and `state_dict` holds everything. Codes nest: the theta of one (kept
weights, factors) may be stored by another, attached to the originals that it names in `inner`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.left import left
from lilliput.code.names import lists, original_names, originals, plain_modules
from lilliput.errors import NotSupported
from lilliput.proposal import Refusal
from lilliput.stored.base import Storage, Stored
from lilliput.stored.plain import Plain
from lilliput.stored.shared import Shared


class Code(nn.Module):
    """Store a tensor in one way: plain settings, float theta as parameters, everything discrete as buffers.

    A subclass overwrites encode, decode and pack, all differentiable where they can be; refuses, build and made where
    it needs to. It is attached to a tensor as a parametrization, so every module works unchanged.

    Attributes:
        inner: which theta another code may store in turn, by place.
        version: rises when the result of the code changes.

    Example:
        >>> class Negated(Code):
        ...     def encode(self, weight):
        ...         return -weight
        ...
        ...     def decode(self, *theta):
        ...         return -theta[0]
        >>> Negated().decode(Negated().encode(torch.ones(2)))
        tensor([1., 1.])
    """

    version: ClassVar[int] = 1
    inner: ClassVar[tuple[int, ...]] = ()
    _shape: tuple[int, ...] = ()  # of the tensor that is stored, once it is attached

    def refuses(self, weight: Tensor) -> str | None:
        """Why this code cannot store a tensor, or None where it can; asked before anything is attached."""
        return None

    def encode(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """theta for a tensor; overwritten by each code."""
        return weight

    def decode(self, *theta: Tensor) -> Tensor:
        """The tensor that theta stands for; overwritten by each code."""
        return theta[0]

    def pack(self, *theta: Stored) -> Stored:
        """theta as it goes into a file; overwritten by each code."""
        return theta[0]

    def build(self, module: nn.Module, attribute: str, theta: tuple[Tensor, ...]) -> nn.Module | None:
        """A module that computes what `module` does from theta, without decoding; None where there is none.

        Args:
            module: the layer that holds the tensor; it is left as it is.
            attribute: the name of the tensor in it.
            theta: parameters that the new module takes as they are, or reshaped without a copy: codes that store a
                theta in turn then go along with it.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The plain values that the code was made with."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training" and isinstance(value, int | float | str | tuple)
        }

    def spec(self) -> dict[str, Any]:
        """The code as plain data, from which it can be made again: its class and settings."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings().items()}
        return {"code": type(self).__name__, **plain}

    @classmethod
    def made(cls, settings: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> "Code":
        """A code of these settings with the buffers of one that was stored; none for one that is to encode a tensor.

        A code whose constructor needs a tensor overwrites it.

        Raises:
            TypeError: for settings that the code does not take.
        """
        try:
            code = cls(**settings)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: its settings must be those of its constructor, but {error}.") from error
        for name, buffer in buffers.items():
            path, _, key = name.rpartition(".")
            if key in code.get_submodule(path)._buffers:
                setattr(code.get_submodule(path), key, buffer.clone())
        return code

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
        self._shape = tuple(weight.shape)
        return self.encode(weight)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds the parameter `name`: several where weights are tied."""
    path, _, attribute = name.rpartition(".")
    target = model.get_submodule(path)
    if parametrize.is_parametrized(target, attribute):
        holder = lists(target)[attribute]
        return [(m, key) for _, m in plain_modules(model) for key, value in lists(m).items() if value is holder]
    parameter = target._parameters[attribute]
    return [
        (module, key)
        for _, module in plain_modules(model)
        for key, value in module._parameters.items()
        if value is parameter
    ]


def attach(model: nn.Module, name: str, code: Code) -> None:
    """Store the tensor `name` of `model` by `code`, in place; on top of a code that is there, its inner theta.

    A tied tensor gets one code, which all of its modules read.

    Args:
        model: its module that holds the tensor is changed.
        name: a parameter, by the name that it has in `named_parameters()` before codes are attached.
        code: what stores it; a copy of it stores each further inner theta.

    Raises:
        NotSupported: for a code that refuses the tensor, and for one with nothing to nest in. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> attach(net, "0.weight", Code())
        >>> list(codes(net))
        ['0.weight']
    """
    (module, attribute), *tied = holders(model, name)
    fresh = not parametrize.is_parametrized(module, attribute)
    _attach(module, attribute, name, code)
    for other, key in tied if fresh else ():
        hold(other, key, lists(module)[attribute])


def hold(module: nn.Module, attribute: str, holder: nn.Module) -> None:
    """Let a module read a tensor from the parametrization list of another one, in place of its own parameter."""
    parametrize.register_parametrization(module, attribute, nn.Identity(), unsafe=True)
    lists(module)[attribute] = holder


def _attach(module: nn.Module, attribute: str, name: str, code: Code) -> None:
    if not parametrize.is_parametrized(module, attribute):
        tensor = getattr(module, attribute)
        if not tensor.is_floating_point():
            why: str | None = f"it holds {tensor.dtype}"
        else:
            why = code.refuses(tensor.detach())
        if why:
            raise NotSupported(f"attach: {type(code).__name__} cannot store {name}: {why}. Leave it out with where=.")
        trains = tensor.requires_grad
        parametrize.register_parametrization(module, attribute, code, unsafe=True)
        for part in originals(module, attribute):
            part.requires_grad_(trains)
        return
    holder = lists(module)[attribute]
    names = original_names(holder)
    if not isinstance(holder[0], Code):
        raise NotSupported(f"attach: {name} must be a plain tensor, but {foreign(holder[0])}.")
    inner = holder[0].inner
    if not inner:
        raise NotSupported(
            f"attach: {name} must be stored by a code that others can nest in, got "
            f"{type(holder[0]).__name__}. Realize it first."
        )
    done: list[str] = []
    try:
        for k, i in enumerate(inner):
            _attach(holder, names[i], name, code if k == 0 else copy.deepcopy(code))
            done.append(names[i])
    except NotSupported:
        for taken in done:
            strip(holder, taken, dense(holder, taken))
        raise


def codes(model: nn.Module) -> dict[str, tuple[Code, ...]]:
    """List the codes of each coded tensor.

    Args:
        model: any module.

    Returns:
        By name, outermost first; a tied tensor is there once, under its first name.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> attach(net, "0.weight", Code())
        >>> codes(net)
        {'0.weight': (Code(),)}
    """
    chains: dict[str, tuple[Code, ...]] = {}
    seen: set[int] = set()
    for path, module in plain_modules(model):
        for attribute, holder in lists(module).items():
            if isinstance(holder[0], Code) and id(holder) not in seen:
                seen.add(id(holder))
                chains[f"{path}.{attribute}" if path else attribute] = tuple(_chain(module, attribute))
    return chains


def foreign(parametrization: nn.Module) -> str:
    """Why a tensor with a parametrization that is no code (weight normalisation) is left alone."""
    name = type(parametrization).__name__.strip("_")
    return f"{name} computes it (torch.nn.utils.parametrize.remove_parametrizations makes it plain)"


def reason(model: nn.Module, name: str) -> str | None:
    """Why no code can store the tensor `name` (it is tied, another parametrization computes it), or None."""
    path, _, attribute = name.rpartition(".")
    coded = lists(model.get_submodule(path))
    if attribute in coded:
        return None if isinstance(coded[attribute][0], Code) else foreign(coded[attribute][0])
    return "its weights are tied to another layer's" if len(holders(model, name)) > 1 else None


def _chain(module: nn.Module, attribute: str) -> Iterator[Code]:
    holder = lists(module)[attribute]
    yield holder[0]
    for original in original_names(holder):
        if parametrize.is_parametrized(holder, original):
            yield from _chain(holder, original)


def pack(model: nn.Module) -> dict[str, Stored]:
    """Every parameter and buffer of a model as it goes into a file, by the name it has in the realized state_dict.

    A tied tensor is stored under its first name; under the others it is `Shared`. Complex numbers are pairs
    of real ones along a last axis.
    """
    packed: dict[str, Stored] = {}
    first: dict[int, str] = {}
    with torch.no_grad():
        for path, module in plain_modules(model):
            prefix = f"{path}." if path else ""
            for name in dict.fromkeys((*module._parameters, *lists(module))):
                held = lists(module)[name] if name in lists(module) else module._parameters[name]
                if held is not None:
                    one = first.setdefault(id(held), prefix + name)
                    packed[prefix + name] = _pack(module, name) if one == prefix + name else Shared(one, packed[one])
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    packed[prefix + name] = Plain(_array(buffer))
    return packed


def _array(tensor: Tensor) -> Any:
    """A tensor in a type that files and graphs can hold: complex numbers are their real and imaginary parts."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype in (torch.bfloat16, torch.float64):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def _pack(module: nn.Module, name: str) -> Stored:
    if name in lists(module) and isinstance(lists(module)[name][0], Code):
        holder = lists(module)[name]
        stored: Stored = holder[0].pack(*(_pack(holder, original) for original in original_names(holder)))
        return stored
    tensor = getattr(module, name)
    return Plain(_array(tensor if tensor.is_complex() else tensor.float()))


def storage(model: nn.Module) -> dict[str, Storage]:
    """Predict the section of each tensor in model.lil, from theta alone.

    Args:
        model: any module; tensors without a code are counted as they are.

    Returns:
        The parts of each tensor's section, by its name in the realized state_dict.

    Example:
        >>> storage(nn.Linear(4, 2))["weight"].size_bytes
        32
    """
    return {name: stored.storage() for name, stored in pack(model).items()}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy whose coded modules have classes of their own, so that realizing it leaves the original alone.

    `deepcopy` shares the class that a parametrization injects; removing it from the copy would delete the property
    from the original. A coded recurrent layer keeps its last decoded weights, which cannot be copied; the copy decodes
    its own. Tensors that a forward pass left behind (`self.last = x`) are copied without their graphs.
    """
    memo: dict[int, Any] = {
        id(module._flat_weights): [None] * len(module._flat_weights)
        for module in model.modules()
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module)
    }
    memo |= {id(tensor): tensor.detach().clone() for module in model.modules() for tensor in left(vars(module))}
    result = copy.deepcopy(model, memo)
    for module in filter(parametrize.is_parametrized, result.modules()):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    return result


def realize(model: nn.Module) -> nn.Module:
    """Decode every coded tensor, once, into a plain parameter; tied ones stay tied.

    Args:
        model: any module; it stays as it is.

    Returns:
        A copy without codes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> attach(net, "0.weight", Code())
        >>> sorted(realize(net).state_dict())
        ['0.bias', '0.weight']
    """
    return _decoded(copy_model(model), nn.Module)


def _decoded(result: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Decode, in place, every tensor that a parametrization of a kind computes."""
    decoded: dict[int, tuple[nn.Module, nn.Parameter]] = {}
    for _, module in list(plain_modules(result)):
        if parametrize.is_parametrized(module):
            for attribute in list(lists(module)):
                holder = lists(module)[attribute]
                if not isinstance(holder[0], kind):
                    continue
                if id(holder) not in decoded:
                    decoded[id(holder)] = holder, dense(module, attribute)
                strip(module, attribute, decoded[id(holder)][1])
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return result


def uncoded(model: nn.Module) -> nn.Module:
    """A copy whose coded tensors are decoded; those that another parametrization computes stay as they are."""
    return _decoded(copy_model(model), Code)


def dense(module: nn.Module, attribute: str) -> nn.Parameter:
    """The decoded tensor as a parameter."""
    trains = any(original.requires_grad for original in originals(module, attribute))
    with torch.no_grad():
        return nn.Parameter(getattr(module, attribute).detach().clone(), requires_grad=trains)


def strip(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    """A plain parameter in place of a (nested) parametrization; the class comes back where it was the last one."""
    del lists(module)[attribute]
    delattr(type(module), attribute)
    if not len(lists(module)):
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    setattr(module, attribute, parameter)
