"""restore: a folder's network comes back with its codes, trains on, and is saved as the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lilliput
from lilliput.code.base import codes
from lilliput.code.masked import Masked
from lilliput.errors import StoreError
from lilliput.export.save import NAMES
from lilliput.graph.heads import remove_heads
from lilliput.recipe import Recipe
from lilliput.runner import Runner
from lilliput.search.apply import apply
from lilliput.store import Store

GOLDEN = Path(__file__).parent / "golden"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids).mean(1))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def gru() -> nn.Module:
    return nn.GRU(8, 12, batch_first=True)


def images() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    net(torch.randn(32, 1, 8, 8))
    return net.eval()


def toy(inputs: Tensor, outputs: int = 3) -> lilliput.Task:
    labels = torch.arange(len(inputs)) % outputs
    return lilliput.Task("toy", (inputs, labels), (inputs[:16], labels[:16]), batch_size=16)


def low_rank(model: nn.Module, name: str) -> nn.Module:
    lilliput.attach(model, name, lilliput.LowRank(3))
    lilliput.attach(model, name, lilliput.Uniform(6, symmetric=False))
    return model


def masked(model: nn.Module, name: str) -> nn.Module:
    model = lilliput.Prune(0.5, pattern="block 2x1", where=name)(model, None, None)
    lilliput.attach(model, name, lilliput.Uniform(4))
    return model


CODED = {
    "factors in few bits": (small, lambda m: low_rank(m, "2.weight"), lambda: torch.randn(3, 8)),
    "mask in few bits": (small, lambda m: masked(m, "2.weight"), lambda: torch.randn(3, 8)),
    "half": (small, lambda m: lilliput.Quantize(4)(m, None, None), lambda: torch.randn(3, 8)),
    "root": (lambda: nn.Linear(8, 24), lambda m: low_rank(m, "weight"), lambda: torch.randn(3, 8)),
    "tied": (Tied, lambda m: low_rank(m, "out.weight"), lambda: torch.randint(0, 40, (3, 5))),
    "recurrent": (gru, lambda m: low_rank(m, "weight_hh_l0"), lambda: torch.randn(3, 5, 8)),
    "convolution": (images, lambda m: low_rank(m, "3.weight"), lambda: torch.randn(3, 1, 8, 8)),
    "grouped": (
        lambda: nn.Conv2d(8, 8, 3, groups=2), lambda m: low_rank(m, "weight"), lambda: torch.randn(2, 8, 5, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODED)
def test_what_is_restored_computes_trains_and_is_saved_as_the_same_bytes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, encode, inputs = CODED[name]
    model, x = encode(make()).eval(), inputs()
    lilliput.save(model, x, tmp_path / "first")
    torch.manual_seed(1)
    plain = make().eval()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    again = lilliput.restore(tmp_path / "first", plain)
    assert {k: str(v) for k, v in codes(again).items()} == {k: str(v) for k, v in codes(model).items()}
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in before.items()) and not codes(plain)
    lilliput.save(again, x, tmp_path / "second")
    for file in NAMES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    trained = again.train()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    outputs = trained(x)
    (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum().backward()
    assert all(p.grad is not None for p in trained.parameters())
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


RECIPES = {
    "student, mask, few bits": (
        images, lambda: torch.randn(48, 1, 8, 8),
        (lilliput.Student(width=0.5), lilliput.Train(2, rules=(lilliput.Prune(0.5),)), lilliput.Quantize(4)),
    ),
    "channels chosen by data": (
        images, lambda: torch.randn(48, 1, 8, 8),
        (lilliput.Train(2), lilliput.PruneChannels(0.5, score="taylor", allocation="global"), lilliput.Train(2)),
    ),
    "factors by energy": (small, lambda: torch.randn(48, 8), (lilliput.Train(3), lilliput.Factorize(energy=0.8))),
    "activations": (
        images, lambda: torch.randn(48, 1, 8, 8), (lilliput.FoldBatchNorm(), lilliput.QuantizeActivations(8)),
    ),
    "gates": (small, lambda: torch.randn(48, 8), (lilliput.Train(4, rules=(lilliput.L0(0.5),)),)),
    "a code of a recipe": (
        small, lambda: torch.randn(48, 8), (lilliput.Encode(lilliput.LowRank(2), where="2"), lilliput.Train(2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_of_a_run_is_restored_without_its_data(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs, stages = RECIPES[name]
    dense, task = make(), toy(inputs())
    summary = apply(dense, task, Recipe(stages), tmp_path / "run")
    again = lilliput.restore(tmp_path / "run", dense)
    assert list(summary["codes"]) == list(codes(again))
    x = task.example
    close = 1e-2 if name == "activations" else 1e-5  # a rounding may fall on the other side in another runtime
    torch.testing.assert_close(lilliput.load(tmp_path / "run")(x), again(x), rtol=1e-4, atol=close)
    lilliput.save(again, x, tmp_path / "first", Recipe(stages))
    lilliput.save(lilliput.restore(tmp_path / "first", dense), x, tmp_path / "second", Recipe(stages))
    for file in NAMES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_folder_of_a_search_is_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = small(), torch.randn(128, 8)
    labels = dense(x).argmax(1)
    task = lilliput.Task("toy", (x[:64], labels[:64]), (x[64:96], labels[64:96]), (x[96:], labels[96:]))
    lilliput.shrink(dense, task, floor=0.5, trials=3, out=tmp_path)
    again = lilliput.restore(tmp_path, dense)
    torch.testing.assert_close(lilliput.load(tmp_path)(x), again(x), rtol=1e-3, atol=1e-3)
    sizes = lilliput.save(again, task.example, tmp_path / "again", Recipe.read(tmp_path / "recipe.toml"))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert sizes["model.lil"] <= 1.02 * (tmp_path / "model.lil").stat().st_size + 64


def test_a_training_that_is_kept_comes_back_without_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense, task = small(), toy(torch.randn(48, 8))
    recipe = Recipe((lilliput.Train(4, rules=(lilliput.Prune(0.5, score="wanda"), lilliput.Distill())),))
    first = Runner(dense, task, Store(tmp_path)).make(recipe)
    monkeypatch.setattr(lilliput.Prune, "begin", lambda *rest: pytest.fail("begin was called again"))
    runner = Runner(dense, task, Store(tmp_path))
    again = runner.make(recipe)
    assert runner.steps == 0 and not runner.store.damaged
    assert {name: type(chain[0]) for name, chain in codes(again).items()} == dict.fromkeys(codes(first), Masked)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_record_of_an_earlier_version_is_a_miss_that_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, task, recipe = small(), toy(torch.randn(48, 8)), Recipe((lilliput.Train(4),))
    key = Runner(dense, task, Store(tmp_path)).key(recipe)
    Runner(dense, task, Store(tmp_path)).make(recipe)
    record = json.loads((tmp_path / f"{key}.json").read_text())
    del record["codes"]
    (tmp_path / f"{key}.json").write_text(json.dumps(record))
    runner = Runner(dense, task, Store(tmp_path))
    runner.make(recipe)
    assert runner.steps == 4 and "earlier version" in runner.store.damaged[0]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = low_rank(small(), "2.weight")
    lilliput.save(model, torch.zeros(1, 8), tmp_path)
    with pytest.raises(StoreError, match=r"must have the tensor '2\.weight', which is coded"):
        lilliput.restore(tmp_path, nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(StoreError, match=r"must have the tensors of the file"):
        lilliput.restore(tmp_path, nn.Sequential(*small(), nn.Linear(3, 3)))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors must be there"):
        lilliput.restore(tmp_path / "nothing", small())
    with pytest.raises(StoreError, match="must have the tensors of the file"):
        lilliput.restore(GOLDEN / "whole", small())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="damaged or cut short"):
        lilliput.restore(tmp_path, small())


def test_a_code_that_is_not_installed_is_named(tmp_path: Path) -> None:
    lilliput.save(low_rank(small(), "2.weight"), torch.zeros(1, 8), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = file.metadata()["lilliput"]
    for name, message in (("Ring", r"got 'Ring'.*package installed"), ("nowhere:Ring", r"got 'nowhere:Ring'.*Install")):
        shutil.copy(path, tmp_path / "before")
        save_file(tensors, path, {"lilliput": text.replace('"LowRank"', f'"{name}"')})
        with pytest.raises(KeyError, match=message):
            lilliput.restore(tmp_path, small())


@pytest.mark.slow
def test_a_model_of_hugging_face_is_saved_and_found_again_without_some_of_its_heads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()  # its last layer is tied to the embedding
    ids = torch.randint(0, 30, (9, 7))
    task = lilliput.Task("words", train=({"input_ids": ids}, ids), val=({"input_ids": ids}, ids),
                         loss=lambda output, target: output.logits.square().mean(),
                         metric=lambda output, target: output.logits.mean((1, 2)))  # fmt: skip
    keep = {"bert.encoder.layer.0.attention.self": torch.tensor([0, 3]),
            "bert.encoder.layer.1.attention.self": torch.tensor([1])}  # fmt: skip
    small_model = remove_heads(model, task.example, keep)
    small_model.save_pretrained(tmp_path)
    fresh = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    again = lilliput.restore(tmp_path, fresh)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, small_model(input_ids=ids).logits)
    assert again.bert.encoder.layer[1].attention.self.num_attention_heads == 1


def test_attention_of_torch_that_lost_heads_needs_no_recipe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    smaller = remove_heads(layer, x, {"self_attn": torch.tensor([0, 2, 3])})
    lilliput.save(smaller, x[:1], tmp_path)
    again = lilliput.restore(tmp_path, nn.TransformerEncoderLayer(8, 4, 16, batch_first=True))
    torch.testing.assert_close(again(x), smaller(x))
