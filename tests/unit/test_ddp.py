"""DDP's buckets, against what real processes of a small GPT reduced (P = 3,716,608 parameters in fp32).

Measured with torch 2.13 and gloo: with the default cap two all-reduces of 1,048,576 and 13,817,856 bytes, with an
explicit cap of 25 MiB one of 14,866,432. The sizes below are the GPT's tensors as their gradients become ready.
"""

from __future__ import annotations

import pytest

from sim.ir.ledger import Dim, Layer, Parameter
from sim.ir.program import Collective, Storage
from sim.parallel.frameworks.ddp import Ddp
from sim.scenario.schema import DdpSettings

H, V, S, L = 256, 1024, 128, 4
BLOCK = (H, 4 * H * H, 4 * H, 4 * H * H, H, H, H, H * H, 3 * H, 3 * H * H, H, H)
SIZES = (V * H, H, H, *BLOCK * L, S * H, V * H)


def buckets(cap: float | None, find_unused: bool = False) -> list[int]:
    parameters = tuple(Parameter(f"p{i}", (Dim("numel", size),)) for i, size in enumerate(SIZES))
    layer = Layer("gpt", "block", parameters, (), (), None, None)
    order = [(0, parameter.name) for parameter in parameters]
    ddp = Ddp(
        (layer,), order, DdpSettings(bucket_cap_mb=cap, find_unused_parameters=find_unused),
        num_ranks=2, parameter_dtype="fp32", loss_scaling=False, optimizer="adamw", gradient_clipping=0.0,
    )  # fmt: skip
    ddp.use_buckets(first_step=False)
    return [bucket.num_bytes for bucket in ddp.buckets]


def test_the_sizes_are_those_of_the_gpt():
    assert sum(SIZES) == L * (12 * H * H + 13 * H) + 2 * V * H + S * H + 2 * H == 3_716_608


def test_left_to_torch_the_first_bucket_has_one_mib():
    assert buckets(None) == [1_048_576, 13_817_856]


def test_an_explicit_cap_holds_for_the_first_bucket_too():
    assert buckets(25) == [14_866_432]


@pytest.mark.parametrize("cap", [0.5, 2])
def test_a_bucket_closes_when_it_is_full(cap):
    *full, last = buckets(cap)
    assert all(size >= cap * 2**20 for size in full)
    assert sum(full) + last == 14_866_432


def step(settings: DdpSettings, sizes: tuple[int, ...], order: tuple[int, ...]) -> tuple[list, list]:
    """Return (kind, bytes) of the collectives of a synchronised backward in a later step, and of what comes between."""
    parameters = tuple(Parameter(f"p{i}", (Dim("numel", size),)) for i, size in enumerate(sizes))
    ddp = Ddp(
        (Layer("gpt", "block", parameters, (), (), None, None),), [(0, f"p{i}") for i in order], settings,
        num_ranks=2, parameter_dtype="fp32", loss_scaling=False, optimizer="sgd", gradient_clipping=0.0,
    )  # fmt: skip
    between = ddp.after_first_step()
    ddp.begin_microbatch(first=True, last=True)
    chunk = []
    for i in order:
        chunk += ddp.gradient_ready(0, f"p{i}", Storage(f"g{i}", 4 * sizes[i], "gradients"))
    return tuple(
        [(each.kind, each.tensor_bytes) for each in instructions if isinstance(each, Collective)]
        for instructions in (chunk, between)
    )  # type: ignore[return-value]


def test_with_unused_parameters_buckets_follow_registration_and_are_launched_in_order():
    """p0 and p1 fill the first bucket, p2 and p3 the second, which is reduced first, whichever is ready first."""
    mib = 2**18
    settings = DdpSettings(bucket_cap_mb=2, find_unused_parameters=True)
    found, between = step(settings, (mib, mib, mib, 2 * mib), order=(1, 0, 3, 2))
    assert found == [("all_reduce", 3 * 2**20), ("all_reduce", 2 * 2**20), ("all_reduce", 4 * 4)]
    assert between == []


@pytest.mark.parametrize("static", [False, True])
def test_ranks_agree_on_rebuilt_buckets(static):
    """Five int32 for the indices of four parameters with their number, one for each of three buckets."""
    mib = 2**18
    settings = DdpSettings(bucket_cap_mb=2, static_graph=static, find_unused_parameters=static)
    found, between = step(settings, (mib, mib, mib, 2 * mib), order=(1, 0, 3, 2))
    assert between == [("broadcast", 4 * 5), ("broadcast", 4 * 3)]
    assert found == [("all_reduce", 2 * 2**20), ("all_reduce", 2 * 2**20), ("all_reduce", 2**20)]
