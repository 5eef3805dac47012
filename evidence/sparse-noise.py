"""Emergence of sparse representations from noise (2023): noise while training leaves few ReLU units active at a time.

A one-hidden-layer autoencoder, as in the paper, and a classifier, both on 5,000 handwritten digits (of which 1,000 are
held out), are trained with and without noise on their inputs, then on without any noise. Zero activations cost time in
most runtimes all the same: the engine compiles the trained networks with and without kernels that skip them.

Source: Bricken, Schaeffer, Olshausen and Kreiman, Emergence of sparse representations from noise, ICML 2023, PMLR 202.
"""

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

import lilliput
from lilliput.analyse.activity import FollowActivity, activities, activity
from lilliput.code.base import copy_model
from lilliput.data import stratified
from lilliput.data.digits import MEAN, STD, images
from lilliput.export.onnx import Session
from lilliput.prune.noise import Noise
from lilliput.rule import Rule

SIGMA = {"autoencoder": 0.8, "classifier": 1.0}  # pixels are from 0 to 1
EXAMPLES = 64  # training digits from which the engine learns what is zero


def tasks(quick: bool) -> tuple[dict[str, lilliput.Task], Tensor]:
    """The two tasks on centred digits (n, 784), and the mean digit that was subtracted."""
    x, y = images()
    pixels = (x[:, :, 2:-2, 2:-2].flatten(1) * STD + MEAN).clamp(0, 1)
    train, val, test = stratified(y, (300, 100, 100) if quick else (3500, 500, 1000), seed=0)
    mean = pixels[train].mean(0)
    centred = pixels - mean
    parts = {"train": train, "val": val, "test": test}
    pairs = {key: (centred[part], centred[part]) for key, part in parts.items()}
    labelled = {key: (centred[part], y[part]) for key, part in parts.items()}
    return {
        "autoencoder": lilliput.Task("reconstruct", **pairs, loss="mse", metric="mse"),
        "classifier": lilliput.Task("classify", **labelled),
    }, mean


