"""Smaller networks of a family, their training, and the state of a rival's work (bench/rival.py)."""

import copy
import inspect
import math
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import rival_files
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Task
from lilliput.cost.measure import latency
from lilliput.export.onnx import Session
from lilliput.task import Batch, call, predict, take

SLOTS = (20, 6)  # trainings that the time is divided into, at most and at least
EPOCHS = 15  # of a training for which there are fewer of them


# ------------------------------------------------------------------------------------------------------- smaller ones


class Folded(nn.Module):
    """A table that keeps some rows; all the others are one."""

    place: Tensor

    def __init__(self, table: nn.Embedding, place: Tensor) -> None:
        super().__init__()
        self.table, rows = table, table.num_embeddings
        first = torch.arange(len(place)).clamp(max=rows - 1)
        self.cut = bool((place == first).all())  # rows in the order of their use need no list of places
        self.register_buffer("place", place.to(torch.uint8 if rows <= 256 else torch.int16))

    def forward(self, ids: Tensor) -> Tensor:
        found = ids.clamp(max=self.table.num_embeddings - 1) if self.cut else self.place[ids].long()
        rows: Tensor = self.table(found)
        return rows


@dataclass(frozen=True)
class Plan:
    """A network of the family: the constructor's arguments, and how many rows each table keeps."""

    settings: tuple[tuple[str, Any], ...]
    kept: tuple[tuple[str, int], ...] = ()

    def words(self) -> str:
        """The plan for a person."""
        return ", ".join([f"{name}={value}" for name, value in self.settings]
                         + [f"{name} keeps {rows} rows" for name, rows in self.kept])  # fmt: skip


def arguments(model: nn.Module) -> dict[str, Any]:
    """The constructor's arguments: what the network keeps under their names, else their defaults."""
    found = {}
    for name, parameter in inspect.signature(type(model)).parameters.items():
        value = getattr(model, name, parameter.default)
        value = parameter.default if isinstance(value, nn.Module | Tensor) else value
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or value is parameter.empty:
            return {}
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def scaled(value: Any, factor: float, place: int | None = None) -> Any:
    """A size or one of several, times a factor, at least 1."""
    if isinstance(value, tuple):
        return tuple(max(1, round(v * factor)) if place in (None, i) else v for i, v in enumerate(value))
    return max(1, round(value * factor))


def tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The tables by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Embedding)}


def fold(model: nn.Module, name: str, order: Tensor, kept: int, weights: Tensor | None = None) -> None:
    """Keep the first rows of `order` in a table, in place; the rest become their mean, weighted by their use."""
    parent = model.get_submodule(name.rpartition(".")[0])
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    stay = order[:kept].sort().values
    place = torch.full((table.num_embeddings,), kept)
    place[stay] = torch.arange(kept)
    small = nn.Embedding(kept + 1, table.embedding_dim)
    with torch.no_grad():
        small.weight[:kept] = table.weight[stay]
        rest = order[kept:]
        share = torch.ones(len(rest)) if weights is None else weights[rest].float() + 1e-6
        small.weight[kept] = (table.weight[rest] * (share / share.sum())[:, None]).sum(0)
    setattr(parent, name.rpartition(".")[2], Folded(small, place))


def rounded(model: nn.Module) -> nn.Module:
    """A copy with matrices, filters and tables on int8 grids."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel() >= rival_files.FEWEST:
            scale, axis = rival_files._scales(parameter.detach().numpy())
            wide = torch.from_numpy(scale).reshape([-1 if i == axis else 1 for i in range(parameter.ndim)])
            parameter.data = (parameter.data / wide).round().clamp(-127, 127) * wide
    return model


def estimate(model: nn.Module) -> int:
    """Bytes of its file with int8 weights, without names and the graph."""
    sizes = [(p.numel(), p.ndim > 1 and p.numel() >= rival_files.FEWEST) for p in model.parameters()]
    places = sum(m.place.nbytes for m in model.modules() if isinstance(m, Folded) and not m.cut)
    return places + sum(count if small else 4 * count for count, small in sizes)


# ----------------------------------------------------------------------------------------------------------- training


class Int8(nn.Module):
    """torch's fake quantization of a weight by its first axis."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = (weight.detach().abs().flatten(1).amax(1) / 127).clamp_min(1e-9)
        zero = torch.zeros(len(scale), dtype=torch.int32)
        made: Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
        return made


def softened(loss_name: str, output: Tensor, dense: Tensor) -> Tensor:
    """How far outputs are from the dense ones, as each kind of output is usually distilled."""
    if loss_name == "cross_entropy":
        log = F.log_softmax(output / 2, 1)
        return F.kl_div(log, F.log_softmax(dense / 2, 1), log_target=True, reduction="batchmean") * 4
    if loss_name == "bce":
        return F.binary_cross_entropy_with_logits(output, torch.sigmoid(dense))
    return F.l1_loss(output, dense) if loss_name == "l1" else F.mse_loss(output, dense)


