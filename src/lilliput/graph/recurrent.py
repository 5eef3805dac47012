"""GRU, LSTM and plain recurrent layers: find the numbers that belong to one hidden unit, and drop some units."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def reason(layer: nn.RNNBase) -> str:
    """Say why the layer's hidden units cannot be narrowed; empty when they can."""
    return "an LSTM with a projection has two sizes" if layer.proj_size else ""


class StandIn(nn.Module):
    """Imitate a recurrent layer's interface and shapes by a linear map, for reading the graph around the layer.

    Both directions and every layer show the same `hidden_size` units, because a recurrent module has one such size:
    keeping unit i keeps it in every layer and direction.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.input_size, layer.hidden_size).to(cast(Tensor, layer.weight_ih_l0))
        self.batch_first, self.copies = layer.batch_first, layer.num_layers * (2 if layer.bidirectional else 1)
        self.bidirectional, self.cell = layer.bidirectional, isinstance(layer, nn.LSTM)

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> Any:
        if isinstance(x, PackedSequence):  # joined as in a padded one; the states then belong to the sorted order
            steps, lengths = pad_packed_sequence(x, self.batch_first)
            out, state = self(steps, hx)
            return pack_padded_sequence(out, lengths, self.batch_first, enforce_sorted=False), state
        h = self.linear(x)
        time = 1 if self.batch_first and x.ndim == 3 else 0
        for state in hx if isinstance(hx, tuple) else () if hx is None else (hx,):
            h = h + state.sum(0).unsqueeze(time)
        last = torch.stack([h.select(time, -1)] * self.copies)
        out = torch.cat([h, h], -1) if self.bidirectional else h
        return out, ((last, last * 1.0) if self.cell else last)


def narrow_(layer: nn.RNNBase, hidden: Tensor | None, inputs: Tensor | None) -> None:
    """Keep the hidden units `hidden` of every layer and direction, and the input columns `inputs`; None keeps all.

    The gates lie one after the other in the rows of weight_ih (gates * hidden, in), weight_hh (gates * hidden, hidden)
    and their biases, so unit i owns the rows i, i + hidden, ...; its own output returns as a column of weight_hh and,
    in a stacked layer, as columns of the next layer's weight_ih.
    """
    size = layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    with torch.no_grad():
        for name in [n for group in layer._all_weights for n in group]:
            w = cast(Tensor, getattr(layer, name))
            kept = w.detach()
            if hidden is not None:
                rows = torch.cat([hidden + g * size for g in range(w.shape[0] // size)])
                kept = kept[rows]
                if name.startswith("weight_hh"):
                    kept = kept[:, hidden]
                elif name.startswith("weight_ih") and not name.startswith("weight_ih_l0"):
                    kept = kept[:, torch.cat([hidden + d * size for d in range(directions)])]
            if inputs is not None and name.startswith("weight_ih_l0"):
                kept = kept[:, inputs]
            setattr(layer, name, nn.Parameter(kept.clone(), requires_grad=w.requires_grad))
    if hidden is not None:
        layer.hidden_size = len(hidden)
    if inputs is not None:
        layer.input_size = len(inputs)


def silence_(layer: nn.RNNBase, hidden: Tensor) -> None:
    """Zero every column that reads the hidden units `hidden` inside the layer: they run, nobody inside hears them."""
    size, hidden = layer.hidden_size, hidden.to(cast(Tensor, layer.weight_hh_l0).device)
    for name in [n for group in layer._all_weights for n in group]:
        w = cast(Tensor, getattr(layer, name)).detach().clone()
        if name.startswith("weight_hh"):
            w[:, hidden] = 0
        elif name.startswith("weight_ih") and not name.startswith("weight_ih_l0"):
            for d in range(w.shape[1] // size):
                w[:, hidden + d * size] = 0
        setattr(layer, name, nn.Parameter(w))
