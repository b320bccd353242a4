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

from utils.training.guard import StepGuard
from utils.training.optim import Optimizers, RowAdamW, RowSGD
from utils.training.scaler import SharedGradScaler
from utils.training.zero import assign_owners

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
        for name in ("broadcast", "all_reduce", "all_gather", "batch_isend_irecv", "broadcast_object_list"):
            wrapped = stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            stack.callback(lambda name=name, wrapped=wrapped: found.update({name: wrapped.call_count}))
        yield found


def make_model(layers: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(layers)))
    return model.double().to(memory_format=torch.channels_last)


def set_gradients(model: nn.Module, step: int) -> None:
    """In the layout of the parameters, as autograd makes them: torch's fused steps need it."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def values_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def train_with_zero(rank: int, world_size: int, layers: int, optimizer: str, skip: bool, saved):
    """Weights after three steps, or two more from `saved`, the state, and the calls of a step and of `state`."""
    model, first = make_model(layers), 0
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
        set_gradients(model, step)
        optimizers.set_learning_rate(0.1 / (1 + step))
        with counted_calls() as in_step:
            SharedGradScaler("cpu", enabled=False).step_all(optimizers.all, torch.zeros(()) if skip else None)
    with counted_calls() as in_state:
        state = optimizers.state()
    return values_of(model), state, dict(+in_step), dict(+in_state)


def true_weights(layers: int, optimizer: str, steps: int) -> list[torch.Tensor]:
    """With torch's optimizer alone."""
    model = make_model(layers)
    norms = [p for layer in model for p in layer[1].parameters()]
    others = [p for layer in model for p in layer[0].parameters()]
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    true = make([{"params": others}, {"params": norms, "weight_decay": 0.0}], **SETTINGS[optimizer])
    for step in range(steps):
        set_gradients(model, step)
        for group in true.param_groups:
            group["lr"] = 0.1 / (1 + step)
        true.step()
    return values_of(model)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("optimizer", SETTINGS)
def test_equals_torch_in_one_process_with_a_broadcast_for_each_owner(pools, world_size, optimizer):
    """Saved at one number of processes, and continued at another. Layers of 4 parameters: 5, and 0.5 for 3 ranks."""
    for layers, skip in ((5, False), (5, True), (1, False)):
        outcomes = pools(world_size).run(train_with_zero, layers, optimizer, skip, None)
        for weights, _, in_step, _ in outcomes:
            torch.testing.assert_close(weights, true_weights(layers, optimizer, 3), rtol=1e-12, atol=1e-12)
            assert sum(in_step.values()) == in_step.get("broadcast", 0) == (world_size if world_size > 1 else 0)
        state = outcomes[0][1]
        assert all(not others for _, others, _, _ in outcomes[1:])
        assert state.keys() == dict(make_model(layers).named_parameters()).keys()
        assert all(values.keys() == STATES[optimizer] for values in state.values())
        dtypes = 2 if optimizer == "adamw" else 1  # the counters are float32
        assert [in_state for *_, in_state in outcomes] == [
            {} if world_size == 1 else {"batch_isend_irecv": dtypes * (world_size - 1 if rank == 0 else 1)}
            for rank in range(world_size)]
        continued = pools(world_size % 3 + 1).run(train_with_zero, layers, optimizer, skip, (outcomes[0][0], state))
        for weights, *_ in continued:
            torch.testing.assert_close(weights, true_weights(layers, optimizer, 5), rtol=1e-12, atol=1e-12)


def more_ranks_than_parameters(rank: int, world_size: int) -> list[list[float]]:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizers = Optimizers(model, "sgd", {"lr": 0.5, "momentum": 0.9}, zero=True)
    model.weight.grad = torch.ones(1, 2)
    optimizers.all[0].step()
    state = optimizers.state()
    momentum = [values["momentum_buffer"].flatten().tolist() for values in state.values()]
    return [model.weight.flatten().tolist(), *momentum]


def test_ranks_without_parameters(pools):
    assert pools(3).run(more_ranks_than_parameters) == [[[0.5, 0.5], [1.0, 1.0]], [[0.5, 0.5]], [[0.5, 0.5]]]


def test_owners_are_balanced():
    assert assign_owners([1000, 300, 200], 2) == [0, 1, 1]
    assert assign_owners([1, 1, 5, 1, 1, 1], 2) == [1, 1, 0, 1, 1, 1]
    assert assign_owners([7], 3) == [0] and assign_owners([], 3) == []


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
    assert counting.found["broadcast_"] == (4 if zero else 0)


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
