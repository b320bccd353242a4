"""BatchNorm over all ranks: the CPU's form, and the GPU's with its kernels written in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.batch_norm import kernels_everywhere
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_backbone
from models.sync_batchnorm import SyncBatchNorm, _KernelsOverRanks, convert_sync_batchnorm

CHANNELS, PER_RANK = 5, 4
CASES = {  # shape of an image, affine, NHWC, whether the input needs a gradient
    "vectors": ((), True, False, True), "vectors, no gain": ((), False, False, True),
    "maps": ((3, 3), True, False, True), "channels last": ((3, 3), True, True, True),
    "frozen stem": ((3, 3), True, False, False),
}


@contextlib.contextmanager
def as_on_a_gpu():
    with kernels_everywhere(), mock.patch.object(SyncBatchNorm, "_forward_on_cpu", SyncBatchNorm._forward_on_gpu):
        yield


def error_against_whole_batch(rank: int, world_size: int, on_gpu: bool) -> dict[str, float]:
    """The largest difference of outputs, gradients and statistics to torch's BatchNorm of the whole batch, by case."""
    errors = {}
    for name, (shape, affine, channels_last, needs_grad) in CASES.items():
        torch.manual_seed(0)
        images = 3 + 2 * torch.randn(PER_RANK * world_size, CHANNELS, *shape, dtype=torch.float64)
        slopes = torch.randn_like(images)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        plain = (nn.BatchNorm2d if shape else nn.BatchNorm1d)(CHANNELS, affine=affine).double()
        if affine:
            nn.init.normal_(plain.weight)
            nn.init.normal_(plain.bias)
        (synced,) = convert_sync_batchnorm(nn.Sequential(copy.deepcopy(plain)))
        results = []
        for module, x, slope in ((plain, images, slopes),
                                 (synced, images.chunk(world_size)[rank], slopes.chunk(world_size)[rank])):
            x = x.detach().clone().requires_grad_(needs_grad)
            with as_on_a_gpu() if on_gpu and module is synced else contextlib.nullcontext():
                for _ in range(2):  # running statistics, gradients add up
                    y = module(x)
                    if y.requires_grad:
                        (y * slope).sum().backward()
            results.append([y, x.grad, [p.grad for p in module.parameters()], list(module.buffers())])
        true, own = results
        for gradient in own[2]:
            dist.all_reduce(gradient)
        pairs = [(own[0], true[0].chunk(world_size)[rank]), *zip(own[2], true[2]), *zip(own[3], true[3])]
        if needs_grad:
            pairs.append((own[1], true[1].chunk(world_size)[rank]))
        errors[name] = max(float((mine - other).abs().max()) for mine, other in pairs)
    return errors


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_batch_norm_of_the_whole_batch_in_float64(pools, world_size):
    for on_gpu in (False, True):
        for errors in pools(world_size).run(error_against_whole_batch, on_gpu):
            assert errors.keys() == CASES.keys() and max(errors.values()) < 1e-12, errors


def error_of_half(rank: int, world_size: int) -> list[float]:
    """The largest error of output and gradient in bf16 and fp16, relative to the largest value."""
    torch.manual_seed(0)
    images = 300 + 100 * torch.randn(8, 4, 5, 5)
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        plain = nn.BatchNorm2d(4).double()
        (synced,) = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
        whole = images.to(dtype).double().requires_grad_()
        own = images.to(dtype).chunk(world_size)[rank].requires_grad_()
        with as_on_a_gpu():
            out, true = synced(own), plain(whole)
            slope = torch.randn_like(true)
            (out * slope.chunk(world_size)[rank].to(dtype)).sum().backward()
            (true * slope).sum().backward()
        assert out.dtype == own.grad.dtype == dtype and synced.weight.grad.dtype == torch.float32
        found += [float((mine - other.chunk(world_size)[rank]).abs().max() / other.abs().max())
                  for mine, other in ((out, true), (own.grad, whole.grad))]
    return found


def test_statistics_of_half_precision_are_float32(pools):
    for errors in pools(2).run(error_of_half):
        assert max(errors) < 0.01


class Recorder(TorchDispatchMode):
    """Counts operators, and fails at those that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "index", "is_nonzero"), name
        out = func(*args, **kwargs or {})
        assert name != "_to_copy" or out.device.type == "cuda", "a copy to the host"
        return out


@pytest.fixture
def fake_gpus():
    """Four processes with fake GPUs, of which this is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    with (kernels_everywhere(), FakeTensorMode(),
          mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True)):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("arch", ["mobilefacenet", "iresnet50"])
def test_no_layer_waits_for_the_gpu(fake_gpus, arch, dtype):
    """One all-gather in each layer's forward pass; the backward pass is that of a layer below."""
    with torch.device("cuda"):
        backbone = convert_sync_batchnorm(build_backbone(arch, 64))
    layers = [module for module in backbone.modules() if isinstance(module, SyncBatchNorm)]
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out, type(out.grad_fn).__name__)))
    seen: list = []
    with Recorder() as recorder, torch.autocast("cuda", dtype, enabled=dtype is not None):
        backbone(torch.empty(8, 3, 112, 112, device="cuda"))
    assert len(seen) == len(layers) == recorder.calls["batch_norm_elemt"]
    assert sum(count for name, count in recorder.calls.items() if "allgather" in name) == len(layers)
    for x, out, made_by in seen:
        assert (out.device, out.dtype, out.shape) == (x.device, x.dtype, x.shape) and out.device.type == "cuda"
        assert made_by == "_KernelsOverRanksBackward"
    assert dtype is None or seen[0][1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_does_not_wait_for_the_gpu(fake_gpus, dtype):
    """Called by itself: without a GPU, torch's autograd engine does not run on CUDA tensors."""
    x, grad = (torch.empty(8, 4, 6, 6, device="cuda", dtype=dtype) for _ in range(2))
    weight, mean, inverse_std = torch.empty(3, 4, device="cuda").unbind()
    context = mock.Mock(saved_tensors=(x, weight, mean, inverse_std), needs_input_grad=(True, True, False))
    with Recorder() as recorder, torch.no_grad():
        grad_x, grad_weight, grad_bias, *others = _KernelsOverRanks.backward(context, grad)
    assert grad_bias is None and others == [None] * 4 and recorder.calls["allreduce_"] == 1
    assert (grad_x.dtype, grad_x.device, grad_x.shape) == (dtype, x.device, x.shape)
    assert (grad_weight.dtype, grad_weight.device) == (torch.float32, x.device)
