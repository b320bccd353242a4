"""ZeRO of the replicated parameters: values, state and the number of collectives. And steps on fake CUDA tensors."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from utils.training import zero
from utils.training.guard import StepGuard
from utils.training.optim import Optimizers, RowAdamW, RowSGD
from utils.training.scaler import SharedGradScaler

SETTINGS = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "adamw": {"lr": 0.1, "weight_decay": 0.1}}
STATES = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        if func.overloadpacket.__name__ == "_fused_sgd_":  # torch has no form of it for fake tensors
            return None
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """The collectives of torch.distributed that are called."""
    found: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for module, name in ((dist, "broadcast"), (dist, "all_reduce"), (dist, "all_gather"), (dist, "reduce"),
                             (dist, "batch_isend_irecv"), (dist, "broadcast_object_list"), (zero, "all_gather_rows")):
            wrapped = stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            stack.callback(lambda name=name, wrapped=wrapped: found.update({name: wrapped.call_count}))
        yield found


LAYERS = 5


def make_model() -> nn.Module:
    """In vectors that 2 or 3 ranks cut within a convolution's weight, which is stored in NHWC: of two dtypes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "backbone": nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)) for _ in range(LAYERS))),
        "head": nn.Linear(7, 33)}).to(memory_format=torch.channels_last)
    model["backbone"][3].double()
    return model


