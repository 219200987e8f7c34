"""What each rank of real processes sends over gloo is what ``sim/cost/gloo.py`` says, but for headers of messages."""

from __future__ import annotations

import sys

import pytest

from sim.cost.gloo import sends, work

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="counts by Linux's TCP_INFO"),
]
SIZES = (4096, 2**16, 2**22)
"""The last has segments of 1 MiB (of two ranks) and below (of three)."""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_sends_the_bytes_of_the_algorithm(num_ranks: int) -> None:
    pytest.importorskip("torch")
    from validation.real.gloo import HEADER_BYTES, measured

    sizes = tuple(size // num_ranks // 64 * num_ranks * 64 for size in SIZES)  # equal segments
    found = measured(sizes, num_ranks)
    for name in found[0]:
        kind, size = name.split()
        if kind == "send":
            continue
        expected = [0] * num_ranks
        for source, _, num_bytes in sends(kind, num_ranks, int(size)):
            expected[source] += num_bytes
        most = 3 * work(kind, num_ranks, int(size)).num_messages + 3
        for rank, want in enumerate(expected):
            headers = found[rank][name] - want
            assert 0 <= headers <= most * HEADER_BYTES, f"{name}: rank {rank} sent {found[rank][name]}, not {want}"
            assert headers % HEADER_BYTES == 0, f"{name}: rank {rank} sent {headers} bytes of headers"
