"""Random transforms are pure functions of example and draw, whoever draws: torch, numpy, random, albumentations."""

import random

import albumentations
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import lilliput
from lilliput.task import Task
from lilliput.task.transforms import augmentation, seeded

X, Y = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
INDEX = torch.tensor([3, 0, 7])


class Flip(nn.Module):
    """A transform as torchvision writes them: a module of one example that draws from torch's generator."""

    def forward(self, *images: Tensor) -> Tensor:
        return images[0].flip(-1) if torch.rand(()) < 0.5 else images[0]


Flip.__module__ = "torchvision.transforms.v2"  # whose signature does not say that it takes one example


def shifted(image: Tensor) -> Tensor:
    return image.roll(random.randrange(8), -1) + float(np.random.rand())


TRANSFORMS = {
    "torchvision": Flip(),
    "a function": shifted,
    "albumentations": albumentations.Compose([albumentations.HorizontalFlip(p=0.5), albumentations.RandomCrop(6, 6)]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_of_one_example_is_a_pure_function_of_example_and_draw(transform) -> None:
    made = [Task("t", train=(X, Y), val=(X, Y), augment=transform, draws=4) for _ in range(2)]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = made[0].batch(INDEX, 2).inputs
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first, made[1].batch(INDEX, 2).inputs)
    alone = torch.cat([made[0].batch(INDEX[i : i + 1], 2).inputs for i in range(3)])
    assert torch.equal(first, alone), "what an example becomes does not depend on those beside it"
    assert any(not torch.equal(first, made[0].batch(INDEX, draw).inputs) for draw in (0, 1, 3))
    made[0].prepare(2)  # the table of a whole epoch
    assert torch.equal(first, made[0].batch(INDEX, 2).inputs)
    torch.set_rng_state(before[0])


class Changing(Dataset):
    """A data set whose transform draws at random whenever an example is read."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return shifted(X[place]), int(Y[place])


def test_a_data_set_that_changes_its_examples_is_read_again_for_each_augmentation() -> None:
    made = [Task("t", train=Changing(), val=(X, Y), draws=4) for _ in range(2)]
    assert made[0].draws == 4 and made[0].fingerprint == made[1].fingerprint
    first = made[0].batch(INDEX, 1)
    assert first.targets is not None and first.targets.tolist() == Y[INDEX].tolist()
    assert torch.equal(first.inputs, made[1].batch(INDEX, 1).inputs)
    assert not torch.equal(first.inputs, made[0].batch(INDEX, 2).inputs)
    made[1].prepare(1)
    assert torch.equal(first.inputs, made[1].batch(INDEX, 1).inputs)
    more = Task("t", train=Changing(), val=(X, Y), draws=4, unlabelled=X + 9)
    both = more.batch(torch.tensor([14, 3]), 1)
    assert torch.equal(both.inputs, torch.stack([first.inputs[0], X[2] + 9])), "what has a label comes first"


def test_a_data_set_that_does_not_change_has_one_draw() -> None:
    class Fixed(Changing):
        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            return X[place], int(Y[place])

    assert Task("t", train=Fixed(), val=(X, Y)).draws == 1


def test_reading_leaves_the_random_numbers_of_the_program_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    Task("t", train=Changing(), val=(X, Y))
    assert torch.equal(torch.rand(2), wanted)
    with seeded(5):
        inside = torch.rand(1), np.random.rand(), random.random()
    with seeded(5) as begin:
        random.random()
        begin(5)
        assert (torch.rand(1), np.random.rand(), random.random()) == inside


def test_a_function_of_inputs_and_seeds_stays_what_it_is() -> None:
    def own(inputs: Tensor, seeds: Tensor) -> Tensor:
        return inputs + lilliput.task.uniform(seeds, 1)[:, :, None, None]

    assert augmentation(own) is own and augmentation(None) is None
    assert isinstance(augmentation(shifted), lilliput.PerExample)
