"""Rules in loops that are not ours: gradient accumulation, a gradient scaler that skips, Accelerate, Hugging Face."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.code.base import realize
from lilliput.distill.features import Features
from lilliput.distill.logits import Distill
from lilliput.distill.mixup import Mixup
from lilliput.prune.prune import Prune
from lilliput.reference import Reference
from lilliput.rule import parameters
from lilliput.schedule import Cubic, Linear
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


def wide() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


def test_a_teacher_is_enough_for_batches_of_any_loader() -> None:
    """The same numbers as by a task's batches, whose dense outputs are kept."""
    losses: list[list[float]] = []
    task = Task("loops", (X, Y), (X, Y))
    for given in ({"teacher": wide()}, {"reference": Reference(wide(), task)}):
        model = net()
        sgd, seen = torch.optim.SGD(model.parameters(), 0.1), []
        with Distill(Linear(1.0, 0.0)).attached(model, sgd, steps=STEPS, **given) as driver:
            for step in range(STEPS):
                index = torch.arange(step * 8, step * 8 + 8)
                output = model(X[index])
                added = driver.loss(X[index] if "teacher" in given else task.batch(index, 0), output)
                sgd.zero_grad()
                (F.cross_entropy(output, Y[index]) + added).backward()
                sgd.step()
                seen.append(float(added.detach()))
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and min(losses[0]) > 0


def test_a_teacher_that_a_loop_sets_to_train_is_evaluated_all_the_same() -> None:
    dense = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.9))
    whole = nn.ModuleDict({"student": net(), "dense": dense})
    model = whole["student"]
    with Distill().attached(model, torch.optim.SGD(model.parameters(), 0.1), teacher=dense) as driver:
        whole.train()
        first, second = (float(driver.loss(X, model(X)).detach()) for _ in range(2))
    assert first == second


def test_steps_may_be_left_out_where_nothing_changes_with_them() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for rule in (Prune(0.5), Distill(Linear(1.0, 0.0)), Mixup()):
        with pytest.raises(ValueError, match=f"{type(rule).__name__}: steps must be given"):
            rule.attached(model, sgd, teacher=wide()).__enter__()
    with Distill().attached(model, sgd, teacher=wide()) as driver:
        assert float(driver.loss(X, model(X)).detach()) > 0


def loop(model: nn.Module, driver: Any, optimizer: Any, first: int, last: int, after: Any = lambda: None) -> None:
    """A loop that zeroes the gradients of its model alone, as the Hugging Face Trainer does."""
    for step in range(first, last):
        x = X[step * 8 % 48 :][:8]
        (driver.loss(x, model(x)) + model(x).square().mean() * 0.01).backward()
        optimizer.step()
        model.zero_grad()
        after()


HINTS = Features(("0",), weight=5.0)


def hints() -> Reference:
    return Reference(wide(), example=X[:1])


def test_learnable_extras_join_the_optimizer_and_its_schedule_until_the_end() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
    moved = []
    with HINTS.attached(model, sgd, reference=hints()) as driver:
        (regressor,) = parameters(driver.state)
        before = regressor.detach().clone()

        def after() -> None:
            moved.append(float((regressor.detach() - before).norm()))
            before.copy_(regressor.detach())
            schedule.step()

        loop(model, driver, sgd, 0, 4, after)
        assert regressor.grad is None, "nothing piles up"
        assert len(sgd.param_groups[0]["params"]) == 5
    assert moved[0] > 0 and moved[3] < 0.3 * moved[0]
    assert [id(p) for p in sgd.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_extras_may_have_settings_of_their_own() -> None:
    model = net()
    state = HINTS.begin(model, None, hints(), STEPS)
    (regressor,) = parameters(state)
    first = regressor.detach().clone()
    sgd = torch.optim.SGD([{"params": model.parameters()}, {"params": [regressor], "lr": 0.0}], 0.1)
    with HINTS.attached(model, sgd, reference=hints(), state=state) as driver:
        loop(model, driver, sgd, 0, 4)
    assert torch.equal(regressor, first) and len(sgd.param_groups[1]["params"]) == 1


def test_a_loop_of_ones_own_goes_on_from_its_checkpoint() -> None:
    """Model, optimizer and driver are all there is: the regressor's weights, its momenta and the step with them."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, torch.optim.AdamW(model.parameters(), 0.05)

    whole, adam = make()
    with HINTS.attached(whole, adam, steps=8, reference=hints()) as driver:
        loop(whole, driver, adam, 0, 8)
    cut, adam = make()
    with HINTS.attached(cut, adam, steps=8, reference=hints()) as driver:
        loop(cut, driver, adam, 0, 3)
        saved = copy.deepcopy((cut.state_dict(), adam.state_dict(), driver.state_dict()))
    again, adam = make()
    with HINTS.attached(again, adam, steps=8, reference=hints()) as driver:
        again.load_state_dict(saved[0])
        adam.load_state_dict(saved[1])
        driver.load_state_dict(saved[2])
        assert driver.step == 3
        loop(again, driver, adam, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_rule_that_changes_batches_is_one_more_line() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with Mixup(1.0, classes=4).attached(model, sgd, steps=2) as driver:
        first = driver.batch(X, Y)
        F.cross_entropy(model(first.inputs), first.targets).backward()
        sgd.step()
        second = driver.batch(X, Y)
    assert first.targets.shape == (48, 4) and not torch.equal(first.inputs, second.inputs)


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


@pytest.mark.filterwarnings("ignore")
def test_distillation_in_the_hugging_face_trainer(tmp_path: Path) -> None:
    """Outputs are dictionaries there, batches too, and the trainer zeroes the gradients of its model alone."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    teacher, model, seen = Classifier(), Classifier(), []
    with torch.no_grad():
        teacher.net[2].weight.mul_(3.0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=16, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    class Distilling(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **more: Any) -> Any:
            output = model(**inputs)
            loss = driver.loss(inputs, output)
            seen.append(float(loss.detach()))
            return (loss, output) if return_outputs else loss

    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = Distilling(model, settings, train_dataset=data, optimizers=(optimizer, None))
    with Distill(temperature=1.0).attached(model, optimizer, teacher=teacher) as driver:
        trainer.train()
    assert driver.step == 40 and sum(seen[-6:]) < 0.5 * sum(seen[:6])


@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    """Pruning and distillation at once, each attached to the optimizer that the module hands out."""
    lightning = pytest.importorskip("lightning")
    model, teacher, seen = net(), wide(), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def training_step(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            output = self.net(x)
            seen.append(float(distilled.loss(x, output).detach()))
            return F.cross_entropy(output, y) + distilled.loss(x, output)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with (
        Prune(0.75, every=1).attached(model, optimizer, steps=STEPS) as pruned,
        Distill(Linear(1.0, 0.0)).attached(model, optimizer, steps=STEPS, teacher=teacher) as distilled,
    ):
        trainer.fit(Module(), loader)
    assert pruned.step == distilled.step == STEPS and zeros(model) == 144
    assert len(seen) == 2 * STEPS and min(seen) > 0
