"""Build coded layers: what computes from theta, without decoding, in the place of a layer that decodes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code, copy_model, dense, hold, realize, strip
from lilliput.code.names import lists, original_names, plain_modules
from lilliput.code.reshape import Reshape


def deploy(model: nn.Module) -> nn.Module:
    """Make the module to deploy: coded layers built where that saves values, all other tensors decoded.

    Args:
        model: any module, itself a coded layer included; it stays as it is.

    Returns:
        A copy of plain parameters. The root is a new module where the model is one layer that is built.

    Example:
        >>> from lilliput.code.base import attach
        >>> from lilliput.code.low_rank import LowRank
        >>> net = nn.Linear(64, 64)
        >>> attach(net, "weight", LowRank(4))
        >>> [tuple(p.shape) for p in deploy(net).parameters()]
        [(4, 64), (64, 4), (64,)]
    """
    return realize(build(model, only_smaller=True))


def build(model: nn.Module, *, only_smaller: bool = False) -> nn.Module:
    """Let codes that can compute without decoding do so: a factorised layer becomes two layers.

    Codes that store the factors in turn go along with them. What cannot be built stays coded.

    Args:
        model: any module; it stays as it is.
        only_smaller: leave a layer alone that would have as many values as the decoded one.

    Returns:
        A copy; the root is a new module where the model is one layer that is built.

    Example:
        >>> from lilliput.code.base import attach
        >>> from lilliput.code.low_rank import LowRank
        >>> net = nn.Sequential(nn.Linear(8, 8))
        >>> attach(net, "0.weight", LowRank(2))
        >>> [layer.weight.shape for layer in build(net)[0]]
        [torch.Size([2, 8]), torch.Size([8, 2])]
    """
    result = copy_model(model)
    theta: dict[int, tuple[Tensor, ...]] = {}
    made: dict[int, nn.Module | None] = {}
    for path, module in list(plain_modules(result)):
        if parametrize.is_parametrized(module) and not _read_by_its_parent(result, path):
            made[id(module)] = _built(module, theta, only_smaller)
    for module in list(result.modules()):
        for key, child in list(module._modules.items()):
            if (new := made.get(id(child))) is not None:
                module._modules[key] = new
    root = made.get(id(result))
    return result if root is None else root


def _built(module: nn.Module, thetas: dict[int, tuple[Tensor, ...]], only_smaller: bool) -> nn.Module | None:
    """What takes the place of a module with a coded tensor; None where there is nothing, or it would save nothing."""
    for attribute, holder in list(lists(module).items()):
        if not isinstance(holder[0], Code):
            continue
        names = original_names(holder)
        if id(holder) not in thetas:  # tied tensors stay so: each of their layers is built from the same parameters
            thetas[id(holder)] = tuple(_parameter(holder, name) for name in names)
        theta = thetas[id(holder)]
        # Other coded tensors of the layer, such as its bias, are plain while it is built, and coded again afterwards.
        others = {name: other for name, other in lists(module).items() if name != attribute}
        for name in others:
            strip(module, name, dense(module, name))
        new = holder[0].build(module, attribute, theta)
        if new is None or (only_smaller and _values(new) >= _values(module) + getattr(module, attribute).numel()):
            for name, other in others.items():
                hold(module, name, other)
            continue
        for name, part in zip(names, theta, strict=True):
            if parametrize.is_parametrized(holder, name):
                _carry(new, part, lists(holder)[name])
        for name, other in others.items():
            _carry(new, module._parameters[name], other)
        return new.train(module.training)
    return None


def _values(module: nn.Module) -> int:
    """The values of a module's plain parameters."""
    return sum(p.numel() for m in plain_modules(module) for p in m[1]._parameters.values() if p is not None)


def _parameter(holder: nn.Module, name: str) -> nn.Parameter:
    """A theta as a parameter of its own: the one that is there, or the decoded one where a code stores it."""
    original = getattr(holder, name)
    if isinstance(original, nn.Parameter):
        return original
    return nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)


def _carry(built: nn.Module, part: Tensor | None, inner: nn.Module) -> None:
    """Let the codes that stored a theta store the parameter of `built` that it has become, or a view of it."""
    if part is None:
        return
    place = part.untyped_storage().data_ptr()
    for module in list(built.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.untyped_storage().data_ptr() != place:
                continue
            if parameter.shape == part.shape:
                hold(module, name, inner)
                continue
            shaped = Reshape(tuple(part.shape))
            parametrize.register_parametrization(module, name, shaped, unsafe=True)
            hold(lists(module)[name], "original", inner)


def _read_by_its_parent(model: nn.Module, path: str) -> bool:
    """Attention (and the fast path of the Transformer layers) reads the weights of its linear layers itself."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    return isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
