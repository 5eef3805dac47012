"""Attention heads: find them, tell whether they can go, and make networks without some of them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.errors import near
from lilliput.graph import slicing
from lilliput.graph.trace import Skipped, agree, calls, copied, first_line, frozen, replace_, run, shapes, sketch, tied

# How common attention modules name their projections, the map after the heads and the number of heads.
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
FUSED = ("qkv", "to_qkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn", "in_proj")
"""One layer for all three."""
OUTPUTS = ("output", "out_proj", "o_proj", "out_lin", "o", "to_out", "proj", "out", "output.dense", "dense")
COUNTS = ("heads", "num_heads", "num_attention_heads", "n_heads")
ONE = ("head_dim", "attention_head_size")  # the size of one head
SIZES = ("all_head_size", "inner_dim", "attn_dim")  # heads times the size of one, where a module notes that


@dataclass(frozen=True)
class Heads:
    """Describe the heads of one attention module.

    Head h owns rows [h * size, (h + 1) * size) of query, key and value and the same columns of output. Where one layer
    computes all three, these lie in it "apart" (all queries, all keys, all values), or "together", head after head.

    Args:
        name: The path of the module.
        count: How many heads it has.
        size: The rows of one.
        projections: Paths of query, key, value, or of the one layer that computes all three.
        output: The path of the linear layer after the heads.
        reason: Why none may go; empty when some may.
        fused: How the three lie in one layer; empty where they are layers of their own.
    """

    name: str
    count: int
    size: int
    projections: tuple[str, ...] = ()  # paths of query, key, value
    output: str = ""
    reason: str = ""
    fused: str = ""

    @property
    def removable(self) -> bool:
        return not self.reason

    def rows(self, heads: Tensor) -> Tensor:
        """Return the columns of output that these heads own: also the rows of query, key and value where each is a
        layer."""
        return (heads[:, None] * self.size + torch.arange(self.size)).flatten()

    def projected(self, heads: Tensor) -> Tensor:
        """Return the rows of each of the projections that these heads own."""
        if self.fused == "together":
            return (heads[:, None] * 3 * self.size + torch.arange(3 * self.size)).flatten()
        blocks = 3 if self.fused else 1
        return torch.cat([block * self.count * self.size + self.rows(heads) for block in range(blocks)])

    def __str__(self) -> str:
        text = f"{self.count} heads of {self.size} in {self.name or 'the model'}"
        return f"{text}; they stay: {self.reason}." if self.reason else f"{text}."


class HeadAttention(nn.Module):
    """Take the place of an `nn.MultiheadAttention` that lost heads: the same arguments, any number of heads.

    `nn.MultiheadAttention` divides its embed_dim by its heads, so it cannot have fewer heads of the same size. Here the
    four maps are linear layers: query, key, value (inputs -> heads * size) and output (heads * size -> embed_dim). A
    mask of three dimensions is (batch * heads, length, source), with the heads that are left.

    Args:
        layer: The module whose weights are copied.

    Example:
        >>> y, weights = HeadAttention(nn.MultiheadAttention(8, 2, batch_first=True))(*[torch.zeros(1, 5, 8)] * 3)
        >>> y.shape, weights.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 5, 5]))
    """

    # What the Transformer layers of torch look at before they call fused kernels that need the original's tensors.
    in_proj_bias = None
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = layer.embed_dim, layer.num_heads, layer.head_dim
        self.dropout, self.batch_first = layer.dropout, layer.batch_first
        weights = (
            list(layer.in_proj_weight.chunk(3))
            if layer.in_proj_weight is not None
            else [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        )
        biases = [None] * 3 if layer.in_proj_bias is None else list(layer.in_proj_bias.chunk(3))
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.output = _linear(layer.out_proj.weight, layer.out_proj.bias)
        self.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        n, length, source = query.shape[0], query.shape[1], key.shape[1]
        q = self.query(query).view(n, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.key(key).view(n, source, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.value(value).view(n, source, self.num_heads, self.head_dim).transpose(1, 2)
        scores = (q @ k.transpose(2, 3)) * (1 / math.sqrt(self.head_dim))
        if attn_mask is not None:
            mask = _added(attn_mask, scores)
            scores = scores + (mask.view(n, -1, length, source) if mask.dim() == 3 else mask)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask, scores)[:, None, None, :]
        weights = scores.softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        y: Tensor = self.output((weights @ v).transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))
        shown: Tensor | None = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return y[0], None if shown is None else shown[0]
        return (y if self.batch_first else y.transpose(0, 1)), shown

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, batch_first={self.batch_first}"


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as something to add: -inf where a boolean one says that a place is not to be seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def heads(model: nn.Module, example: Any) -> tuple[Heads, ...]:
    """List the heads of each attention module, in the order of its layers; those that must stay say why.

    An attention module is an `nn.MultiheadAttention`, or one that holds three linear layers with the usual names
    (query, key, value; q_proj, ...), or one for all three (qkv, ...), a number of heads, and, itself or in the module
    around it, a linear layer for what the heads found (output, out_proj, output.dense, ...): `lilliput.nets.bert`, most
    of Hugging Face's, and timm's. Each is tried: without half of its heads the network must compute exactly what it
    does when those are not listened to.

    Args:
        model: A model without codes.
        example: One example of inputs.

    Returns:
        A `Heads` for each attention module.

    Raises:
        NotSupported: When the model holds codes (realize it first).

    Example:
        >>> [str(h) for h in heads(nn.TransformerEncoderLayer(8, 2, batch_first=True), torch.rand(1, 3, 8))]
        ['2 heads of 4 in self_attn.']
    """
    work = copied(model, "heads")
    listed = [h for name, module in work.named_modules() if (h := _look(work, name, module)) is not None]
    if not any(h.removable for h in listed):
        return tuple(listed)
    before, reached = run(work, example), calls(work, example)
    return tuple(h if h.reason else _tried(work, h, example, before, h.name in reached) for h in listed)


def _tried(model: nn.Module, one: Heads, example: Any, before: list[Tensor], reached: bool) -> Heads:
    """The heads as they turn out to lie, or the reason why they must stay."""
    tried = [replace(one, fused=fused) for fused in (("apart", "together") if one.fused else ("",))]
    judged = [replace(each, reason=_why(model, each, example, before, reached)) for each in tried]
    return next((each for each in judged if each.removable), judged[0])


def _look(model: nn.Module, name: str, module: nn.Module) -> Heads | None:
    if isinstance(module, nn.MultiheadAttention):
        why = "it adds a key and value of its own" if module.bias_k is not None or module.add_zero_attn else ""
        why = why or ("" if "in_proj_weight" in module._parameters else "its weight is computed from other tensors")
        why = why or ("there is only one" if module.num_heads == 1 else "")
        path = f"{name}." if name else ""
        return Heads(
            name,
            module.num_heads,
            module.head_dim,
            (f"{path}query", f"{path}key", f"{path}value"),
            f"{path}output",
            why,
        )
    children = dict(module.named_children())
    count = _noted(module, COUNTS)
    every = (*PROJECTIONS, *((fused,) for fused in FUSED))
    names = next((p for p in every if all(isinstance(children.get(n), nn.Linear) for n in p)), None)
    if names is None or (len(names) == 1 and not (count or _noted(module, ONE))):
        strange = "Attention" in type(module).__name__ and count and any(True for _ in module.parameters())
        why = "its query, key and value are not linear layers of usual names"
        return Heads(name, count, 0, reason=why) if strange else None
    widths = [int(cast(nn.Linear, children[n]).out_features) for n in names]
    fused = "apart" if len(names) == 1 else ""
    width, rest = divmod(widths[0], 3) if fused else (widths[0], 0)
    count = count or width // (_noted(module, ONE) or width + 1)
    if not count:
        return None
    paths = tuple(f"{name}.{n}" if name else n for n in names)
    whole = Heads(name, count, width // count, paths, fused=fused)
    if len(set(widths)) > 1 or rest or width % count:
        return replace(whole, reason="several heads share a key")
    for place in [name, name.rpartition(".")[0]] if name else [""]:
        for last in OUTPUTS:
            path = f"{place}.{last}" if place else last
            layer = _submodule(model, path)
            layer = layer[0] if isinstance(layer, nn.Sequential) and len(layer) else layer
            path = next(n for n, m in model.named_modules() if m is layer) if layer is not None else ""
            if isinstance(layer, nn.Linear) and layer.in_features == width and path not in paths:
                return replace(whole, output=path, reason="there is only one" if count == 1 else "")
    return replace(whole, reason="the linear layer after its heads has no usual name")


def _noted(module: nn.Module, attributes: tuple[str, ...]) -> int:
    """The first of these attributes that is a whole number, else 0."""
    return next((count for a in attributes if isinstance(count := getattr(module, a, None), int)), 0)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _why(model: nn.Module, one: Heads, example: Any, before: list[Tensor], reached: bool) -> str:
    """Why none of these heads can go; empty when they can."""
    held = {one.name, *one.projections, one.output, f"{one.name}.out_proj"}
    if shared := sorted(held & tied(model)):
        return f"{shared[0]} shares a parameter with another layer"
    if still := sorted(held & frozen(model)):
        return f"{still[0]} is frozen"
    attention = model.get_submodule(one.name)
    if not reached and not isinstance(attention, nn.MultiheadAttention):
        return "no run of the example reaches it"
    order = torch.randperm(one.count, generator=torch.Generator().manual_seed(one.count))
    keep = {one.name: order[: max(one.count // 2, 1)].sort().values}
    try:
        narrow, silent = sketch(model), sketch(model)
        _opened_(silent, [one])
        if not agree(before, run(silent, example), 1e-3):
            return "its forward does more than attend"
        _silence_(silent, one, keep[one.name])
        _narrow_(narrow, [one], keep)
        outputs, expected = run(narrow, example), run(silent, example)
    except Exception as error:  # whatever a stranger's forward raises when its sizes change
        return f"the model fails without some of them ({first_line(error)})"
    return "" if agree(expected, outputs, 1e-3) else "without some of them the rest computes something else"


def _opened_(model: nn.Module, listed: Iterable[Heads]) -> None:
    """Put a HeadAttention in the place of every named nn.MultiheadAttention."""
    for h in listed:
        layer = model.get_submodule(h.name)
        if isinstance(layer, nn.MultiheadAttention):
            replace_(model, layer, HeadAttention(layer))
    for module in model.modules():  # its nested tensors are for the original only
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, HeadAttention) for m in module.modules()):
            module.use_nested_tensor = False


def _silence_(model: nn.Module, one: Heads, keep: Tensor) -> None:
    gone = torch.ones(one.count * one.size, dtype=torch.bool)
    gone[one.rows(keep)] = False
    slicing.silence_(model.get_submodule(one.output), gone.nonzero().flatten())


def _narrow_(model: nn.Module, chosen: Iterable[Heads], keep: Mapping[str, Tensor]) -> None:
    chosen = list(chosen)
    _opened_(model, chosen)
    for h in chosen:
        rows = h.rows(keep[h.name])
        for path in h.projections:
            slicing.narrow_(model.get_submodule(path), h.projected(keep[h.name]), None)
        slicing.narrow_(model.get_submodule(h.output), None, rows)
        _count_(model.get_submodule(h.name), h, len(keep[h.name]))


def _count_(module: nn.Module, h: Heads, count: int) -> None:
    """Write down how many heads an attention module has now."""
    for attribute in (*COUNTS, *SIZES):
        old = getattr(module, attribute, None)
        if isinstance(old, int) and old == (h.count if attribute in COUNTS else h.count * h.size):
            setattr(module, attribute, count * (1 if attribute in COUNTS else h.size))


@contextmanager
def resized(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Layers may get the sizes of a file inside; attention modules then have as many heads as their layers hold.

    Args:
        model: what changes, in place: attention of torch becomes `HeadAttention` where the file says so.
        shapes: of the file's tensors, by name.
    """
    listed = [h for name, module in model.named_modules() if (h := _look(model, name, module)) is not None and h.size]
    fewer = [h for h in listed if any(f"{path}.weight" in shapes for path in h.projections)]
    _opened_(model, fewer)
    yield
    for h in fewer:
        rows = len(cast(nn.Linear, model.get_submodule(h.projections[0])).weight) // (3 if h.fused else 1)
        if rows != h.count * h.size and rows % h.size == 0:
            _count_(model.get_submodule(h.name), h, rows // h.size)


def opened(model: nn.Module, listed: Iterable[Heads]) -> nn.Module:
    """Copy a model so that every removable head's four maps are linear layers that are called; it computes the same."""
    work = copied(model, "opened")
    _opened_(work, [h for h in listed if h.removable])
    return work


def remove_heads(
    model: nn.Module, example: Any, keep: Mapping[str, Tensor], listed: tuple[Heads, ...] | None = None
) -> nn.Module:
    """Copy a model with only the heads keep[name] of each named attention module; a plain module that trains and
    exports.

    A head that goes takes its rows of query, key and value and its columns of output with it. An
    `nn.MultiheadAttention` that loses heads becomes a `HeadAttention`.

    Args:
        model: A model without codes.
        example: One example of inputs.
        keep: Name of the attention module -> sorted indices of the heads that stay (one that is not named keeps all).
        listed: What `heads(model, example)` returned.

    Returns:
        The copy.

    Raises:
        KeyError: For a name that is no attention module.
        ValueError: For one that must stay and for indices outside it.
        NotSupported: When the model holds codes.

    Example:
        >>> net = nn.TransformerEncoderLayer(8, 4, batch_first=True)
        >>> remove_heads(net, torch.rand(1, 3, 8), {"self_attn": torch.tensor([0, 3])}).self_attn.query
        Linear(in_features=8, out_features=4, bias=True)
    """
    listed = heads(model, example) if listed is None else listed
    known = {h.name: h for h in listed}
    chosen: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if name not in known:
            raise KeyError(f"remove_heads: no attention module '{name}'. {near(name, known)}")
        kept, count = torch.as_tensor(kept).long(), known[name].count
        if len(kept) == count and torch.equal(kept, torch.arange(count)):
            continue
        if known[name].reason:
            raise ValueError(f"remove_heads: {Skipped(name, known[name].reason)}. Leave it out of keep.")
        if not len(kept) or bool((kept[1:] <= kept[:-1]).any()) or int(kept[0]) < 0 or int(kept[-1]) >= count:
            raise ValueError(
                f"remove_heads: {name} must keep sorted indices in [0, {count}), at least one, got {kept.tolist()}."
            )
        chosen[name] = kept
    smaller = copied(model, "remove_heads")
    _narrow_(smaller, [known[name] for name in chosen], chosen)
    if shapes(run(smaller, example)) != shapes(run(copied(model, "remove_heads"), example)):
        raise RuntimeError("remove_heads: the output must keep its shape. Keep other heads.")
    return smaller
