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


@pytest.mark.parametrize("name", list(augment.GROUPS))
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (9, 13)])
def test_draw_stays_in_range_and_apply_keeps_shape(name, size):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, *size, generator=random)
    drawn = augment.draw((name,), 64, size, random)
    assert drawn.group == name
    assert augment.apply(x, drawn).shape == x.shape
    expected = {"brightness": (-.5, .5), "saturation": (0, 2), "contrast": (.5, 1.5), "scale": (1 / 1.2, 1.2),
                "rotate": (-15 * torch.pi / 180, 15 * torch.pi / 180), "flip": (0, 1),
                "crop": (-int(size[0] / 8 + .5), int(size[0] / 8 + .5)), "cutout": (0, max(size))}
    for operation, values in drawn.parameters.items():
        low, high = expected[operation]
        assert values[0].min() >= low - 1e-6 and values[0].max() <= high + 1e-6
        assert len(values[0].unique()) > 1  # drawn per sample


def test_cutout_centre_reaches_one_further_for_an_even_square():
    random = torch.Generator().manual_seed(0)
    even = torch.cat([augment.OPERATIONS["cutout"].draw(500, (32, 32), random)[0] for _ in range(4)])
    odd = torch.cat([augment.OPERATIONS["cutout"].draw(500, (30, 30), random)[0] for _ in range(4)])
    assert (even.min(), even.max()) == (0, 32)
    assert (odd.min(), odd.max()) == (0, 29)


def test_every_group_is_drawn_about_equally_often():
    random = torch.Generator().manual_seed(0)
    groups = parse_strategy(STRATEGY)
    drawn = [augment.draw(groups, 1, (8, 8), random).group for _ in range(1200)]
    assert set(drawn) == set(groups)
    assert all(140 < drawn.count(group) < 260 for group in groups)


def test_the_same_generator_state_draws_the_same():
    first, second = (augment.draw(parse_strategy(STRATEGY), 5, (8, 8), torch.Generator().manual_seed(3))
                     for _ in range(2))
    assert first.group == second.group
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
