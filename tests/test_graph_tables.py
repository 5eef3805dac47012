"""Lookup tables: which columns go together, rows and tables that really leave both files, columns that say most."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lilliput
from lilliput import Quantize, Task
from lilliput.code.base import realize
from lilliput.engine.compile import compile
from lilliput.graph import groups, remove_channels
from lilliput.graph.basis import freedom
from lilliput.graph.drop_tables import DropTables
from lilliput.graph.fold_rows import FoldRows
from lilliput.graph.lookup import FirstRows, Nothing, SomeRows
from lilliput.graph.narrow_tables import NarrowTables
from lilliput.graph.stages import Narrow
from lilliput.graph.use import use
from lilliput.proposal import Known, Proposals, Refusal, proposals
from lilliput.recipe import Recipe
from lilliput.task import predict
from lilliput.train import Train

ROWS = (50, 30, 400)


class Beside(nn.Module):
    """Tables beside numbers in one vector, for a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in ROWS)
        self.net = nn.Sequential(nn.Linear(5 + 24, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        return self.net(torch.cat([numbers, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1))


class Products(nn.Module):
    """All inner products of tables and a perceptron's last layer, beside that layer."""

    def __init__(self, rectified: bool = True) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in ROWS)
        self.below = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU() if rectified else nn.Identity()
        )
        self.top = nn.Sequential(nn.Linear(8 + 6, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        dense = self.below(numbers)
        vectors = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        first, second = torch.tril_indices(4, 4, -1)
        products = (vectors @ vectors.transpose(1, 2))[:, first, second]
        return self.top(torch.cat([dense, products], 1))


class Machine(nn.Module):
    """A deep factorization machine: 1/2 (square of the sum - sum of the squares), and a perceptron on the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.scales = nn.Embedding(400, 8), nn.Embedding(400, 1)
        self.deep = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, ids: Tensor) -> Tensor:
        v = self.vectors(ids)
        pairs = 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(1, keepdim=True)
        return self.scales(ids).sum(1) + pairs + self.deep(v.flatten(1))


class Dot(nn.Module):
    """A product of the vectors of two ids."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Embedding(400, 8), nn.Embedding(400, 8), nn.Embedding(400, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return ((self.a(ids[:, 0]) * self.b(ids[:, 1])).sum(-1) + self.bias(ids[:, 1]).squeeze(-1))[:, None]


class Sentence(nn.Module):
    """Convolutions over words, the most of each filter."""

    def __init__(self, words: int = 20_000, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.filters, self.out = nn.Conv1d(width, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.filters(self.words(ids).transpose(1, 2)).relu().amax(2))


def often(count: int, *shape: int) -> Tensor:
    """Ids below `count` as words come: the one of rank r with a share of 1 / r."""
    drawn = torch.multinomial(1 / torch.arange(1, count + 1).float(), int(torch.tensor(shape).prod()), True)
    return drawn.reshape(shape)


def made(kind: type[nn.Module]) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    model, count = kind().eval(), 300
    ids = torch.stack([often(rows, count) for rows in ROWS], 1)
    inputs = {Beside: (torch.randn(count, 5), ids), Products: (torch.randn(count, 5), ids), Dot: ids[:, [2, 2]],
              Machine: often(400, count, 3), Sentence: 1 + often(3000, count, 12) * 6}[kind]  # fmt: skip
    targets = torch.arange(count) % 2 if kind in (Beside, Products, Sentence) else torch.randn(count, 1)
    loss = {} if targets.ndim == 1 else {"loss": "mse", "metric": "mse"}
    return model, Task("tables", train=(inputs, targets), val=(inputs, targets), batch_size=16, **loss)


def free(model: nn.Module, task: Task) -> dict[str, str]:
    return {g.name: str(g) for g in groups(model, task.example) if g.removable}


# -------------------------------------------------------------------------------------------- which columns go together


def test_tables_beside_numbers_narrow_alone() -> None:
    said = free(*made(Beside))
    assert said["tables.0"] == "8 channels made by tables.0, read by net.0."
    assert {"tables.0", "tables.1", "tables.2", "net.0"} == said.keys()


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (Products, "tables.0", "8 channels made by tables.0, tables.1, tables.2 and below.2, read by top.0."),
        (Machine, "vectors", "8 channels made by vectors, read by deep.0."),
        (Dot, "a", "8 channels made by a and b."),
    ],
)
def test_what_a_product_sums_goes_together(kind: type[nn.Module], name: str, said: str) -> None:
    model, task = made(kind)
    assert free(model, task)[name] == said
    keep = torch.tensor([0, 3, 5])
    small = remove_channels(model, task.example, {name: keep})
    silent = kind().eval()
    silent.load_state_dict(model.state_dict())
    gone = torch.ones(8, dtype=torch.bool).index_fill(0, keep, False)
    with torch.no_grad():  # a channel that is zero wherever it is made adds nothing to a product
        for module in silent.modules():
            if isinstance(module, nn.Embedding) and module.embedding_dim == 8:
                module.weight[:, gone] = 0
            elif isinstance(module, nn.Linear) and module.out_features == 8:
                module.weight[gone], module.bias[gone] = 0, 0
    inputs = task.calibration(20)
    assert torch.allclose(predict(small, inputs), predict(silent, inputs), atol=1e-5)


def test_shared_towers_and_raw_inputs() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
            )
            self.out = nn.Linear(13, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(torch.cat([self.tower(a), a.mean((1, 2, 3))[:, None], self.tower(b)], 1))

    torch.manual_seed(0)
    model, x = Towers().eval(), torch.randn(2, 1, 8, 8)
    listed = {g.name: g for g in groups(model, (x, x))}
    assert listed["tower.0"].removable and listed["tower.5"].removable
    assert listed["tower.5"].parts[1].index == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
    small = remove_channels(model, (x, x), {"tower.5": torch.tensor([1, 2]), "tower.0": torch.tensor([0, 4, 6])})
    assert small.out.in_features == 5 and small(x, x).shape == (2, 3)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_are_followed(padded: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.words, self.out = padded, nn.Embedding(50, 12), nn.Linear(32, 3)
            self.lstm = nn.LSTM(12, 16, batch_first=True, bidirectional=True)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
            states, (last, _) = self.lstm(packed)
            if self.padded:
                return self.out(pad_packed_sequence(states, batch_first=True)[0].amax(1))
            return self.out(torch.cat([last[0], last[1]], -1))

    model, example = Packed().eval(), (torch.randint(0, 50, (2, 6)), torch.tensor([6, 3]))
    listed = {g.name: str(g) for g in groups(model, example)}
    assert listed["words"] == "12 channels made by words, read by lstm."
    assert listed["lstm"] == "16 channels made by lstm, read by out."


def test_a_flipped_vector_is_read_in_its_own_order() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).flip(-1))

    torch.manual_seed(0)
    listed = {g.name: g for g in groups(Flipped(), torch.rand(1, 4))}
    assert listed["a"].parts[1].channel == tuple(reversed(range(8)))


# ----------------------------------------------------------------------------------------------------------- fewer rows


def sizes(model: nn.Module, task: Task, folder: Path, stage: object = None) -> dict[str, int]:
    recipe = Recipe((stage,)) if stage else None
    lilliput.save(model, task.example, folder, recipe=recipe)
    return {name: (folder / name).stat().st_size for name in ("model.onnx", "model.lil")}


def test_a_thousand_of_twenty_thousand_words(tmp_path: Path) -> None:
    model, task = made(Sentence)
    counts = use(model, task)["words"]
    assert counts.sum() == 300 * 12 and counts[0] == 0
    stage = FoldRows((("words", 1000),))
    small = stage(model, task, None)
    assert isinstance(small.words, SomeRows) and small.words.table.weight.shape == (1001, 16)
    assert small.words.table.padding_idx == 1 and not bool(small.words.table.weight[1].any())
    kept = (small.words.index > 0).nonzero().flatten()
    assert len(kept) == 1000 and counts[kept].sum() >= counts.sort(descending=True).values[:900].sum()
    known = kept[torch.randint(0, 1000, (64, 12))]
    assert torch.allclose(small(known), model(known), atol=1e-6)
    # The unknown row is the mean of the folded ones, each as often as it is read.
    gone = counts.clone()
    gone[kept] = 0
    mean = (gone[:, None] * model.words.weight.double()).sum(0) / gone.sum()
    assert torch.allclose(small.words.table.weight[0].double(), mean, atol=1e-6)
    before, after = sizes(model, task, tmp_path / "dense"), sizes(small, task, tmp_path / "small", stage)
    for name, size in after.items():  # 19,000 rows fewer; a bit for each word, and the operators that count the bits
        assert before[name] - 18_999 * 16 * 4 < size < before[name] - 18_999 * 16 * 4 + 20_000 / 8 + 600
    loaded = lilliput.load(tmp_path / "small")
    mixed = torch.randint(0, 20_000, (64, 12))
    assert torch.allclose(loaded(mixed), small(mixed), atol=1e-5)
    again = lilliput.restore(tmp_path / "small", model, task)
    assert torch.equal(again(mixed), small(mixed))
    engine = compile(tmp_path / "small" / "model.onnx")
    assert torch.allclose(torch.from_numpy(engine(mixed[:1].numpy())), small(mixed[:1]), atol=1e-5)


def test_words_in_order_of_frequency_need_no_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.EmbeddingBag(5000, 8), nn.Linear(8, 2)).eval(), often(2000, 600, 10)
    task = Task("ordered", train=(ids, ids[:, 0] % 2), val=(ids, ids[:, 0] % 2))
    offered = proposals(FoldRows, model, task, Known())
    assert isinstance(offered, Proposals)
    assert (offered.options[0].first, offered.options[6].first) == ((), ("0",))  # rare words are not in order
    small = offered.options[6](model, task, None)
    assert isinstance(small[0], FirstRows)
    dense, fewer = sizes(model, task, tmp_path / "dense"), sizes(small, task, tmp_path / "small")
    rows = small[0].table.num_embeddings
    assert all(size < dense[name] - (5000 - rows) * 32 + 200 for name, size in fewer.items())
    far = torch.tensor([[4999, rows - 1, 17, rows]])
    assert torch.equal(small(far), small(torch.tensor([[rows - 1, rows - 1, 17, rows - 1]])))
    assert torch.allclose(lilliput.load(tmp_path / "small")(ids[:9]), small(ids[:9]), atol=1e-5)


