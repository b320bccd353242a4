"""Run with TRITON_INTERPRET=1 by tests/test_triton.py: the kernels by Triton's interpreter against plain float64."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from helpers.margins import TRUTH, true_gradients
from losses.class_major import margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS, ArcFace
from losses.triton_kernels import Projection
from utils.training.optim import RowAdamW, RowOptimizer, RowSGD
from utils.training.zero import make_state

# Allowed relative errors, by norm: loss; gradients. Rounded operands are also held to today's walk.
TOLERANCES = {None: (1e-6, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-3, 3e-3)}


def check(name: str, kind: torch.dtype | None, chunk: int | None, saved: float, filter_above: float | None,
          drawn: torch.Tensor | None = None, scale: float = 24.0, sub_centers: int = 1) -> None:
    """70 rows and 300 classes: more than one tile of each, and no whole number of tiles; 40 values, no power of 2."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(300, 40, generator=generator)
    label = torch.randint(300 // sub_centers, (70,), generator=generator)
    embedding = F.normalize(F.normalize(centers[label * sub_centers]) + 0.3 * torch.randn(70, 40, generator=generator))
    margin, settings = MARGINS[name](), dict(statistics=TRUTH[name].statistics and dict(t=0.3))
    if name == "curricularface":
        margin.t.fill_(0.3)
    results = []
    for walk, more in ((margin_softmax_class_major, dict(triton=True)), (margin_softmax, {})):
        x, w = embedding.clone().requires_grad_(), centers.clone().requires_grad_()
        loss, closer = walk(x, label, w, margin, scale=scale, group=None, matmul_dtype=kind, chunk=chunk,
                            saved_probs_mib=saved, filter_above=filter_above, drawn=drawn,
                            sub_centers=sub_centers, **more)
        loss.backward()
        results.append([loss.detach(), x.grad, w.grad.to_dense(), closer])
    mine, today = results
    what = f"{name}, {kind}, chunk {chunk}, saved {saved}, filter {filter_above}, sampled {drawn is not None}, " \
        f"sub-centers {sub_centers}"
    assert torch.equal(mine[3], today[3]), what
    for number in range(3):
        error = (mine[number] - today[number]).norm() / today[number].norm()
        # Both round, and not all values alike.
        assert error <= TOLERANCES[kind][number > 0], f"{what}, {number}: {error:.1e} from today's walk"
    if filter_above is None and drawn is None and kind is None and sub_centers == 1:
        phi, negatives, penalty = TRUTH[name].parts(**(settings["statistics"] or {}))
        loss, grads, closer = true_gradients([embedding.double(), centers.double(), None], label, scale, phi, negatives,
                                             penalty)
        assert torch.equal(mine[3], closer), what
        for true, got in zip([loss, *grads], mine):
            assert (got - true).norm() <= 1e-5 * true.norm(), what


def check_sgd(classes: int, d: int) -> None:
    """The kernel that projects and steps, against the equations in float64: masked and not, with momentum and without.

    The classes are in the middle of a matrix whose other rows must stay.
    """
    generator = torch.Generator().manual_seed(2)
    grad, weight, buffer = torch.randn(3, classes + 2, d, generator=generator)
    here, unit, scale, lr, decay = slice(1, classes + 1), torch.tensor(0.3), 24.0, 0.5, 0.2
    factor = scale / weight[here].norm(dim=1)
    for momentum, finite in itertools.product((0.0, 0.9), (None, True, False)):
        what = f"{classes} classes, d {d}, momentum {momentum}, finite {finite}"
        w, m = weight.clone(), buffer.clone()
        g = grad[here].clone() if finite is not False else torch.full((classes, d), float("nan"))
        before = g.clone()
        Projection(factor, unit, scale).sgd(g, w[here], m[here] if momentum else None,
                                            None if finite is None else torch.tensor(finite), lr=lr,
                                            momentum=momentum, weight_decay=decay)
        true_w, true_m = weight.double(), buffer.double()
        if finite is not False:
            of_unit = grad[here].double() * scale / true_w[here].norm(dim=1, keepdim=True) * unit.double()
            direction = F.normalize(true_w[here])
            step = of_unit - direction * (of_unit * direction).sum(dim=1, keepdim=True) + decay * true_w[here]
            if momentum:
                step = true_m[here] = momentum * true_m[here] + step
            true_w[here] -= lr * step
        for got, true, old in ((w, true_w, weight), (m, true_m, buffer)):
            assert (got - true).abs().max() <= 2e-6, what
            same = [0, -1] if finite is not False else slice(None)
            assert torch.equal(got[same], old[same]), what
        assert torch.equal(g.nan_to_num(7), before.nan_to_num(7)), what
        if not momentum:
            assert torch.equal(m, buffer), what


def check_update(kind: type[RowOptimizer], sampled: bool, **settings: float) -> None:
    """A step that is skipped and one that is not, by an optimizer, equal to those of the form without kernels."""
    generator = torch.Generator().manual_seed(3)
    centers, label = torch.randn(75, 40, generator=generator), torch.randint(75, (20,), generator=generator)
    embeddings = F.normalize(torch.randn(2, 20, 40, generator=generator), dim=2)
    embeddings[0] *= float("nan")
    drawn = torch.arange(0, 75, 3) if sampled else None
    results = []
    for triton in (True, False):
        weight = nn.Parameter(centers.clone())
        optimizer = kind(weight, skip_nonfinite=True, **settings)
        make_state(optimizer)
        state = [weight.detach(), *(value for value in optimizer.state[weight].values() if value.ndim)]
        results.append([[value.clone() for value in state]])
        for x in embeddings:
            loss, _ = margin_softmax_class_major(x, label, weight, ArcFace(), scale=24.0, group=None, drawn=drawn,
                                                 chunk=30, update=optimizer.update_rows, triton=triton)
            loss.backward()
            results[-1].append([value.clone() for value in state])
    what = f"{kind.__name__}, sampled {sampled}, {settings}"
    for first, second, third in results:
        assert all(torch.equal(a, b) for a, b in zip(first, second)), what
        assert not any(torch.equal(a, b) for a, b in zip(second, third)), what
    for mine, eager in zip(*results):
        for a, b in zip(mine, eager):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), what


if __name__ == "__main__":
    bf16, fp16 = torch.bfloat16, torch.float16
    check("arcface", None, 150, 0, None)
    check("curricularface", None, 150, 1e9, None)
    check("curricularface", None, 150, 70 * 150 * 4 / 2**20, None, scale=64)  # beyond one shift
    check("mv-softmax", None, None, 0, None)
    check("arcface", None, 90, 0, 0.1, torch.arange(0, 300, 3))
    check("mv-softmax", bf16, 150, 1e9, 0.1)
    check("curricularface", bf16, None, 0, None)
    check("curricularface", bf16, 150, 1e9, 0.1, torch.arange(0, 300, 3), scale=64)
    check("arcface", bf16, 150, 70 * 150 * 2 / 2**20, None, torch.arange(0, 300, 3))
    check("curricularface", fp16, 150, 0, 0.1)
    check("arcface", None, 150, 0, None, sub_centers=3)
    check("arcface", None, 150, 0, None, scale=70.0)  # the shift is not 0
    check_sgd(70, 40)
    check_sgd(3, 600)
    check_update(RowSGD, False, lr=0.5, momentum=0.9, weight_decay=0.1)
    check_update(RowSGD, True, lr=0.5)
    check_update(RowSGD, False, lr=0.5, momentum=0.9, nesterov=True)
    check_update(RowAdamW, False, lr=0.01)