def network(kind: str, hidden: int) -> nn.Sequential:
    """784 - hidden - 784, or 784 - hidden - hidden - 10."""
    sizes = [784, hidden, 784] if kind == "autoencoder" else [784, hidden, hidden, 10]
    layers: list[nn.Module] = []
    for ins, outs in pairwise(sizes):
        layers += [nn.Linear(ins, outs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(model: nn.Module, task: lilliput.Task, steps: int, seed: int, sigma: float) -> tuple[nn.Module, Any]:
    """The model after `steps` steps of Adam, with noise of this size; and how active its layers were meanwhile."""
    model = copy_model(model).train()
    adam = torch.optim.Adam(model.parameters())
    noise: Rule = Noise(sigma, seed=seed)
    follow, lr = FollowActivity(every=max(1, steps // 10), examples=200), lilliput.Cosine(3e-3)
    with noise.attached(model, adam, steps=steps), follow.attached(model, adam, steps=steps, task=task) as followed:
        for step, batch in enumerate(task.batches(steps, seed, 64)):
            adam.param_groups[0]["lr"] = lr(step, steps)
            adam.zero_grad()
            task.loss(model(batch.inputs), batch).backward()
            adam.step()
    seen = {
        name: [[at, round(share, 4)] for at, share in values] for name, values in activities(followed.state).items()
    }
    return model.eval(), seen


def on_pixels(model: nn.Module, mean: Tensor, kind: str) -> nn.Sequential:
    """The same function of the digits as they are: the mean goes into the biases, and the border's zeros stay zero."""
    moved = copy_model(model)
    first, last = moved[0], moved[-1]  # type: ignore[index]
    with torch.no_grad():
        first.bias -= first.weight @ mean
        if kind == "autoencoder":
            last.bias += mean
    return moved  # type: ignore[return-value]


def exported(model: nn.Sequential) -> ModelProto:
    """Gemm, Relu, Gemm, ... for one digit."""
    nodes, arrays, x = [], [], "x"
    for name, layer in model.named_children():
        y = "y" if layer is model[-1] else f"h{name}"
        if isinstance(layer, nn.Linear):
            arrays += [
                numpy_helper.from_array(tensor.detach().numpy(), f"{name}.{key}")
                for key, tensor in layer.named_parameters()
            ]
            nodes.append(helper.make_node("Gemm", [x, f"{name}.weight", f"{name}.bias"], [y], transB=1))
        else:
            nodes.append(helper.make_node("Relu", [x], [y]))
        x = y
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", model[0].in_features), ("y", model[-1].out_features))
    ]
    graph = helper.make_graph(nodes, "digits", values[:1], values[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def timed(model: nn.Module, task: lilliput.Task, mean: Tensor, kind: str, quick: bool) -> dict[str, Any]:
    """Microseconds for one digit: with and without skipping, and in ONNX Runtime; in turn, over the held-out digits."""
    pixels = on_pixels(model, mean, kind)
    train, test = (np.ascontiguousarray((task.split(s)[0] + mean).numpy()) for s in ("train", "test"))
    test[np.abs(test) < 1e-6] = 0
    train[np.abs(train) < 1e-6] = 0
    proto = exported(pixels)
    engines = {
        "dense": lilliput.compile(proto, tune=not quick),
        "skipping": lilliput.compile(proto, tune=not quick, example=train[:: len(train) // EXAMPLES][:EXAMPLES]),
    }
    session = Session(proto)
    digits = [test[i : i + 1] for i in range(20 if quick else 200)]
    feeds = [session.feed(x) for x in digits]
    spent: dict[str, list[float]] = {"dense": [], "skipping": [], "onnxruntime": []}
    off = 0.0
    for turn in range(3 if quick else 40):
        for name, engine in engines.items():
            y = np.empty_like(engine(digits[0]))
            began = time.process_time()
            for x in digits:
                engine(x, out=y)
            spent[name].append((time.process_time() - began) / len(digits))
            if turn == 0:
                other = session.outputs(torch.from_numpy(digits[-1]))
                off = max(off, float(np.abs(y - other).max() / np.abs(other).max()))
        began = time.process_time()
        for feed in feeds:
            session.run(feed)
        spent["onnxruntime"].append((time.process_time() - began) / len(digits))
    middle = {name: float(np.median(values)) for name, values in spent.items()}
    ratio = float(np.median(np.array(spent["dense"]) / np.array(spent["skipping"])))
    layers = [layer for layer in engines["skipping"].manifest["layers"] if layer["values"]]
    return {
        "dense_us": round(1e6 * middle["dense"], 2), "skipping_us": round(1e6 * middle["skipping"], 2),
        "onnxruntime_us": round(1e6 * middle["onnxruntime"], 2), "dense_over_skipping": round(ratio, 2),
        "products_that_skip": sum("active" in layer for layer in layers), "products": len(layers),
        "largest_difference": float(f"{off:.1g}"),
    }  # fmt: skip


def row(kind: str, how: str, models: list[nn.Module], task: lilliput.Task, steps: int) -> dict[str, Any]:
    """What the models of all seeds are like on held-out digits."""
    activities = [activity(model, task, split="test") for model in models]
    active = [float(np.average(f.active, weights=f.units)) for f in activities]
    scores = [task.score(model, "test").value for model in models]
    return {
        "network": kind, "training": how, "steps": steps, "active": round(float(np.mean(active)), 4),
        "active_least": round(min(active), 4), "active_most": round(max(active), 4),
        "active_by_layer": " / ".join(f"{v:.4f}" for v in np.mean([f.active for f in activities], 0)),
        "dead": round(float(np.mean([sum(f.dead) for f in activities])), 1), "units": sum(activities[0].units),
        "error" if kind == "autoencoder" else "accuracy": round(float(np.mean(scores)), 5),
    }  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """Active units, held-out error and time, with noise, without, and after it."""
    steps, hidden, seeds = (20, 16, 1) if quick else (2000, 512, 3)
    given, mean = tasks(quick)
    rows: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    for kind, task in given.items():
        size = hidden
        for sigma, name in ((0.0, "no noise"), (SIGMA[kind], "noise"), (0.0, "no noise, narrow")):
            during, after = [], []
            for seed in range(seeds):
                torch.manual_seed(seed)
                noisy, seen = trained(network(kind, size), task, steps, seed, sigma)
                plain, later = trained(noisy, task, steps // 2, seed + 100, 0.0)
                during.append(noisy)
                after.append(plain)
                if seed == 0 and size == hidden:
                    traces.append({"network": kind, "sigma": sigma, "first": seen, "then_without": later})
            rows += [
                row(kind, name, during, task, steps),
                row(
                    kind,
                    f"{name}, then on without" if sigma else f"{name}, trained on",
                    after,
                    task,
                    steps + steps // 2,
                ),
            ]
            for which, models in zip(rows[-2:], (during, after), strict=True):
                if not quick or (sigma and models is after and kind == "autoencoder"):
                    which |= timed(models[0], task, mean, kind, quick)
            if sigma:  # as many units as are active in the sparse network
                size = max(1, round(hidden * rows[-1]["active"]))
    return {
        "claim": "noise while training makes ReLU activations sparse, and they stay sparse after the noise stops",
        "baseline": "the same training without noise, for as many steps; narrow: with as many hidden units as are "
                    "active after noise. Held-out digits; active: the fraction of "
                    "hidden units that are not zero, mean over digits and seeds; dead: units that no held-out digit "
                    "switches on; error: mean squared, pixels from 0 to 1. Times: processor time for one digit on one "
                    "thread, the first seed's network, dense kernels and skipping ones in turn in one process, each "
                    "compiled and tuned for this machine",
        "seeds": seeds, "hidden": hidden, "sigma": SIGMA, "rows": rows, "over_training": traces,
    }  # fmt: skip
