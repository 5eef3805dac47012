"""Train the networks that come with lilliput: `python scripts/make_weights.py [NAME ...]`, one thread, fixed seeds.

Each is trained on its task's train split under an augmentation that never repeats, and the weights kept are a running
average; val and test are only reported. They are written to src/lilliput/data/weights/NAME.safetensors, about ten
minutes of one core for the ResNet and the recurrent network and two for the others.
"""

import importlib
import math
import sys
import time
from functools import partial

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lilliput.data import FOLDER, TASKS

# steps, batch size, peak learning rate, weight decay, seed
SETTINGS = {
    "digits": (2000, 64, 3e-3, 0.05, 0),
    "mnist1d-cnn": (30000, 100, 1e-2, 0.01, 0),
    "mnist1d-mlp": (20000, 100, 3e-3, 0.05, 0),
    "mnist1d-gru": (9000, 100, 4e-3, 0.02, 0),
}


def make(name: str) -> None:
    """Train one network from scratch and write its weights."""
    steps, size, peak, decay, seed = SETTINGS[name]
    module, function = TASKS[name].target.split(":")
    owner = importlib.import_module(module)
    owner.pretrained = lambda model, name: model  # from the initial weights, not from the file to be written
    torch.manual_seed(seed)
    model, task = getattr(owner, function)()
    task.draws = 10**9
    if name.startswith("mnist1d"):
        task.augment = partial(owner.jitter, shift=6, stretch=0.15)
    model.train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 20 / steps), use_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=decay)
    began = time.time()
    for step, batch in enumerate(task.batches(steps, seed, size)):
        rate = peak * min(1, (step + 1) / (steps / 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = task.loss(model(batch.inputs), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(model)
        if step % (steps // 10) == 0:
            print(f"{name} {step}/{steps} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
    final = average.module
    update_bn((batch.inputs for batch in task.batches(60, seed + 1, size)), final)
    final.eval()
    scores = {split: round(task.score(final, split).value, 4) for split in ("train", "val", "test")}
    plain = {split: round(task.score(model, split).value, 4) for split in ("val", "test")}
    print(f"{name}: {scores}; without averaging {plain}; {time.time() - began:.0f} s", flush=True)
    (FOLDER / "weights").mkdir(exist_ok=True)
    weights = {key: value.contiguous() for key, value in final.state_dict().items()}
    save_file(weights, FOLDER / "weights" / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SETTINGS:
        make(name)
