"""Distil in Lightning: make the optimizer yourself, attach the rule around `fit`, add its loss in `training_step`."""

import logging

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lilliput
from lilliput.data.mnist1d import mnist1d_mlp
from lilliput.nets.mnist1d import CNN

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
teacher, task = mnist1d_mlp()
torch.manual_seed(0)


class Student(lightning.LightningModule):
    """A network, its optimizer, and the rule that is attached to both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CNN(channels=16)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        output = self.net(x)
        return F.cross_entropy(output, y) + self.rule.loss(x, output)


student = Student()
loader = DataLoader(TensorDataset(*task.split("train")), batch_size=100, shuffle=True, drop_last=True)
steps = 10 * len(loader)
rule = lilliput.Distill(weight=lilliput.Linear(2.0, 0.5), temperature=2.0)  # the teacher counts less and less
trainer = lightning.Trainer(
    max_steps=steps,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
with rule.attached(student.net, student.optimizer, steps=steps, teacher=teacher) as student.rule:
    trainer.fit(student, loader)

x, y = task.split("test")
dense, small = ((model.eval()(x).argmax(1) == y).float().mean().item() for model in (teacher, student.net))
print(f"{student.rule.step} steps; teacher {dense:.3f}, student {small:.3f}")
assert student.rule.step == steps and small > dense - 0.3