def test_ever_fewer_rows_are_offered_and_train() -> None:
    model, task = made(Sentence)
    offered = proposals(FoldRows, model, task, Known())
    assert isinstance(offered, Proposals)
    counts = [dict(option.rows)["words"] for option in offered.options]
    mapped = [0 if option.first else 20_000 // 8 for option in offered.options]  # bytes at one byte a number
    prices = [16 * count + more for count, more in zip(counts, mapped, strict=True)]
    assert prices == sorted(prices, reverse=True) and counts[0] == int((use(model, task)["words"] > 0).sum())
    trained = lilliput.run(model, task, (offered.options[-1], Train(steps=5)))
    assert isinstance(trained.words, FirstRows) and isinstance(offered.options[0](model, task, None).words, SomeRows)
    fresh = offered.options[-1](model, task, None).words
    assert not torch.equal(trained.words.table.weight[-1], fresh.table.weight[-1])
    assert proposals(FoldRows, nn.Sequential(nn.Linear(4, 2)), task, Known()) == Refusal(
        "no lookup table of its own is called"
    )


def test_tables_of_one_size_share_the_rows_out_by_what_matters() -> None:
    model, task = made(Beside)
    offered = proposals(FoldRows, model, task, Known())
    assert isinstance(offered, Proposals) and {path for path, _ in offered.options[0].rows} == {"tables.2"}
    assert offered.options[-1](model, task, None)(*task.example).shape == (1, 2)


def test_fewer_rows_of_eight_bits(tmp_path: Path) -> None:
    model, task = made(Sentence)
    stage = FoldRows((("words", 1000),))
    small = lilliput.run(model, task, (stage, Quantize(8)))
    files = sizes(small, task, tmp_path)
    assert all(size < 1001 * (16 + 2) + 20_000 / 8 + 8 * 16 * 3 + 2000 for size in files.values()), files
    ids = torch.randint(0, 20_000, (64, 12))
    assert torch.allclose(lilliput.load(tmp_path)(ids), realize(small)(ids), atol=1e-5)


def test_what_cannot_be_folded_says_so() -> None:
    model, task = made(Beside)
    with pytest.raises(KeyError, match=r"'net\.0' must be a lookup table of its own, got tables\.0"):
        FoldRows((("net.0", 3),))(model, task, None)
    with pytest.raises(ValueError, match=r"at least one row of 'tables\.0' must stay, got 0"):
        FoldRows((("tables.0", 0),))(model, task, None)
    tied = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    tied[1].weight = tied[0].weight
    assert isinstance(proposals(FoldRows, tied, task, Known()), Refusal)


def test_a_table_that_is_asked_for_more_than_rows_still_answers() -> None:
    table = FirstRows(nn.Embedding(3, 8), nn.Embedding(50, 8, padding_idx=7))
    assert table.embedding_dim == 8 and table.weight.shape == (3, 8)
    assert (table.num_embeddings, table.padding_idx) == (50, 7)  # a network hashes ids and masks padding with these
    with pytest.raises(AttributeError):
        _ = table.nothing


# --------------------------------------------------------------------------------------------------------- fewer tables


def test_a_dropped_table_leaves_the_graph(tmp_path: Path) -> None:
    model, task = made(Beside)
    small = DropTables(("tables.2",))(model, task, None)
    assert isinstance(small.tables[2], Nothing) and small.net[0].in_features == 21
    counts = use(model, task)["tables.2"]
    mean = (counts[:, None] * model.tables[2].weight.double()).sum(0) / counts.sum()
    bias = model.net[0].bias + model.net[0].weight[:, 21:] @ mean.float()
    assert torch.allclose(small.net[0].bias, bias, atol=1e-6)
    dense, fewer = sizes(model, task, tmp_path / "dense"), sizes(small, task, tmp_path / "small")
    assert all(fewer[name] < dense[name] - 4 * (400 * 8 + 32 * 8) for name in fewer)
    graph = onnx.load(tmp_path / "small" / "model.onnx").graph
    lookups = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in {t.name for t in graph.initializer}]
    assert len(lookups) == 2 and not any(t.dims and 0 in t.dims for t in graph.initializer)
    inputs = task.calibration(30)
    assert torch.allclose(predict(lilliput.load(tmp_path / "small"), inputs), predict(small, inputs), atol=1e-5)
    engine = compile(tmp_path / "small" / "model.onnx")
    first = [tensor[:1].numpy() for tensor in inputs]
    assert torch.allclose(torch.from_numpy(engine(*first)), predict(small, inputs)[:1], atol=1e-5)


