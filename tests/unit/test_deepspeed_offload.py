"""Offload: what real DeepSpeed holds, split between GPU and host; what is copied, when, and over shared wires."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed_world import Job, P
from held import live

from sim.catalog.load import gpu, node
from sim.cluster.topology import build_cluster
from sim.cost.copies import plan_copy
from sim.ir.program import Chunk, Copy, HostCompute
from sim.pipeline import simulate
from sim.scenario.load import load_scenario
from sim.scenario.schema import ClusterSpec

LARGEST = 1024 * 256
PERSISTENT = 308_736
CPU = {"offload_optimizer": "cpu", "reduce_bucket_size": 500_000}
ROOT = Path(__file__).parents[2]
SHARED = [("dgx-2", 16, 4.0), ("pcie-8x-4090", 8, 1.0), ("pcie-8x-4090-switch", 8, 4.0)]
"""Node, GPUs, and how many of them share a switch's one uplink."""


def held(job: Job, place: str) -> int:
    return sum(s.num_bytes for s in live(job.chunks).values() if s.place == place)


def copied(chunks: list[Chunk], direction: str, name: str = "") -> int:
    return sum(
        each.num_bytes
        for chunk in chunks
        for each in chunk
        if isinstance(each, Copy) and each.direction == direction and each.name.startswith(name)
    )


def test_measured_bytes_between_steps() -> None:
    # what a process held, GPU and host together, without 8 bytes of a step counter
    job = Job(2, num_microbatches=2, dp_rank=0, **CPU)
    assert held(job, "gpu") + held(job, "host") == 45_679_624 - 8


def test_zero2_keeps_parameters_and_one_gradient_on_the_gpu() -> None:
    job = Job(2, 4, **CPU)
    assert held(job, "gpu") == 2 * P + 2 * LARGEST
    # master, moments and gradient in fp32, 16-bit parameters and the largest gradient
    assert held(job, "host") == (4 + 8 + 4 + 2) * P // 4 + 2 * LARGEST


def test_zero3_keeps_16_bit_on_the_gpu_or_nothing() -> None:
    parameters = Job(3, 4, **CPU)
    assert held(parameters, "gpu") == 2 * P // 4 + 2 * PERSISTENT + 2 * 500_000
    assert held(parameters, "host") == (4 + 8 + 4 + 2) * P // 4  # and the accumulated gradients in 16 bit
    nothing = Job(3, 4, offload_param="cpu", **CPU)
    assert held(nothing, "gpu") == 2 * PERSISTENT + 2 * 500_000
    assert held(nothing, "host") == (4 + 8 + 4 + 2 + 2) * P // 4


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_page_locked(pinned: bool) -> None:
    job = Job(3, offload_param="cpu", pin_memory=pinned, **CPU)
    streams = {s.name: s.stream for s in live(job.chunks).values() if s.place == "host"}
    assert streams["parameters.partition"] == "pinned"  # whatever the settings
    assert streams["grad.partition"] == streams["grad.0"] == ("pinned" if pinned else "pageable")
    assert streams["master.0"] == streams["exp_avg.partition.0"] == "pageable"


def test_zero2_copies_each_gradient_once_in_fp32_and_16_bit_parameters_back() -> None:
    job = Job(2, **CPU)
    assert copied(job.chunks, "device_to_host", "gradient") == 4 * P // 2
    assert copied(job.chunks, "host_to_device") == 2 * P // 2
    several = Job(2, num_microbatches=3, dp_rank=0, **CPU)
    whole = 2 * (P // 2 + 15_872)  # the one at the border in full
    assert copied(several.chunks, "device_to_host", "gradient") == 3 * whole + 4 * P // 2
    assert copied(several.chunks, "host_to_device", "gradient") == 2 * whole


def test_zero3_reads_back_what_it_copied() -> None:
    job = Job(3, **CPU)
    assert copied(job.chunks, "device_to_host") == (2 + 4) * P // 2
    assert copied(job.chunks, "host_to_device", "gradient") == 2 * P // 2
    assert copied(job.chunks, "host_to_device", "parameters") == 2 * P // 2
    param = Job(3, offload_param="cpu", **CPU)
    gathered_once = 2 * P // 2  # a small model stays gathered from forward to backward; the small ones come every step
    assert copied(param.chunks, "host_to_device", "parameter from") == gathered_once
    assert copied(param.chunks, "host_to_device", "parameters") == 0  # the CPU writes them where they are


def test_the_cpu_updates_what_is_there_and_the_gpu_the_rest() -> None:
    def updated(job: Job) -> int:
        return sum(e.num_elements for e in job.step if isinstance(e, HostCompute) and e.kind == "cpu_adam")

    assert updated(Job(2, 4, **CPU)) == P // 4
    assert updated(Job(3, 4, **CPU)) == P // 4
    parts = {"sub_group_size": 100_000, **CPU}
    all_groups = Job(3, 4, **parts)
    some = Job(3, 4, offload_ratio=0.5, **parts)
    assert updated(all_groups) == P // 4
    groups = some.hooks.groups  # type: ignore[union-attr]
    stay = int(0.5 * len(groups))
    partitions = some.hooks.partitions  # type: ignore[union-attr]
    assert updated(some) == sum(partitions[i] for group in groups[stay:] for i in group)
    moved = sum(partitions[i] for group in groups[:stay] for i in group)
    assert held(some, "gpu") == held(all_groups, "gpu") + (4 + 8 + 4) * moved  # master, moments, gradient
    assert 0 < moved < P // 4


@pytest.mark.parametrize(("name", "num_gpus", "slower"), SHARED)
def test_gpus_that_share_wires_copy_slower_together(name: str, num_gpus: int, slower: float) -> None:
    facts = node(name)
    cluster = build_cluster(ClusterSpec(node=facts, gpu=gpu(facts.gpu), network=None, num_nodes=1, num_gpus=num_gpus))

    def copy_s(gpus: range) -> float:
        total = 0.0
        for phase in plan_copy(cluster, gpus, "host_to_device", 10**9).phases:
            busiest = max(load / cluster.links[link].bytes_per_s for link, load in phase.loads)
            total += phase.latency_s + busiest
        return total

    assert copy_s(range(num_gpus)) == pytest.approx(slower * copy_s(range(1)), rel=1e-3)


def test_a_node_has_to_hold_what_is_offloaded() -> None:
    path = ROOT / "scenarios" / "13b_offload.yaml"
    scenario = load_scenario(path)
    fits = simulate(scenario).report
    assert fits.fits and fits.fits_host
    assert fits.host_bytes_per_node > 8 * (18 + 2) * 13_015_864_320 // 8  # rounded up by the allocator of pinned memory
    node_facts = replace(scenario.cluster.node, host_memory_bytes=200 * 2**30)
    cluster = scenario.cluster.model_copy(update={"node": node_facts})
    small = simulate(scenario.model_copy(update={"cluster": cluster})).report
    assert small.fits_gpu and not small.fits_host and not small.fits
