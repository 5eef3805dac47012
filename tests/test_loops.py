"""Rules in loops that are not ours: gradient accumulation, a gradient scaler that skips, Accelerate, Hugging Face."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.code.base import realize
from lilliput.distill.logits import Distill
from lilliput.prune.prune import Prune
from lilliput.schedule import Cubic
from lilliput.stage import Reference
from lilliput.task import Batch, Task

STEPS = 6
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 8, generator=GENERATOR)
Y = torch.arange(48) % 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in realize(model).parameters() if p.dim() > 1)


def due(step: int) -> int:
    return round(Cubic(0.75)(step, STEPS) * 192)


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with Prune(0.75, every=1).attached(model, sgd, steps=STEPS) as driver:
        for micro in range(STEPS * 3):
            F.cross_entropy(model(X[micro * 2 : micro * 2 + 2]), Y[micro * 2 : micro * 2 + 2]).backward()
            if micro % 3 == 2:
                sgd.step()
                sgd.zero_grad()
            assert driver.step == (micro + 1) // 3 and zeros(model) == due(driver.step)
    assert zeros(model) == 144


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p, fused=True)], ids=["foreach", "fused"]
)
def test_a_step_that_the_scaler_skips_does_not_advance_the_schedule(make) -> None:
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    taken = 0
    with Prune(0.75, every=1).attached(model, optimizer, steps=STEPS) as driver:
        for turn in range(STEPS + 3):
            overflow = turn % 3 == 1
            before = [p.detach().clone() for p in model.parameters()]
            loss = F.cross_entropy(model(X), Y) * (float("inf") if overflow else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            taken += not overflow
            assert driver.step == taken and zeros(model) == due(taken)
            moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved != overflow
    assert taken == STEPS and zeros(model) == 144


def test_distillation_is_one_more_line() -> None:
    task = Task("loops", (X, Y), (X, Y))
    dense, model = net().eval(), net()
    with torch.no_grad():
        model[2].weight.mul_(0.1)
    adam = torch.optim.AdamW(model.parameters(), 0.02)
    rule, seen = Distill(temperature=2.0), []
    with rule.attached(model, adam, steps=40, task=task, reference=Reference(dense, task)) as driver:
        for _ in range(40):
            output = model(X)
            loss = output.sum() * 0 + driver.loss(Batch(X, Y, torch.arange(48), 0), output)
            adam.zero_grad()
            loss.backward()
            adam.step()
            seen.append(float(loss.detach()))
    assert seen[-1] < 0.2 * seen[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prepared", [False, True], ids=["before prepare", "after prepare"])
def test_accelerate(prepared: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    raw = optimizer
    model, optimizer = accelerator.prepare(model, optimizer)
    with Prune(0.75, every=1).attached(model, optimizer if prepared else raw, steps=STEPS) as driver:
        for micro in range(STEPS * 2):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(X), Y))
                optimizer.step()
                optimizer.zero_grad()
            assert driver.step == (micro + 1) // 2
    assert zeros(accelerator.unwrap_model(model)) == 144


class Classifier(nn.Module):
    """What the Hugging Face Trainer wants of a model: arguments by name in, a dictionary with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    settings = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    with Prune(0.75, every=1).attached(model, optimizer, steps=STEPS) as driver:
        trainer.train()
    assert driver.step == STEPS and zeros(model) == 144