def set_gradients(model: nn.Module, step: int, *, other_layout: bool) -> None:
    """Random ones, but in each step a layer has none. In the parameters' layout as torch's fused steps need it, or in
    another one."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient.to(parameter.dtype) if other_layout and parameter.dim() == 4
                          else torch.empty_like(parameter).copy_(gradient))
        if name.startswith(f"backbone.{step % LAYERS}."):
            parameter.grad = None


def values_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def is_masked(step: int, skip: bool) -> bool:
    return skip and step == 1


def train_with_zero(rank: int, world_size: int, optimizer: str, skip: bool, saved):
    """Weights after three steps, or two more from `saved`, the state, and the calls of a step and of `state`."""
    model, first = make_model(), 0
    if saved is not None:
        first = 3
        for parameter, value in zip(model.parameters(), saved[0]):
            parameter.data.copy_(value)
    optimizers = Optimizers(model, optimizer, SETTINGS[optimizer], zero=True, skippable=skip, no_decay=["norm"],
                            backbone_lr_scale=0.5)
    if saved is not None:
        optimizers.drop_state()
        optimizers.load_state(saved[1])
    for step in range(first, 5 if saved is not None else 3):
        set_gradients(model, step, other_layout=True)
        optimizers.set_learning_rate(0.1 / (1 + step))
        mask = torch.tensor(float(is_masked(step, skip))) if skip else None
        with counted_calls() as in_step:
            SharedGradScaler("cpu", enabled=False).step_all(optimizers.all, mask)
    assert all(piece.grad is None for group in optimizers.all[0].optim.param_groups for piece in group["params"])
    with counted_calls() as in_state:
        state = optimizers.state()
    return values_of(model), state, dict(+in_step), dict(+in_state), bytes_of_state(optimizers)


def bytes_of_state(optimizers: Optimizers) -> int:
    return sum(value.untyped_storage().nbytes() for state in optimizers.all[0].optim.state.values()
               for value in state.values() if value.dim())


def truth(optimizer: str, skip: bool, steps: int) -> tuple[list[torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """The weights and the state, with torch's optimizer alone."""
    model = make_model()
    groups = {
        "convolutions": {"params": [p for layer in model["backbone"] for p in layer[0].parameters()]},
        "norms": {"params": [p for layer in model["backbone"] for p in layer[1].parameters()], "weight_decay": 0.0},
        "head": {"params": list(model["head"].parameters())}}
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    true = make(list(groups.values()), **SETTINGS[optimizer], fused=skip)
    if optimizer == "sgd":  # fused SGD cannot begin with a parameter later than with others
        true.state.update({parameter: {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
                           for parameter in model.parameters()})
    for step in range(steps):
        set_gradients(model, step, other_layout=False)
        for name, group in zip(groups, true.param_groups):
            group["lr"] = 0.1 / (1 + step) * (1.0 if name == "head" else 0.5)
        if not is_masked(step, skip):
            true.step()
    return values_of(model), {name: true.state[parameter] for name, parameter in model.named_parameters()}


def assert_same(found, expected) -> None:
    """To the bit, with the same strides."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("skip", [False, True])
def test_equals_torch_in_one_process_to_the_bit(pools, world_size, optimizer, skip):
    """With an all-gather for each dtype; saved at one number of processes, and continued at another."""
    outcomes = pools(world_size).run(train_with_zero, optimizer, skip, None)
    weights, state = truth(optimizer, skip, 3)
    for found, _, in_step, *_ in outcomes:
        assert_same(found, weights)
        assert in_step == ({"all_gather_rows": 2} if world_size > 1 else {})
    assert_same(outcomes[0][1], state)
    assert all(not others for _, others, *_ in outcomes[1:])
    sent = [in_state.get("batch_isend_irecv", 0) for *_, in_state, _ in outcomes]
    assert sent[0] == sum(sent[1:]) and all(0 < count <= 2 for count in sent[1:])
    assert all(in_state.keys() <= {"batch_isend_irecv"} for *_, in_state, _ in outcomes)
    held, values = [held for *_, held in outcomes], sum(value.nbytes for value in weights)
    assert sum(held) == values * (2 if optimizer == "adamw" else 1)
    continued = pools(world_size % 3 + 1).run(train_with_zero, optimizer, skip, (outcomes[0][0], outcomes[0][1]))
    for found, *_ in continued:
        assert_same(found, truth(optimizer, skip, 5)[0])
    assert sum(held for *_, held in continued) == values * (2 if optimizer == "adamw" else 1)


def one_parameter(rank: int, world_size: int, values: int) -> tuple[list[float], list[float], int]:
    model = nn.Linear(values, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizers = Optimizers(model, "sgd", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}, zero=True)
    optimizers.all[0].param_groups[0]["weight_decay"] = 0.0
    model.weight.grad = torch.ones(1, values)
    optimizers.all[0].step()
    momentum = [value for state in optimizers.state().values() for value in state["momentum_buffer"].flatten().tolist()]
    optimizers.load_state({})
    assert not any(value.any() for state in optimizers.state().values() for value in state.values())
    return model.weight.flatten().tolist(), momentum, bytes_of_state(optimizers)


def test_a_large_parameter_is_shared_and_a_small_one_leaves_ranks_without(pools):
    for values, held in ((3 * 320, [1280] * 3), (2, [8, 0, 0])):
        weights, momentum, own = zip(*pools(3).run(one_parameter, values))
        assert weights == ([0.5] * values,) * 3 and momentum == ([1.0] * values, [], []) and list(own) == held


def test_gradients_that_the_step_itself_unscales():
    weight = nn.Parameter(torch.ones(3))
    with mock.patch.multiple(dist, get_rank=lambda: 0, get_world_size=lambda: 1):
        optimizer = zero.ZeroOptimizer([{"params": [weight]}], torch.optim.SGD, lr=0.5, fused=True)
    weight.grad, optimizer.grad_scale = torch.ones(3), torch.tensor(2.0)
    optimizer.step()
    assert weight.tolist() == [0.75] * 3


def test_a_parameter_with_gaps_is_an_error():
    with mock.patch.multiple(dist, get_rank=lambda: 0, get_world_size=lambda: 2), pytest.raises(RuntimeError):
        zero.ZeroOptimizer([{"params": [nn.Parameter(torch.ones(4, 4)[:, :2])]}], torch.optim.SGD, **SETTINGS["sgd"])


# ---------------------------------------------------------------------------------------------------------------------
# Steps on fake CUDA tensors, and operators


@pytest.fixture
def two_fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("zero", [False, True])
def test_fp16_does_not_wait_for_a_gpu(two_fake_ranks, optimizer, zero):
    """A fake tensor has no value: reading one, as the scaler does for optimizers that are not fused, is an error."""
    with (mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)), FakeTensorMode(),
          torch.device("cuda")):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
        optimizers = Optimizers(model, optimizer, SETTINGS[optimizer], zero=zero)
        scaler = SharedGradScaler("cpu", enabled=True)  # torch switches that of "cuda" off without a GPU
        with Counting() as counting:
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                scaler.scale(torch.ones(()))
                scaler.step_all(optimizers.all)
    assert counting.found["_local_scalar_dense"] == 0
    assert counting.found["_fused_sgd_"] + counting.found["_fused_adamw_"] == 2
    assert counting.found["_allgather_base_"] == (2 if zero else 0)


@pytest.mark.parametrize("zero", [False, True])
def test_state_is_there_before_the_first_backward_pass(two_fake_ranks, zero):
    model = nn.Linear(4, 4)
    for optimizer, names in STATES.items():
        optimizers = Optimizers(model, optimizer, SETTINGS[optimizer], zero=zero)
        inner = getattr(optimizers.all[0], "optim", optimizers.all[0])
        assert inner.state and all(values.keys() == names for values in inner.state.values())
        assert all(not value.any() for values in inner.state.values() for value in values.values())


def test_a_roll_back_copies_all_buffers_together():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20)))
    guard = StepGuard(model, skip=True)
    before = [buffer.clone() for buffer in model.buffers()]
    for nonfinite in (1.0, 0.0):
        guard.snapshot()
        model(torch.full((4, 3), float("nan")))
        after = [buffer.clone() for buffer in model.buffers()]
        with Counting() as counting:
            guard.rollback(torch.tensor(nonfinite))
        expected = before if nonfinite else after
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(model.buffers(), expected))
        assert counting.found["copy_"] == 0 and counting.found["_foreach_copy_"] == counting.found["where"] == 2


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
def test_a_row_update_that_may_be_skipped_copies_no_rows(kind):
    weight = nn.Parameter(torch.ones(50, 4))
    optimizer = kind(weight, skip_nonfinite=True, **SETTINGS["sgd" if kind is RowSGD else "adamw"])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("clone", "copy_", "where", "_to_copy"):
                sizes.append(result.numel())
            return result

    optimizer.update_rows(slice(0, 10), torch.ones(10, 4), torch.tensor(True))
    with Sizes():
        optimizer.update_rows(slice(10, 50), torch.ones(40, 4), torch.tensor(True))
    assert max(sizes, default=0) <= 1  # AdamW's counter
