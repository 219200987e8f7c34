"""The band and the probability of fitting."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest

from sim.ir.footprint import Footprint, OutOfMemory
from sim.memory.confidence import ALLOCATED_SCALE, confidence
from sim.memory.runtime import Outside

GIB = 2**30
BARE = Footprint(
    ranks=(0,), stage=0, peak_allocated_bytes=40 * GIB, peak_reserved_bytes=40 * GIB, peak_device_bytes=40 * GIB,
    host_bytes=0, at_peak={}, beside={}, peak_step="steady", peak_position=(0, 0), peak_phase="", peak_module="",
    holders=(), samples=(),
)  # fmt: skip


def test_allocated_alone_is_a_laplace_distribution() -> None:
    """90 % of it are within -ln(0.1) scales; libraries move the middle by half of their 256 MiB."""
    found = confidence(BARE, Outside(), 80 * GIB)
    within = -log(0.1) * ALLOCATED_SCALE * 40 * GIB
    middle = 40 * GIB + 128 * 2**20
    assert found.most_bytes == pytest.approx(middle + within, rel=2e-3)
    assert found.least_bytes == pytest.approx(middle - within, rel=2e-3)


@pytest.mark.parametrize(("total", "least", "most"), [(80, 0.99, 1.0), (40.125, 0.45, 0.55), (30, 0.0, 0.01)])
def test_probability_falls_as_the_gpu_gets_smaller(total: float, least: float, most: float) -> None:
    assert least <= confidence(BARE, Outside(), round(total * GIB)).probability_fits <= most


def test_the_cache_can_be_given_back() -> None:
    """60 GiB reserved, 40 allocated: on 62 GiB it is nearly sure that it fits, on 45 about a quarter of the cache."""
    cached = replace(BARE, peak_reserved_bytes=60 * GIB)
    assert confidence(cached, Outside(), 62 * GIB).probability_fits > 0.9
    assert confidence(cached, Outside(), 45 * GIB).probability_fits > 0.5


def test_what_ran_out_of_memory_most_likely_does_not_fit() -> None:
    missing = OutOfMemory((0, 0), "steady", "", "", "x", GIB, 2 * GIB)
    assert confidence(replace(BARE, out_of_memory=missing), Outside(), 40 * GIB).probability_fits < 0.1
    """The first request may have lacked little where all that was asked for afterwards is far more than there is."""
    little = OutOfMemory((0, 0), "first", "", "", "x", GIB, GIB // 4)
    beyond = replace(BARE, peak_allocated_bytes=80 * GIB, out_of_memory=little)
    assert confidence(beyond, Outside(), 40 * GIB).probability_fits < 1e-3


def test_parts_hold_their_estimates() -> None:
    outside = Outside(cuda_context_bytes=500, nccl_bytes=100, least_bytes=400, most_bytes=900)
    found = confidence(BARE, outside, 80 * GIB, (350, 700))
    assert {p.name: (p.num_bytes, p.least_bytes, p.most_bytes) for p in found.parts}["nccl"] == (100, 50, 200)
    for part in found.parts:
        assert part.least_bytes <= part.num_bytes <= part.most_bytes


def test_the_band_holds_the_estimate_where_all_parts_can_only_be_more() -> None:
    """1 MiB of tensors: the libraries' even 0 to 256 MiB have their 5th percentile above the estimate."""
    little = replace(BARE, peak_allocated_bytes=2**20, peak_reserved_bytes=2**20)
    assert confidence(little, Outside(), 80 * GIB).least_bytes == 2**20
