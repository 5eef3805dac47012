"""Prune while the Hugging Face Trainer trains: make the optimizer yourself and attach the rule to it."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import lilliput

torch.manual_seed(0)
config = BertConfig(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
    num_labels=2,
)
model = BertForSequenceClassification(config)
ids = torch.randint(2, 32, (512, 12))
labels = (ids[:, 0] > ids[:, 1]).long()
data = [
    {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
    for row, label in zip(ids, labels, strict=True)
]

steps = 120
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
rule = lilliput.Prune(0.5, where="bert.encoder.*")

with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    with rule.attached(model, optimizer, steps=steps) as attached:
        trainer.train()

query = model.bert.encoder.layer[0].attention.self.query.weight
print(f"{attached.step} steps, {(query == 0).float().mean():.0%} of the first query matrix is zero")
assert attached.step == steps and len(lilliput.codes(model)) == 12
plain = lilliput.realize(model)  # an ordinary BertForSequenceClassification again, to save or export
assert not lilliput.codes(plain)
