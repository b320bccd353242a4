"""Values that ranks exchange, and the facts on which they must agree."""

from __future__ import annotations

import pytest
import torch

from utils.dist.collectives import all_gather_json, require_same_on_all_ranks
from utils.dist.context import DistContext
from utils.errors import UserError


def gather(rank: int, world_size: int) -> list:
    return all_gather_json({"rank": rank, "text": "é" * 1000 * rank, "pair": (1, None)}, torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_every_value_in_rank_order(pools, world_size):
    expected = [{"rank": rank, "text": "é" * 1000 * rank, "pair": [1, None]} for rank in range(world_size)]
    assert pools(world_size).run(gather) == [expected] * world_size


def compare(rank: int, world_size: int, facts: list[dict]) -> str:
    try:
        require_same_on_all_ranks(DistContext(rank, world_size, 1, torch.device("cpu")), facts[rank])
    except UserError as error:
        return str(error)
    return ""


def test_the_first_difference_is_named_on_all_ranks(pools):
    same = {"--seed": 1, "pairs": {"lfw": (6000, 7)}}
    assert pools(3).run(compare, [same] * 3) == [""] * 3
    for message in pools(3).run(compare, [same, same, {**same, "--seed": 2}]):
        assert "--seed is 2 on rank 2 and 1 on rank 0" in message
