"""The teacher: a moving average of its students, by a schedule, without gradient, in eval mode."""

import copy
import math

import pytest
import torch
from torch import nn

from ssmamba_models.ssl.ema_teacher import EmaTeacher


def students(seed=0):
    torch.manual_seed(seed)
    return {"encoder": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), "head": nn.Linear(4, 2)}


def test_it_begins_as_a_copy_and_follows_by_the_average():
    modules = students()
    teacher = EmaTeacher(modules, momentum=0.9)
    expected = [parameter.detach().clone() for module in modules.values() for parameter in module.parameters()]
    for step in range(1, 4):
        for module in modules.values():
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        teacher.update(modules, step)
        new = [parameter for module in modules.values() for parameter in module.parameters()]
        expected = [0.9 * old + 0.1 * now.detach() for old, now in zip(expected, new)]
        for own, wanted in zip(teacher.parameters(), expected):
            torch.testing.assert_close(own, wanted)


def test_the_momentum_rises_to_one_by_a_cosine():
    teacher = EmaTeacher(students(), momentum=0.96, steps=200)
    assert teacher.momentum_at(0) == pytest.approx(0.96)
    assert teacher.momentum_at(100) == pytest.approx(0.98)
    assert teacher.momentum_at(50) == pytest.approx(1 - 0.04 * (math.cos(math.pi / 4) + 1) / 2)
    assert teacher.momentum_at(200) == teacher.momentum_at(300) == 1
    assert EmaTeacher(students(), momentum=0.96).momentum_at(10**6) == 0.96


def test_at_the_end_it_stands_still():
    modules = students()
    teacher = EmaTeacher(modules, momentum=0.5, steps=10)
    before = copy.deepcopy(teacher.state_dict())
    nn.init.normal_(modules["head"].weight)
    teacher.update(modules, 10)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_it_gets_no_gradient_and_drops_nothing():
    modules = students()
    teacher = EmaTeacher(modules).train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    x = torch.randn(8, 3)
    assert torch.equal(teacher["encoder"](x), teacher["encoder"](x))
    assert modules["encoder"].training


def test_buffers_are_copied():
    modules = students()
    teacher = EmaTeacher(modules)
    modules["encoder"](torch.randn(8, 3) + 5)
    teacher.update(modules, 1)
    assert torch.equal(teacher["encoder"][1].running_mean, modules["encoder"][1].running_mean)
    assert teacher["encoder"][1].running_mean.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": -0.1}, "teacher_momentum is -0.1"),
        ({"momentum": 1.1}, "teacher_momentum is 1.1"),
        ({"momentum": math.nan}, "teacher_momentum is nan"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmaTeacher(students(), **arguments)