@dataclass
class Work:
    """A job under way: what is known, what was tried, and the time."""

    dense: nn.Module
    task: Task
    floor: float
    seconds: float
    seed: int
    latency: bool = False
    began: float = field(default_factory=time.process_time)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    found: list[tuple[float, float, Plan, nn.Module]] = field(default_factory=list)  # price, drop, ...
    distilled: bool = True
    length: float = 1.0
    rate: float = 3e-3

    def __post_init__(self) -> None:
        self.score = self.task.score(self.dense, "val").value
        self.use: dict[str, Tensor] = {}
        self.teacher: Tensor | None = None
        if getattr(self.task, "augment", None) is None:
            outputs = predict(self.dense, self.task.probe("train").inputs)
            self.teacher = outputs if isinstance(outputs, Tensor) else None

    @property
    def left(self) -> float:
        return self.seconds - (time.process_time() - self.began)

    @cached_property
    def slot(self) -> float:
        """The seconds of a training: some epochs of the dense network, as far as the time allows."""
        steps, began = 10, 0.0
        trial = copy.deepcopy(self.dense)
        for i, batch in enumerate(self.task.batches(2 * steps, seed=0)):
            if i == steps:  # what happens once is no part of it
                began = time.process_time()
            self.task.loss(call(trial, batch.inputs), batch).backward()
        step = (time.process_time() - began) / steps
        epochs = EPOCHS * step * self.task.examples / self.task.batch_size
        return min(max(epochs, self.seconds / SLOTS[0]), self.seconds / SLOTS[1])

    def drop(self, model: Any) -> float:
        return self.task.loss_of(self.score, self.task.score(model, "val").value)

    def build(self, plan: Plan) -> nn.Module:
        """A fresh network of the family."""
        torch.manual_seed(self.seed + len(self.attempts))
        model: nn.Module = type(self.dense)(**dict(plan.settings))
        for name, kept in plan.kept:
            fold(model, name, self.use[name].argsort(descending=True, stable=True), kept)
        return model

    def train(self, model: nn.Module, seconds: float, distilled: bool) -> nn.Module:
        """Train for so many processor seconds, the rate a cosine of the time that has gone."""
        began, optimizer = time.process_time(), torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=1e-2)
        model.train()
        for batch in self.task.batches(2**31, seed=self.seed + len(self.attempts)):
            gone = (time.process_time() - began) / seconds
            if gone >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, gone / 0.05) * 0.5 * (1 + math.cos(math.pi * gone))
            output = call(model, batch.inputs)
            loss = self.task.loss(output, batch) if self.task.labelled else output.sum() * 0
            if distilled:
                loss = loss / 3 + softened(self.task.loss_name, output, self.outputs(batch)) * 2 / 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def outputs(self, batch: Batch) -> Tensor:
        """The dense network's outputs for a batch."""
        if self.teacher is not None and batch.index is not None:
            return self.teacher[batch.index]
        with torch.no_grad():
            outputs: Tensor = call(self.dense, batch.inputs)
        return outputs

    def price(self, model: nn.Module) -> float:
        """Estimated bytes, or milliseconds of the float32 file."""
        if not self.latency:
            return float(estimate(model))
        example = take(self.task.probe("train").inputs, slice(0, 2))
        session = Session(rival_files.exported(model, example))
        return latency({"": session}, self.task.example, seconds=0.3, clock=time.process_time)[""].median_ms

    def keep(self, plan: Plan, model: nn.Module, how: str) -> bool:
        """Score a network with int8 weights, remember it, and say whether it stays within the floor."""
        drop, price = self.drop(rounded(model)), self.price(model)
        self.found.append((price, drop, plan, model))
        self.attempts.append({"plan": plan.words(), "how": how, "price": round(price, 4), "drop_val": round(drop, 6),
                              "at_s": round(self.seconds - self.left, 1)})  # fmt: skip
        print(f"{self.seconds - self.left:7.1f} s  {price:12.4g}  {drop:9.5f}  {how}: {plan.words()}", file=sys.stderr)
        return drop <= self.floor

    def attempt(self, plan: Plan) -> bool:
        """Train a network of the family for a slot."""
        how = "distilled" if self.distilled else "from labels"
        seconds = max(0.5, min(self.length * self.slot, self.left))
        return self.keep(plan, self.train(self.build(plan), seconds, self.distilled), how)

    @property
    def best(self) -> tuple[float, float, Plan, nn.Module]:
        """The cheapest within the floor; without one, the dense network."""
        within = [item for item in self.found if item[1] <= self.floor]
        return min(within, key=lambda item: item[0]) if within else self.found[0]
