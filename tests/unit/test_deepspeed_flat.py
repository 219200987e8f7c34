"""The arithmetic of flat groups, partitions and buckets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sim.parallel.frameworks.flat import (
    flat_group,
    fullest_rank,
    owned,
    partition_elements,
    slices,
    sub_groups,
)

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=20)
DP = st.integers(1, 8)


def test_a_flat_group_is_aligned_to_twice_the_ranks() -> None:
    assert flat_group(3_545_750, 4) == 3_545_752  # measured: two more elements
    assert flat_group(3_716_608, 4) == 3_716_608


def test_a_parameter_is_padded_to_the_ranks() -> None:
    # measured with sizes that do not divide: 250 becomes 252, 750 becomes 752
    assert partition_elements(250, 4) * 4 == 252
    assert partition_elements(750, 4) * 4 == 752


@given(SIZES, DP)
def test_every_gradient_belongs_to_the_ranks_whose_partitions_it_touches(sizes: list[int], dp: int) -> None:
    partition = flat_group(sum(sizes), dp) // dp
    touched: set[int] = set()
    for rank in range(dp):
        mine, whole = owned(sizes, partition, rank)
        assert whole == sum(sizes[i] for i in mine)
        inside = sum(
            min((rank + 1) * partition, sum(sizes[: i + 1])) - max(rank * partition, sum(sizes[:i])) for i in mine
        )
        # the partition is filled by its slices, but for the padding at the end of the group
        assert inside == max(0, min(partition, sum(sizes) - rank * partition))
        touched.update(mine)
    assert touched == set(range(len(sizes)))


@given(SIZES, DP)
def test_the_fullest_rank_holds_most(sizes: list[int], dp: int) -> None:
    partition = flat_group(sum(sizes), dp) // dp
    wholes = [owned(sizes, partition, rank)[1] for rank in range(dp)]
    assert fullest_rank(sizes, partition, dp) == wholes.index(max(wholes))


@given(SIZES, DP, st.booleans())
def test_slices_of_a_bucket_are_all_of_it(sizes: list[int], dp: int, merge: bool) -> None:
    partition = flat_group(sum(sizes), dp) // dp
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    bucket = list(zip(offsets, sizes, strict=True))[::-1]
    runs = slices(bucket, partition, merge)
    assert sum(count for _, count in runs) == sum(sizes)
    for rank in range(dp):
        mine = max(0, min((rank + 1) * partition, sum(sizes)) - rank * partition)
        assert sum(count for owner, count in runs if owner == rank) == mine
    if merge:
        assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))


@given(SIZES, st.integers(1, 200))
def test_sub_groups_are_all_parameters_in_order_and_close_when_full(sizes: list[int], limit: int) -> None:
    groups = sub_groups(sizes, limit)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i] for i in group[:-1]) < limit or len(groups) == 1
