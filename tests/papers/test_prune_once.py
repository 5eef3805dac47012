"""Facts from the paper behind pruning once for all tasks: zeros that stay, in transfer and in quantization."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lilliput
from lilliput.code.base import codes, copy_model, realize
from lilliput.code.masked import Masked
from lilliput.distill.logits import Distill
from lilliput.nets.bert import Classifier, SentenceBert, States
from lilliput.prune.masks import masks
from lilliput.prune.prune_once import PatternLock, transfer
from lilliput.quant.uniform import Uniform
from lilliput.stage import Reference
from lilliput.train import Train

IDS = torch.randint(1, 40, (24, 6), generator=torch.Generator().manual_seed(0))
KEPT = (torch.arange(6) < torch.arange(24)[:, None] % 5 + 2).long()
TEXTS = {"input_ids": IDS * KEPT, "attention_mask": KEPT}
TASK = lilliput.Task("texts", train=(TEXTS, torch.arange(24) % 3), val=(TEXTS, torch.arange(24) % 3), batch_size=8)


def encoder() -> SentenceBert:
    torch.manual_seed(0)
    return SentenceBert(words=40, positions=8, width=8, layers=2, heads=2, hidden=16)


def sparse() -> nn.Module:
    """A classifier whose encoder was pruned once, as plain tensors: what another program would load."""
    pruned = lilliput.Prune(0.75, allocation="uniform", where="layers.*")(encoder(), None, None)
    torch.manual_seed(1)
    return Classifier(realize(pruned), 3)


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w == 0 for name, w in realize(model).named_parameters() if ".layers." in name and w.dim() > 1}


def test_the_pattern_is_bit_identical_after_every_transfer() -> None:
    """arXiv:2111.05754, the claim: a pattern found once serves each task; only what it keeps is trained."""
    before, start = zeros(sparse()), sparse()
    for seed in (0, 1):
        made = lilliput.run(start, TASK, transfer(6, lr=1e-2, seed=seed), seed=seed)
        assert all(torch.equal(before[name], after) for name, after in zeros(made).items())
        changed = [not torch.equal(w, start.get_parameter(name)) for name, w in realize(made).named_parameters()]
        assert all(changed[2:])  # all but rows of the embeddings that no text has


def test_without_the_lock_the_zeros_are_lost() -> None:
    made = lilliput.run(sparse(), TASK, (Train(3),))
    assert sum(int(after.sum()) for after in zeros(made).values()) < 0.1 * sum(
        int(mask.sum()) for mask in zeros(sparse()).values()
    )


def test_quantization_aware_training_keeps_the_pattern_and_the_grid() -> None:
    """The second stage of the transfer: pattern-lock, distillation and 8-bit weights at once."""
    start = sparse()
    made = lilliput.run(start, TASK, transfer(3, 3, lr=1e-2, where="encoder.layers.*"))
    chains = codes(made)
    for name, mask in zeros(start).items():
        masked, uniform = chains[name][:2]
        assert isinstance(masked, Masked) and isinstance(uniform, Uniform)
        assert torch.equal(masked.mask, ~mask)
        weight = realize(made).get_parameter(name)
        assert bool((weight[mask] == 0).all())
        assert all(len(row.unique()) <= 255 for row in weight)


def test_masks_that_a_model_brings_along_stay_as_they_are() -> None:
    """An entry that is kept but happens to be zero may train; one that is masked may not, whatever lies behind it."""
    net = lilliput.Prune(0.5)(nn.Linear(4, 4), None, None)
    before = masks(net)["weight"].mask.clone()
    with torch.no_grad():
        net.parametrizations.weight.original.mul_(0)
    PatternLock().begin(net, None, None, 1)
    assert torch.equal(masks(net)["weight"].mask, before)


def test_a_dense_tensor_is_left_alone_and_a_dense_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    PatternLock().begin(net, None, None, 1)
    assert list(masks(net)) == ["0.weight"]
    with pytest.raises(ValueError, match=r"PatternLock: .* must be masked or have 10% zeros, got none"):
        PatternLock().begin(nn.Linear(4, 4), None, None, 1)


def test_in_a_loop_of_ones_own_two_lines_keep_the_zeros() -> None:
    net = sparse()
    before = zeros(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with PatternLock().attached(net, optimizer, steps=3):
        for batch in TASK.batches(3, 0):
            optimizer.zero_grad()
            F.cross_entropy(net(**batch.inputs), batch.targets).backward()
            optimizer.step()
    assert all(torch.equal(before[name], after) for name, after in zeros(net).items())


def test_an_interrupted_transfer_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = lilliput.run(sparse(), TASK, (Train(6, rules=(PatternLock(),)),))
    lilliput.run(sparse(), TASK, (Train(6, rules=(PatternLock(),), until=3),), tmp_path)
    resumed = lilliput.run(sparse(), TASK, (Train(6, rules=(PatternLock(),)),), tmp_path)
    again = lilliput.run(sparse(), TASK, (Train(6, rules=(PatternLock(),)),), tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]) and torch.equal(value, again.state_dict()[name]), name


def test_transfer_is_plain_data_in_the_order_of_the_paper() -> None:
    stages = transfer(100, 20, distill=Distill(temperature=2.0))
    assert lilliput.Recipe.parse(lilliput.Recipe(stages).data()).stages == stages
    assert [type(stage).__name__ for stage in stages] == ["Train", "Quantize", "Train"]
    assert [type(rule).__name__ for rule in stages[2].rules] == ["PatternLock", "Distill"]
    (train,) = transfer(100, lock=False)
    assert isinstance(train, Train) and not train.rules


def test_hidden_states_of_an_encoder_end_in_its_vector() -> None:
    """TinyBERT, arXiv:1909.10351, equation 8 compares these; padding is zero and the mean of the last is the output."""
    net = encoder().eval()
    states = States(net, (1, 2))(**TEXTS)
    assert states.shape == (24, 2, 6, 8) and bool((states[KEPT[:, None].expand(-1, 2, -1) == 0] == 0).all())
    torch.testing.assert_close(F.normalize(states[:, 1].sum(1) / KEPT.sum(1, keepdim=True), dim=1), net(**TEXTS))


def test_one_upstream_pruning_teaches_hidden_states() -> None:
    """Distillation upstream without labels: the pruned encoder is nearer to the dense one than when pruned at once."""
    dense = encoder().eval()
    task = lilliput.Task("text", train=(TEXTS, None), val=(TEXTS, None), loss="mse", metric="mse")
    teacher = States(copy_model(dense), (1, 2)).requires_grad_(False)
    rules = (lilliput.Prune(0.5, every=5, where="encoder.layers.*"), Distill())
    made = lilliput.run(
        States(copy_model(dense), (1, 2)),
        task,
        (Train(60, lr=3e-3, rules=rules, supervised=0.0),),
        reference=Reference(teacher, task),
    )
    at_once = lilliput.Prune(0.5, where="encoder.layers.*")(States(copy_model(dense), (1, 2)), None, None)
    wanted = teacher(**TEXTS)
    assert F.mse_loss(made(**TEXTS), wanted) < 0.7 * F.mse_loss(at_once(**TEXTS), wanted)


def test_classes_come_from_the_unit_vector() -> None:
    net = Classifier(encoder().eval(), 3)
    torch.testing.assert_close(net(**TEXTS), F.linear(8**0.5 * net.encoder(**TEXTS), net.head.weight, net.head.bias))
