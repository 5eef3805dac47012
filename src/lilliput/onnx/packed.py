"""Packed sequences in a graph: kept padded beside their lengths, which is what files and runtimes understand."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from lilliput.errors import ExportError

SHORT = {nn.LSTM: "lstm", nn.GRU: "gru"}


@contextlib.contextmanager
def padded(model: nn.Module) -> Iterator[None]:
    """Inside, `pack_padded_sequence` keeps a batch padded, and recurrent layers read each sequence up to its length.

    A `PackedSequence` then holds the padded batch (batch, steps, features) as its data and the lengths as its batch
    sizes. Backward directions read each sequence reversed within its length. The last cell state of an LSTM cannot be
    read off its outputs: whatever reads it raises ExportError.

    Args:
        model: its recurrent layers are told; outside they are as they were.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase) and not module.proj_size]
    own = cast(Any, rnn)._VF
    cast(Any, rnn)._VF = SimpleNamespace(_pack_padded_sequence=_packed, _pad_packed_sequence=_unpacked)
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        cast(Any, rnn)._VF = own
        for layer in layers:
            del layer.forward


def _packed(steps: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    return steps if batch_first else steps.transpose(0, 1), lengths


def _unpacked(data: Tensor, lengths: Tensor, batch_first: bool, value: float, most: Any) -> tuple[Tensor, Tensor]:
    place = torch.arange(data.shape[1], device=data.device)
    steps = torch.where((place < lengths[:, None])[..., None], data, value)
    return steps if batch_first else steps.transpose(0, 1), lengths


def _forward(layer: nn.RNNBase, input: Any, hx: Any = None) -> Any:
    """What the layer computes; of a packed sequence, on the padded batch."""
    if not isinstance(input, rnn.PackedSequence):
        return type(layer).forward(layer, input, hx)
    steps, lengths, order, back = input
    cells = isinstance(layer, nn.LSTM)
    given = () if hx is None else hx if cells else (hx,)
    given = tuple(state if order is None else state.index_select(1, order) for state in given)
    lasts: list[Tensor] = []
    for level in range(layer.num_layers):
        sides = []
        for direction in range(2 if layer.bidirectional else 1):
            start = tuple(state[len(lasts)][None] for state in given)
            ends, last = _run(layer, f"_l{level}{'_reverse' * direction}", steps, lengths, start)
            sides.append(ends)
            lasts.append(last)
        steps = torch.cat(sides, -1)
    state = torch.stack(lasts)
    state = state if back is None else state.index_select(1, back)
    packed = rnn.PackedSequence(steps, lengths, order, back)
    return packed, ((state, _Cell()) if cells else state)


class _Cell:
    """The last cell state, which nothing may read."""

    def __getattr__(self, name: str) -> Any:
        raise ExportError(
            "the last cell state of a packed sequence is not to be had from a file's LSTM. Read the hidden state."
        )

    __getitem__ = __iter__ = __getattr__


def _run(
    layer: nn.RNNBase, name: str, steps: Tensor, lengths: Tensor, start: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """One level in one direction: its output at each step, and at the last step of each sequence."""
    held = [n for group in layer._all_weights for n in group if n.endswith(name)]
    weights = [cast(Tensor, getattr(layer, n)) for n in held]
    zero = steps.new_zeros(1, steps.shape[0], layer.hidden_size)
    kind = SHORT.get(type(layer), f"rnn_{layer.mode.removeprefix('RNN_').lower()}")
    state = (start or (zero, zero)) if kind == "lstm" else (start[0] if start else zero)
    place = torch.arange(steps.shape[1], device=steps.device)
    turned = lengths[:, None] - 1 - place
    turned = torch.where(turned < 0, place, turned)[..., None]  # what is behind the end stays there
    if name.endswith("_reverse"):
        steps = steps.gather(1, turned.expand(-1, -1, steps.shape[2]))
    run = getattr(torch._VF, kind)
    out: Tensor = run(steps, state, weights, layer.bias, 1, 0.0, False, False, True)[0]
    last = out.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]
    return (out.gather(1, turned.expand(-1, -1, out.shape[2])) if name.endswith("_reverse") else out), last
