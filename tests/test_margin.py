import math

import pytest
import torch

from losses.margins import ArcFaceMargin, arcface_margin

GRID = torch.linspace(-0.999, 0.999, 1001, dtype=torch.float64)


@pytest.mark.parametrize("easy", [True, False])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 1.2])
def test_value_and_slope_match_the_definition(margin, easy):
    cosine = GRID.clone().requires_grad_()
    theta = cosine.acos()
    inside = cosine > 0 if easy else theta < math.pi - margin
    expected = torch.where(inside, (theta + margin).cos(), cosine if easy else cosine - margin * math.sin(margin))
    (slope,) = torch.autograd.grad(expected.sum(), cosine)
    phi, got_slope = arcface_margin(GRID, margin, easy)
    torch.testing.assert_close(phi, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_slope, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("easy", [True, False])
def test_finite_at_and_slightly_outside_one(dtype, easy):
    eps = torch.finfo(dtype).eps
    cosine = torch.tensor([1.0, -1.0, 1 + eps, -1 - eps, 1 - eps, 0.0], dtype=dtype)
    phi, slope = arcface_margin(cosine, 0.5, easy)
    assert phi.isfinite().all() and slope.isfinite().all()
    assert phi[0].item() == pytest.approx(math.cos(0.5), abs=1e-3)


def test_nan_stays_nan():
    phi, _ = arcface_margin(torch.tensor([float("nan")]), 0.5, True)
    assert phi.isnan().all()


def test_autograd_form_is_the_slope():
    cosine = GRID.clone().requires_grad_()
    phi = ArcFaceMargin.apply(cosine, 0.5, False)
    (phi * 3).sum().backward()
    torch.testing.assert_close(cosine.grad, 3 * arcface_margin(GRID, 0.5, False)[1])
