"""Distil in the Hugging Face Trainer: make the optimizer yourself, add the rule's loss in `compute_loss`."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import lilliput
from lilliput.data.languages import strings

(texts, _, languages), names = strings(), ["cy", "fi", "hu", "tr"]  # what Django says in 79 languages
rows = [(text.encode()[:48], names.index(name)) for text, name in zip(texts, languages, strict=True) if name in names]
data = [{"input_ids": torch.tensor(list(text.ljust(48, b"\0"))), "labels": torch.tensor(y)} for text, y in rows]
train, held, steps = data[::2], data[1::2], 150


def network(width: int, layers: int) -> nn.Module:
    """A transformer over bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width, "vocab_size": 256}
    return BertForSequenceClassification(BertConfig(num_attention_heads=4, num_labels=len(names), **sizes))


class Distilling(Trainer):
    """A Trainer that adds the loss of a rule, where it has one."""

    rule: Any = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **more: Any
    ) -> Any:
        output = model(**inputs)
        loss = output.loss if self.rule is None else output.loss + self.rule.loss(inputs, output)
        return (loss, output) if return_outputs else loss


def trainer(model: nn.Module, lr: float) -> Trainer:
    """A Trainer with an optimizer of our own."""
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    settings = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=32, use_cpu=True, **quiet)
    return Distilling(
        model, settings, train_dataset=train, optimizers=(torch.optim.AdamW(model.parameters(), lr), None)
    )


teacher, student = network(64, 2), network(32, 1)
with tempfile.TemporaryDirectory() as folder:
    trainer(teacher, 2e-3).train()
    job = trainer(student, 4e-3)
    with lilliput.Distill(temperature=2.0).attached(student, job.optimizer, teacher=teacher) as job.rule:
        job.train()

ids, labels = (torch.stack([row[key] for row in held]) for key in ("input_ids", "labels"))
with torch.no_grad():
    dense, small = ((m.eval()(ids).logits.argmax(1) == labels).float().mean().item() for m in (teacher, student))
print(f"{len(held)} strings of {len(names)} languages: teacher {dense:.3f}, student {small:.3f}")
assert job.rule.step == steps and small > dense - 0.1 > 0.6
