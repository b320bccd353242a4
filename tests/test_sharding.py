"""Which classes a rank owns, and that the initial class centers do not depend on it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchshard

from models import classifier
from models.classifier import CENTER_BLOCK, initial_centers
from utils.dist.sharding import ClassShard, init_model_parallel


@pytest.mark.parametrize("num_classes", [1, 2, 5, 8, 13, 85744])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_shards_are_torch_chunks(num_classes, world_size):
    sizes = [len(chunk) for chunk in torch.empty(num_classes, 0).chunk(world_size)]
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    assert [shard.size for shard in shards] == sizes + [0] * (world_size - len(sizes))
    assert shards[0].start == 0 and shards[-1].stop == num_classes
    assert all(left.stop == right.start for left, right in zip(shards, shards[1:]))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_initial_centers_do_not_depend_on_world_size(world_size):
    num_classes = 2 * CENTER_BLOCK + 77
    whole = initial_centers(ClassShard(num_classes, 0, 1), 8, seed=3)
    parts = [initial_centers(ClassShard(num_classes, rank, world_size), 8, seed=3) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(num_classes))


def test_initial_centers_differ_by_class_block_and_seed():
    centers = initial_centers(ClassShard(2 * CENTER_BLOCK, 0, 1), 8, seed=3)
    assert len(torch.unique(centers, dim=0)) == 2 * CENTER_BLOCK
    other = initial_centers(ClassShard(2 * CENTER_BLOCK, 0, 1), 8, seed=4)
    assert not (centers == other).all(dim=1).any()
    # Seeds that agree in their low 32 bits differ too.
    far = initial_centers(ClassShard(10, 0, 1), 8, seed=3 + 2**32)
    assert not torch.equal(far, centers[:10])


def test_an_empty_shard_has_no_rows():
    assert initial_centers(ClassShard(5, 3, 4), 8, seed=0).shape == (0, 8)


def test_a_rank_draws_only_its_own_blocks(monkeypatch):
    """With 100 million classes a rank must not draw the whole matrix."""
    drawn = []
    philox = classifier.np.random.Philox
    monkeypatch.setattr(classifier.np.random, "Philox", lambda key: drawn.append(int(key[1])) or philox(key=key))
    initial_centers(ClassShard(64 * CENTER_BLOCK, 10, 64), 4, seed=0)
    assert drawn == [10]


def groups_made(rank: int, world_size: int) -> int:
    with mock.patch.object(dist, "new_group") as made:
        assert init_model_parallel(world_size) is dist.group.WORLD is torchshard.distributed.get_group()
    assert torchshard.distributed.get_group_size() == torchshard.distributed.get_world_size() == world_size
    return made.call_count


def test_torchshards_group_is_the_runs_own(pools):
    """Another NCCL communicator of the same ranks would take several hundred MiB of each GPU."""
    assert pools(2).run(groups_made) == [0, 0]