def test_a_table_whose_attributes_are_read_becomes_one_row() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.words(x).to(self.words.weight.dtype))
            return y

    x = torch.arange(8)
    small = DropTables(("words",))(Typed(), Task("ids", train=x, val=x), None)
    assert small.words.weight.shape == (1, 4)
    torch.testing.assert_close(small(x), small(x[:1]).expand(8, 2))


def test_all_tables_dropped_leave_an_input_that_nobody_reads(tmp_path: Path) -> None:
    model, task = made(Beside)
    small = DropTables(("tables.0", "tables.1", "tables.2"))(model, task, None)
    assert small.net[0].in_features == 5
    sizes(small, task, tmp_path)
    inputs = task.calibration(5)
    assert torch.allclose(predict(lilliput.load(tmp_path), inputs), predict(small, inputs), atol=1e-5)
    engine = compile(tmp_path / "model.onnx")
    assert torch.allclose(
        torch.from_numpy(engine(*[t[:1].numpy() for t in inputs])), predict(small, inputs)[:1], atol=1e-5
    )


def test_a_table_in_a_product_becomes_one_row_that_still_narrows() -> None:
    model, task = made(Products)
    small = DropTables(("tables.2",))(model, task, None)
    assert small.tables[2].weight.shape == (1, 8)
    narrow = NarrowTables((("tables.0", 3),))(small, task, None)
    assert narrow.tables[2].weight.shape == (1, 3) and narrow.below[2].out_features == 3


