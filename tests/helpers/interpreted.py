"""Run with TRITON_INTERPRET=1 by tests/test_triton.py: the kernels by Triton's interpreter against plain float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.margins import TRUTH, true_gradients
from losses.class_major import margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS

# Allowed relative errors, by norm: loss; gradients. Rounded operands are also held to today's walk.
TOLERANCES = {None: (1e-6, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-3, 3e-3)}


def check(name: str, kind: torch.dtype | None, chunk: int | None, saved: float, filter_above: float | None,
          drawn: torch.Tensor | None = None, scale: float = 24.0) -> None:
    """70 rows and 300 classes: more than one tile of each, and no whole number of tiles; 40 values, no power of 2."""
    generator = torch.Generator().manual_seed(1)
    centers, label = torch.randn(300, 40, generator=generator), torch.randint(300, (70,), generator=generator)
    embedding = F.normalize(F.normalize(centers[label]) + 0.3 * torch.randn(70, 40, generator=generator))
    margin, settings = MARGINS[name](), dict(statistics=TRUTH[name].statistics and dict(t=0.3))
    if name == "curricularface":
        margin.t.fill_(0.3)
    results = []
    for walk, more in ((margin_softmax_class_major, dict(triton=True)), (margin_softmax, {})):
        x, w = embedding.clone().requires_grad_(), centers.clone().requires_grad_()
        loss, closer = walk(x, label, w, margin, scale=scale, group=None, matmul_dtype=kind, chunk=chunk,
                            saved_probs_mib=saved, filter_above=filter_above, drawn=drawn, **more)
        loss.backward()
        results.append([loss.detach(), x.grad, w.grad.to_dense(), closer])
    mine, today = results
    what = f"{name}, {kind}, chunk {chunk}, saved {saved}, filter {filter_above}, sampled {drawn is not None}"
    assert torch.equal(mine[3], today[3]), what
    for number in range(3):
        error = (mine[number] - today[number]).norm() / today[number].norm()
        # Both round, and not all values alike.
        assert error <= TOLERANCES[kind][number > 0], f"{what}, {number}: {error:.1e} from today's walk"
    if filter_above is None and drawn is None and kind is None:
        phi, negatives, penalty = TRUTH[name].parts(**(settings["statistics"] or {}))
        loss, grads, closer = true_gradients([embedding.double(), centers.double(), None], label, scale, phi, negatives,
                                             penalty)
        assert torch.equal(mine[3], closer), what
        for true, got in zip([loss, *grads], mine):
            assert (got - true).norm() <= 1e-5 * true.norm(), what


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
