"""DSA: agreement with the published outputs, and the properties that other modules rely on."""

import pytest
import torch

from utils.data import augment
from utils.data.names import parse_strategy
from utils.errors import UserError

STRATEGY = "color_crop_cutout_flip_scale_rotate"


@pytest.fixture(scope="module")
def golden(golden_ops):
    return golden_ops["dsa"]


@pytest.mark.parametrize("name", [name for name, operation in augment.OPERATIONS.items() if operation.draw])
def test_equals_the_published_operation(golden, name):
    """Ours is in float64, so the difference is the rounding of the published float32 alone, on any processor."""
    values = [value.double() if torch.is_tensor(value) and value.is_floating_point() else value
              for key, value in golden[name]["params"].items() if key != "size"]
    ours = augment.OPERATIONS[name].apply(golden["input"].double(), *values)
    torch.testing.assert_close(ours.float(), golden[name]["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, crop, cutout", [((32, 32), (4, 4), (32, 32)), ((30, 30), (4, 4), (29, 29)),
                                                ((9, 13), (1, 2), (8, 12))])
def test_draws_fill_the_published_ranges_and_apply_keeps_the_shape(size, crop, cutout):
    """The centre of a cutout reaches one pixel further where the square's side is even."""
    turn = 15 * torch.pi / 180
    groups = {"color": {"brightness": [(-.5, .5)], "saturation": [(0, 2)], "contrast": [(.5, 1.5)]},  # in this order
              "crop": {"crop": [(-most, most) for most in crop]}, "cutout": {"cutout": [(0, most) for most in cutout]},
              "flip": {"flip": [(0, 1)]}, "scale": {"scale": [(1 / 1.2, 1.2)] * 2},
              "rotate": {"rotate": [(-turn, turn)]}}
    assert list(groups) == list(augment.GROUPS)
    random = torch.Generator().manual_seed(0)
    for group, operations in groups.items():
        drawn = augment.draw((group,), 4000, size, random)
        assert drawn.operations == tuple(operations)
        for values, ranges in zip(drawn.parameters.values(), operations.values()):
            for value, (low, high) in zip(values, ranges, strict=True):
                slack = 0.01 * (high - low) * value.is_floating_point()
                assert low - 1e-6 <= value.min() <= low + slack and high - slack <= value.max() <= high + 1e-6, group
        x = torch.randn(5, 3, *size, generator=random)
        assert augment.apply(x, drawn.rows(slice(0, 5))).shape == x.shape
    flipped = augment.draw(("flip",), 4000, size, random).parameters["flip"][0]
    assert flipped.float().mean() == pytest.approx(.5, abs=.03)


def test_every_group_is_drawn_about_equally_often():
    random = torch.Generator().manual_seed(0)
    groups = parse_strategy(STRATEGY)
    drawn = [augment.draw(groups, 1, (8, 8), random).operations for _ in range(1200)]
    assert set(drawn) == {augment.GROUPS[group] for group in groups}
    assert all(140 < drawn.count(each) < 260 for each in set(drawn))


def test_the_same_generator_state_draws_the_same():
    first, second = (augment.draw(parse_strategy(STRATEGY), 5, (8, 8), torch.Generator().manual_seed(3))
                     for _ in range(2))
    assert list(first.parameters) == list(second.parameters)
    for name, values in first.parameters.items():
        assert all(torch.equal(*pair) for pair in zip(values, second.parameters[name]))


@pytest.mark.parametrize("name", list(augment.GROUPS))
def test_differentiable_in_the_images(name):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 2, 6, 6, generator=random, dtype=torch.float64, requires_grad=True)
    drawn = augment.draw((name,), 2, (6, 6), random)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, drawn), (x,))


def test_no_strategy_and_unknown_group():
    assert parse_strategy("none") == parse_strategy("") == ()
    x = torch.ones(1, 1, 2, 2)
    assert augment.apply(x, augment.draw((), 1, (2, 2), torch.Generator())) is x
    with pytest.raises(UserError, match="colour.*did you mean 'color'"):
        parse_strategy("colour_crop")