def test_tables_that_matter_least_for_their_size_are_offered_first() -> None:
    model, task = made(Beside)
    with torch.no_grad():
        model.net[0].weight[:, 13:21] = 0  # nobody hears the second table
    offered = proposals(DropTables, model, task, Known())
    assert isinstance(offered, Proposals) and offered.options[0].tables == ("tables.1",) and len(offered) == 3
    assert isinstance(proposals(DropTables, *made(Sentence), Known()), Refusal)  # nothing else is read


# -------------------------------------------------------------------------------------------------------- fewer columns


@pytest.mark.parametrize(
    ("build", "name", "wanted"),
    [
        (lambda: made(Beside), "tables.1", "any"),
        (lambda: made(Sentence), "words", "any"),
        (lambda: made(Dot), "a", "rotation"),
        (lambda: made(Machine), "vectors", "rotation"),
        (lambda: (Products(False).eval(), made(Products)[1]), "tables.0", "rotation"),
        (lambda: made(Products), "tables.0", "none"),
        (lambda: made(Beside), "net.0", "none"),
    ],
)
def test_how_columns_may_be_mixed_is_found_by_trying(build: object, name: str, wanted: str) -> None:
    model, task = build()  # type: ignore[operator]
    group = next(g for g in groups(model, task.example) if g.name == name)
    assert freedom(model, task.example, group) == wanted


