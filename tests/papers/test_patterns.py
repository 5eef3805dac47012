"""Facts behind patterns: what goes together, exact counts, ties by position, files that give it back; and budgets."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput import registry
from lilliput.code.base import codes, pack, realize, storage
from lilliput.export import pack as files
from lilliput.export.onnx import Structure
from lilliput.prune import budget, fast_patterns
from lilliput.prune.budget import PruneToBudget, allocate
from lilliput.prune.patterns import parse
from lilliput.prune.prune import Prune
from lilliput.prune.sparse import SET
from lilliput.registry import entries
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse
from lilliput.task import Task, predict

FINEST_FIRST = ("elements", "block 4x1", "block 8x1", "kernel", "block 16x1", "block 4x4", "block 1x16")
RECORD = Path(__file__).parents[2] / "results" / "engine" / "patterns.json"
MATRIX, CONV = (8, 16), (8, 4, 3, 3)
UNITS = {  # pattern -> (units of MATRIX, units of CONV; None where it does not fit)
    "elements": (128, 288),
    "channel": (8, 8),
    "row": (8, 8),
    "filter": (8, 8),
    "neuron": (8, 8),
    "column": (16, 4),
    "kernel": (None, 32),
    "head 4": (4, 4),
    "block 4x2": (16, 36),
    "block 2x2x3x3": (None, 8),
}


@pytest.mark.parametrize("text", UNITS)
@pytest.mark.parametrize("which", [0, 1])
def test_units_go_as_one_exactly_as_many_as_asked_the_lowest_first(text: str, which: int) -> None:
    shape, units, pattern = (MATRIX, CONV)[which], UNITS[text][which], parse(text)
    if units is None:
        with pytest.raises(ValueError, match=r"where=|pattern="):
            pattern.check(shape)
        return
    pattern.check(shape)
    torch.manual_seed(0)
    score = torch.rand(shape)
    block = pattern.block(shape) or (1,) * len(shape)
    for sparsity in (0.0, 0.25, 0.5, 0.99, 1.0):
        mask = pattern(score, sparsity)
        each = mask.numel() // units
        assert int((~mask).sum()) == each * min(round(sparsity * units), units - 1), "exact, and never the last unit"
        Sparse(mask.numpy(), Plain(score.numpy()), block)  # constant over its blocks, or it raises
    pooled, mask = pattern.pooled(score), pattern(score, 0.5)
    assert pooled.shape == score.shape and len(pooled.unique()) <= units
    assert pooled[mask].min() >= pooled[~mask].max()
    assert pooled.mean() == pytest.approx(float(score.mean()), rel=1e-5)


@pytest.mark.parametrize("text", [*UNITS, "even", "2:4", "2:4 out"])
def test_ties_go_by_position(text: str) -> None:
    for shape in (MATRIX, CONV):
        pattern = parse(text)
        try:
            pattern.check(shape)
        except ValueError:
            continue
        for value in (1.0, 0.1, 1e-38):
            tied = pattern(torch.full(shape, value), 0.5)
            assert torch.equal(tied, pattern(torch.ones(shape), 0.5)), "whatever the value, the same entries"
        block = pattern.block(shape)
        if block is not None:
            dropped = ~tied[tuple(slice(None, None, b) for b in block)].flatten()
            assert dropped[: int(dropped.sum())].all(), "the first units in C order"


def test_n_of_m_along_the_outputs_is_that_along_the_inputs_transposed() -> None:
    torch.manual_seed(0)
    score = torch.rand(16, 6)
    for sparsity in (0.5, 0.25):
        mask = parse("2:4 out")(score, sparsity)
        assert torch.equal(mask, parse("2:4")(score.T.contiguous(), sparsity).T)
    assert (parse("2:4 out")(score, 0.5).reshape(4, 4, 6).sum(1) == 2).all()
    conv = torch.rand(8, 3, 3, 3)
    assert (parse("1:4 out")(conv, 0.75).reshape(2, 4, 27).sum(1) == 1).all()
    assert torch.equal(parse("2:4 out").pooled(score).isinf(), parse("2:4 out")(score, 0.5))
    with pytest.raises(ValueError, match="3:6: groups of 6 must divide the 8 outputs"):
        parse("3:6 out").check((8, 6))


def test_a_head_is_a_run_of_rows_a_column_all_of_an_input_a_kernel_one_pair() -> None:
    """arXiv:1905.10650: a head's queries are E / H rows. arXiv:1608.03665: a channel of the input. arXiv:1705.08922:
    a two-dimensional kernel."""
    score = torch.ones(12, 8)
    score[3:6] = 0.1
    assert (~parse("head 4")(score, 0.25)).any(1).nonzero().flatten().tolist() == [3, 4, 5]
    score = torch.ones(4, 6, 3, 3)
    score[:, 2] = 0.1
    mask = parse("column")(score, 1 / 6)
    assert not mask[:, 2].any() and mask.sum() == 4 * 5 * 9
    score[1, 3] = 0.01
    mask = parse("kernel")(score, 1 / 24)
    assert not mask[1, 3].any() and mask.sum() == 23 * 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer", "remove_blocks"),
        ("heads", "Did you mean 'head'"),
        ("head 0", "got 'head 0'"),
        ("block 0x2", "got 'block 0x2'"),
        ("block 10x1", None),
        ("4:2", "0 < n < m"),
        ("2:4 in", "'2:4 out'"),
        ("", "got ''"),
    ],
)
def test_a_pattern_that_is_none_says_what_there_is(text: str, words: str | None) -> None:
    if words is None:
        assert parse(text).block((20, 4)) == (10, 1)
        return
    with pytest.raises((KeyError, ValueError), match=words):
        parse(text)


@pytest.mark.parametrize("text", ["column", "kernel", "head 4", "2:4 out", "row", "block 2x2", "engine"])
def test_a_packed_file_gives_the_pattern_back(text: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16))
    pruned = Prune(0.5, pattern=text, allocation="uniform")(net, None, None)
    stored, predicted = pack(pruned), storage(pruned)
    structure = _structure(net)
    size = files.write(structure, stored, tmp_path / "model.lil")
    again = files.read(tmp_path / "model.lil")
    plain = realize(pruned).state_dict()
    decoded = list(again.tensors().values())
    for name, code in codes(pruned).items():
        assert size.tensors[name] == predicted[name].size_bytes, "as long as was said"
        assert any(np.array_equal(plain[name].numpy(), value) for value in decoded if value.ndim > 1)
        assert (plain[name] == 0).double().mean() == 0.5
        assert code[0].block == parse(text).of(name).block(tuple(plain[name].shape))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(again(x), pruned(x).detach(), rtol=1e-4, atol=1e-5)


def _structure(net: nn.Sequential) -> Structure:
    """The graph of the network above, made by hand: an export takes seconds."""
    import onnx
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "3.weight", "3.bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 4, 3, 3])],
        [helper.make_tensor_value_info("y", 1, ["batch", 16])],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in net.named_parameters()],
    )
    return Structure(onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.fixture(scope="module")
def mlp() -> tuple[nn.Module, Task]:
    """The network of the second test: three layers of unlike importance."""
    data = pytest.importorskip("lilliput.data.mnist1d")
    model, task = data.mnist1d_mlp()
    return model, task


def divergence(model: nn.Module, task: Task, dense: nn.Module) -> float:
    inputs, _ = task.split("val")
    return float(task.divergence(predict(model, inputs), predict(dense, inputs)).mean())


@pytest.mark.parametrize("kind", ["bytes", "macs"])
def test_a_budget_is_kept_as_counted_on_the_result_and_beats_uniform(kind: str, mlp: tuple[nn.Module, Task]) -> None:
    model, task = mlp
    for sparsity in (0.8, 0.9):
        uniform = Prune(sparsity, allocation="uniform")(model, None, None)
        allowed = cost(uniform, kind)
        pairs = allocate(model, task, **{kind: allowed})
        chosen = Prune(allocation=pairs)(model, task, None)
        assert cost(chosen, kind) <= allowed
        assert divergence(chosen, task, model) < 0.9 * divergence(uniform, task, model)


def cost(model: nn.Module, kind: str) -> int:
    if kind == "bytes":
        return sum(held.size_bytes for held in storage(model).values())
    return sum(int((p != 0).sum()) for n, p in realize(model).named_parameters() if p.dim() > 1)


def test_the_choice_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        levels = (0.0, 0.5, 0.8, 0.9)
        lost = {n: dict(zip(levels, np.sort(draw.random(4)), strict=True)) for n in "abc"}
        costs = {n: dict(zip(levels, -np.sort(-draw.integers(1, 999, 4)).astype(float), strict=True)) for n in "abc"}
        least, most = (sum(f(row.values()) for row in costs.values()) for f in (min, max))
        allowed = (least + most) / 2
        cheapest = budget._cheapest(lost, costs, allowed, "bytes", 0)
        ways = [dict(zip("abc", way, strict=True)) for way in itertools.product(levels, repeat=3)]
        fit = [w for w in ways if sum(costs[n][s] for n, s in w.items()) <= allowed * 0.9995]
        assert sum(costs[n][s] for n, s in cheapest.items()) <= allowed
        assert sum(lost[n][s] for n, s in cheapest.items()) <= min(sum(lost[n][s] for n, s in w.items()) for w in fit)
    assert budget._cheapest(lost, costs, most, "bytes", 0) == dict.fromkeys("abc", 0.0)
    with pytest.raises(ValueError, match="bytes must be at least"):
        budget._cheapest(lost, costs, least - 1, "bytes", 0)


def tiny() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)).eval()
    x, y = torch.randn(64, 1, 8), torch.arange(64) % 4
    return net, Task("tiny", (x, y), (x, y))


def test_macs_count_how_often_a_weight_is_used() -> None:
    net, task = tiny()
    fixed, costs = budget._macs(
        net,
        task,
        budget._masks(net, task, ["0.weight"], "magnitude", parse("elements"), [0.0, 0.5], 0),
        parse("elements"),
    )
    assert fixed == 96 and costs["0.weight"] == {0.0: 72.0, 0.5: 36.0}, "six places of three entries of four kernels"
    gru = nn.GRU(3, 5, batch_first=True)
    assert budget._uses(gru, torch.zeros(1, 7, 3), None) == 7


def test_settings_out_of_range_say_what_to_do() -> None:
    net, task = tiny()
    with pytest.raises(ValueError, match="one of bytes, macs and latency_ms must be given"):
        allocate(net, task)
    with pytest.raises(ValueError, match="one of bytes, macs and latency_ms must be given"):
        allocate(net, task, bytes=100, macs=100)
    with pytest.raises(ValueError, match=r"levels must be in \[0, 1\)"):
        allocate(net, task, macs=100, levels=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"macs must be at least .* Raise it"):
        allocate(net, task, macs=1)
    with pytest.raises(ValueError, match="one of bytes"):
        PruneToBudget()
    pairs = allocate(net, task, macs=130, pattern="2:4", where="3")
    assert pairs == (("3.weight", 0.5),), "no sparser than the pattern allows"
    pruned = PruneToBudget(macs=60)(net, task, None)
    assert {name: code[0].sparsity for name, code in codes(pruned).items()}.keys() == {"0.weight", "3.weight"}


@pytest.mark.slow
def test_a_budget_of_measured_time() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).eval()
    x = torch.randn(64, 1024)
    task = Task("time", (x, x), (x, x), None, "mse", "mse")
    timer = budget._Timer(net, task)
    pairs = allocate(net, task, latency_ms=0.45 * timer.dense_ms, pattern="engine", levels=(0.0, 0.9))
    assert any(sparsity for _, sparsity in pairs)
    pruned = Prune(allocation=pairs, pattern="engine")(net, task, None)
    masks = {name: code[0].mask for name, code in codes(pruned).items()}
    assert timer.ms(masks) < 0.85 * timer.dense_ms


# ------------------------------------------------------------------------------------------------ what the engine likes


def test_engine_looks_at_the_kind_of_layer() -> None:
    net = nn.ModuleDict(
        {"gru": nn.GRU(16, 32), "linear": nn.Linear(32, 48), "odd": nn.Linear(32, 7), "conv": nn.Conv2d(16, 16, 3)}
    )
    pruned = Prune(0.75, pattern="engine", allocation="uniform")(net, None, None)
    for name, (code, *_) in codes(pruned).items():
        kind = fast_patterns.kind(name, tuple(code.mask.shape))
        text = fast_patterns.fast(tuple(code.mask.shape), kind)
        assert code.block == parse(text).block(tuple(code.mask.shape))
        assert code.sparsity == pytest.approx(0.75, abs=0.1)
    assert fast_patterns.kind("gru.weight_hh_l0", (96, 32)) == "recurrent"
    assert fast_patterns.fast((7, 32), "linear") == "elements", "where no block divides the shape"
    with pytest.raises(ValueError, match="kind must be one of"):
        fast_patterns.fast((8, 8), "dense")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with SET(0.75, pattern="engine", every=1).attached(net, optimizer, steps=3):
        for _ in range(3):
            F.relu(net["odd"](net["gru"](torch.randn(3, 16))[0])).sum().backward()
            optimizer.step()
    for name, (code, *_) in codes(net).items():
        Sparse(code.mask.numpy(), Plain(realize(net).get_parameter(name).detach().numpy()), code.block)


def test_the_table_is_what_was_measured() -> None:
    """The finest pattern whose time is within a fifth of the fastest one's, over the sparsities, by kind of layer;
    whole channels are no pattern of a table, for they are taken out of the network."""
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    layers = {
        "recurrent": ["recurrent"],
        "linear": ["linear, 1 row", "linear, 128 rows"],
        "convolution": ["convolution 3x3"],
        "pointwise": ["convolution 1x1"],
    }
    assert set(layers) == set(fast_patterns.FAST)
    for kind, names in layers.items():
        spent: dict[str, list[float]] = {}
        for row in rows:
            if row["layer"] in names and row["sparsity"] >= 0.8 and row["pattern"] in FINEST_FIRST:
                spent.setdefault(row["pattern"], []).append(1 / row["times_dense"])
        mean = {text: float(np.exp(np.mean(np.log(times)))) for text, times in spent.items()}
        best = min(mean.values())
        wanted = next(text for text in FINEST_FIRST if text in mean and mean[text] <= 1.2 * best)
        assert fast_patterns.FAST[kind][0] == wanted, (kind, mean)


def test_a_plain_function_is_a_pattern() -> None:
    @registry.register("pattern")
    def leading(score: torch.Tensor, sparsity: float) -> torch.Tensor:
        return (torch.arange(score.shape[1]) >= round(sparsity * score.shape[1])).expand_as(score)

    try:
        pruned = Prune(0.5, pattern="leading")(nn.Linear(4, 3), None, None)
        assert (pruned.weight == 0).sum(0).tolist() == [3, 3, 0, 0]
        with pytest.raises(ValueError, match="pattern 'leading' must be one word, got 'leading 3'"):
            Prune(0.5, pattern="leading 3")
    finally:
        del registry.live["pattern", "leading"]
        registry._table.cache_clear()


def test_the_page_has_every_pattern() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prune" / "patterns.md").read_text(encoding="utf-8")
    table = page[page.index("| pattern |") : page.index("Counts are exact")]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    shown = {text.split()[0] for cell in cells for text in re.findall(r'`"([^"]+)"`', cell)}
    assert {"N:M" if ":" in name else name for name in shown} == {entry.name for entry in entries("pattern")}
