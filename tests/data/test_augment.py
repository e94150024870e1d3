"""Random transforms that depend on a generator alone, and leave the global ones as they were."""

import random

import numpy as np
import pytest
import torch
from timm.data import create_transform

from ssmamba_models.data.augment import SeededTransform
from ssmamba_models.data.synthetic import synthetic_he


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def augment():
    return SeededTransform(
        create_transform(48, is_training=True, vflip=0.5, color_jitter=0.2, auto_augment="rand-m5-n2", re_prob=0.5)
    )


def test_the_generator_decides_and_nothing_else(augment):
    image = synthetic_he(64)
    views = []
    for noise in range(3):
        random.seed(noise)
        np.random.seed(noise)
        torch.manual_seed(noise)
        views.append(augment(image, generator(5)))
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], augment(image, generator(6)))


def test_the_global_generators_are_left_alone(augment):
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    augment(synthetic_he(64), generator(5))
    assert draws() == expected


def test_so_they_are_after_an_error():
    def broken(image):
        torch.rand(3)
        raise ValueError("broken")

    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="broken"):
        SeededTransform(broken)(synthetic_he(32), generator(0))
    assert torch.equal(torch.get_rng_state(), before)
