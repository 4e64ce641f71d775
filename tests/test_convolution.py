"""Every form of the 3×3 convolution, and its derivatives, against torch's."""

import pytest
import torch
import torch.nn.functional as F

from utils.derivatives.convolution import Columns, Direct, Winograd

BATCH = 3


def by_the_library(x, w, delta, padding):
    """z = conv(x, w) and the gradients of ⟨z, δ⟩ in x and w, by torch."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    z = F.conv2d(x, w, padding=padding)
    return z.detach(), *torch.autograd.grad(z, (x, w), delta)


def by_the_form(form, x, w, delta):
    """The same through the form's lifted space; inputs and results have channels first."""
    u, v, d = (form.lift_kernel(w), form.lift_input(x.permute(0, 2, 3, 1)),
               form.lift_output(delta.permute(0, 2, 3, 1)))
    maps = form.lower_output(form.forward(v, u)), form.lower_input(form.backward(d, u))
    return *(each.permute(0, 3, 1, 2) for each in maps), form.lower_kernel(form.weight(v, d))


def operands(channels, width, padding, size, dtype=torch.float64):
    """x, w and δ; δ has the shape of the convolution's output."""
    random = torch.Generator().manual_seed(0)
    size_out = [side + 2 * padding - 2 for side in size]
    shapes = (BATCH, channels, *size), (width, channels, 3, 3), (BATCH, width, *size_out)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def errors(found, expected):
    """Relative errors, in norm, of the output, ∂x and ∂w."""
    assert [each.shape for each in found] == [each.shape for each in expected]
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]


FORMS = {
    "direct": lambda channels, width, padding, size: Direct(channels, width, padding),
    "columns": Columns,
    "Winograd": lambda channels, width, padding, size: Winograd(channels, width, size),
}


@pytest.mark.parametrize("channels, width", [(1, 1), (3, 8), (5, 2)])
@pytest.mark.parametrize("name, padding, size", [
    *((name, padding, size) for name in ("direct", "columns") for padding in (1, 3)
      for size in ((1, 1), (4, 4), (7, 5), (8, 12))),
    *(("Winograd", 1, size) for size in ((4, 4), (4, 12), (8, 4), (12, 16))),
])
def test_equals_the_library(name, padding, size, channels, width):
    given = operands(channels, width, padding, size)
    form = FORMS[name](channels, width, padding, size)
    assert max(errors(by_the_form(form, *given), by_the_library(*given, padding))) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_products_may_be_summed_before_they_are_lowered(name):
    """As in the adjoint: z˙ = lower(V˙·U + V·U˙)."""
    (x, w, _), (x_, w_, _) = operands(4, 6, 1, (8, 4)), [each.flip(0) for each in operands(4, 6, 1, (8, 4))]
    form = FORMS[name](4, 6, 1, (8, 4))
    v, v_ = (form.lift_input(each.permute(0, 2, 3, 1)) for each in (x, x_))
    u, u_ = (form.lift_kernel(each) for each in (w, w_))
    found = form.lower_output(form.forward(v_, u) + form.forward(v, u_)).permute(0, 3, 1, 2)
    expected = F.conv2d(x_, w, padding=1) + F.conv2d(x, w_, padding=1)
    assert (found - expected).norm() < 1e-12 * expected.norm()


def test_winograd_is_accurate_in_float32():
    """At the standard width. The textbook's interpolation points 0, ±1, ±2 would exceed this bound."""
    exact = operands(128, 128, 1, (16, 16))
    found = by_the_form(Winograd(128, 128, (16, 16)), *(each.float() for each in exact))
    assert max(errors(found, by_the_library(*exact, 1))) < 2e-6


def test_direct_in_half_precision():
    """Rounds to bfloat16's eight bits, and returns the input's type."""
    given = operands(8, 8, 1, (8, 8), torch.float32)
    found = by_the_form(Direct(8, 8, 1, torch.bfloat16), *given)
    assert {each.dtype for each in found} == {torch.float32}
    assert all(1e-4 < error < 1e-2 for error in errors(found, by_the_library(*given, 1)))


@pytest.mark.parametrize("size", [(6, 8), (8, 30)])
def test_winograd_refuses_maps_it_cannot_tile(size):
    with pytest.raises(AssertionError):
        Winograd(4, 4, size)