def test_few_mixtures_say_all_that_a_layer_of_few_outputs_hears() -> None:
    """Three outputs hear no more than three mixtures of 32 columns, whatever these are."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.EmbeddingBag(500, 32), nn.Linear(32, 3)).eval(), often(500, 200, 6)
    task = Task("bag", train=(ids, ids[:, 0] % 3), val=(ids, ids[:, 0] % 3))
    small = NarrowTables((("0", 3),))(model, task, None)
    assert small[0].weight.shape == (500, 3) and torch.allclose(small(ids), model(ids), atol=1e-4)
    thin = NarrowTables((("0", 2),))(model, task, None)
    best = torch.linalg.matrix_rank(thin(ids) - thin[1].bias, rtol=1e-4)
    assert best == 2 and 1e-3 < (thin(ids) - model(ids)).norm() < (model(ids) - model[1].bias).norm()


def test_a_product_keeps_the_directions_in_which_its_tables_lie() -> None:
    model, task = made(Dot)
    with torch.no_grad():
        mixed = torch.linalg.qr(torch.randn(8, 3)).Q.T
        model.a.weight.copy_(torch.randn(400, 3) @ mixed)
        model.b.weight.copy_(torch.randn(400, 3) @ mixed)
    small = NarrowTables((("a", 3),))(model, task, None)
    inputs = task.calibration(50)
    assert small.b.embedding_dim == 3 and torch.allclose(predict(small, inputs), predict(model, inputs), atol=1e-4)


@pytest.mark.parametrize("kind", [Beside, Products, Machine, Dot, Sentence])
def test_columns_go_down_to_one_and_the_rest_trains(kind: type[nn.Module], tmp_path: Path) -> None:
    model, task = made(kind)
    offered = proposals(NarrowTables, model, task, Known())
    assert isinstance(offered, Proposals)
    last = offered.options[-1]
    assert {count for _, count in last.widths} == {1}
    values = [sum(p.numel() for p in option(model, task, None).parameters()) for option in offered.options]
    assert values == sorted(values, reverse=True)
    trained = lilliput.run(model, task, (last, Train(steps=3)))
    lilliput.save(trained, task.example, tmp_path)
    inputs = task.calibration(20)
    assert torch.allclose(predict(lilliput.load(tmp_path), inputs), predict(trained, inputs), atol=1e-4)


def test_rows_columns_and_tables_go_one_after_the_other(tmp_path: Path) -> None:
    model, task = made(Beside)
    recipe = (
        DropTables(("tables.1",)),
        FoldRows((("tables.1", 3), ("tables.2", 40)), ("tables.2",)),
        NarrowTables((("tables.0", 2), ("tables.1", 2), ("tables.2", 3))),
    )
    small = lilliput.run(model, task, recipe)
    assert small.tables[0].weight.shape == (50, 2) and small.tables[2].weight.shape == (41, 3)
    assert small.net[0].in_features == 5 + 2 + 3
    lilliput.save(small, task.example, tmp_path, recipe=Recipe(recipe))
    inputs = task.calibration(20)
    assert torch.equal(predict(lilliput.restore(tmp_path, model, task), inputs), predict(small, inputs))


def test_columns_that_may_not_be_mixed_go_by_what_the_outputs_miss() -> None:
    model, task = made(Products)
    with torch.no_grad():  # the fifth column is large, and met by zeros in every product
        model.below[2].weight[4], model.below[2].bias[4] = 0, 0
        for table in model.tables:
            table.weight[:, 4] = 0
        model.tables[0].weight[:, 4] = 50
    small = NarrowTables((("tables.0", 7),))(model, task, None)
    inputs = task.calibration(30)
    assert small.tables[0].embedding_dim == 7
    assert torch.allclose(predict(small, inputs), predict(model, inputs), atol=1e-4)


def test_a_transformer_is_no_table() -> None:
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(300, 12), nn.Linear(12, 3)
            self.up, self.down = nn.ModuleList(), nn.ModuleList()
            for _ in range(2):
                self.up.append(nn.Linear(12, 20))
                self.down.append(nn.Linear(20, 12))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(up(x).relu())
            return self.out(x.mean(1))

    ids = torch.randint(0, 300, (24, 4))
    task = Task("ids", train=(ids, ids[:, 0] % 3), val=(ids, ids[:, 0] % 3))
    assert proposals(NarrowTables, Residual(), task, Known()) == Refusal("no lookup table may lose columns")
    assert Narrow(0.5, tables=False)(Residual(), task, None).words.embedding_dim == 8
