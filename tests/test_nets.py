"""The small dense networks: their shapes, sizes and equations."""

import math

import pytest
import torch
from torch.nn import functional as F

from lilliput.nets.bag import Bag
from lilliput.nets.bert import Attention, SentenceBert
from lilliput.nets.mnist1d import CNN, GRU, MLP
from lilliput.nets.resnet import Block, ResNet


def values(model: torch.nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [(ResNet(), (1, 32, 32), 272_186), (MLP(), (40,), 78_858), (CNN(), (40,), 5_210), (GRU(), (40,), 51_594)],
    ids=["resnet", "mlp", "cnn", "gru"],
)
def test_output_and_size(model: torch.nn.Module, shape: tuple[int, ...], count: int) -> None:
    assert values(model) == count
    model.eval()
    x = torch.randn(3, *shape)
    out = model(x)
    assert out.shape == (3, 10)
    assert torch.allclose(out[1:2], model(x[1:2]), atol=1e-6)  # one example does not touch another


def test_resnet_20_has_twenty_layers_with_weights_and_halves_twice() -> None:
    model = ResNet()
    main = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Conv2d) and "short" not in name]
    assert len(main) + 1 == 20
    assert model.layers(torch.zeros(1, 16, 32, 32)).shape == (1, 64, 8, 8)


def test_resnet_takes_narrow_shallow_and_strided_forms() -> None:
    student = ResNet(widths=(8, 16), blocks=(1, 2), channels_in=3, classes=4, stride=2).eval()
    assert student(torch.zeros(2, 3, 28, 28)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"ResNet: widths and blocks must be of one length.*ResNet-20"):
        ResNet(widths=(8, 16), blocks=(1,))


def test_a_block_whose_last_normalisation_is_zero_is_its_shortcut() -> None:
    block = Block(4, 4).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), F.relu(x))


def test_mlp_adds_its_first_hidden_layer_to_the_second() -> None:
    model, x = MLP(hidden=8), torch.randn(5, 40)
    torch.nn.init.zeros_(model.linear2.weight)
    torch.nn.init.zeros_(model.linear2.bias)
    assert torch.allclose(model(x), model.linear3(F.relu(model.linear1(x))))


def test_bag_ignores_padding_and_order_and_divides_by_the_root() -> None:
    model = Bag(buckets=20, width=4, classes=3)
    torch.nn.init.normal_(model.table.weight)
    out = model(torch.tensor([[3, 5, 0, 0], [5, 3, 0, 0], [0, 0, 0, 0]]))
    summed = (model.table.weight[3] + model.table.weight[5]) / math.sqrt(2)
    assert torch.allclose(out[0], model.linear(summed), atol=1e-6)
    assert torch.allclose(out[0], out[1], atol=1e-6)
    assert torch.allclose(out[2], model.linear.bias)


def test_sentence_bert_ignores_padding_and_gives_unit_vectors() -> None:
    model = SentenceBert(words=50, positions=16, width=24, layers=2, heads=3, hidden=32).eval()
    ids, mask = torch.tensor([[4, 9, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    out = model(ids, mask)
    assert torch.allclose(out.norm(dim=1), torch.ones(1), atol=1e-6)
    other = ids.clone()
    other[0, 3:] = 33
    assert torch.allclose(out, model(other, mask), atol=1e-6)
    assert torch.allclose(out, model(ids[:, :3], mask[:, :3]), atol=1e-6)
    assert not torch.allclose(out, model(ids.flip(1), mask.flip(1)), atol=1e-3)  # positions count


def test_attention_is_torchs_own() -> None:
    layer, x = Attention(12, 3), torch.randn(2, 5, 12)
    bias = torch.zeros(2, 1, 1, 5)
    bias[0, ..., 3:] = -1e9
    q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    expected = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(2, 5, 12)
    assert torch.allclose(layer(x, bias), layer.output(expected), atol=1e-6)
