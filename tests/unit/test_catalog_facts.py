"""What holds of every fact in the catalogue, and a few that are known by heart."""

from __future__ import annotations

from typing import get_args

import pytest

from sim.catalog import load
from sim.catalog.describe import KINDS, describe, overview
from sim.catalog.schema import Fact, FactKind

UNITLESS = {
    "num_sms", "peer_to_peer", "nics_per_node", "gpudirect", "oversubscription", "nodes_per_leaf", "num_cpu_cores",
    "nvswitch_multicast", "cpu", "wiring", "nvlink_domain_nodes", "channels_per_peer",
}  # fmt: skip

TENSOR_FLOPS_PER_CLOCK = {
    "v100-sxm2-16gb": ("fp16", 1024), "v100-sxm2-32gb": ("fp16", 1024), "v100-pcie-32gb": ("fp16", 1024),
    "v100-sxm3-32gb": ("fp16", 1024),
    "t4": ("fp16", 1024), "a10": ("bf16", 1024), "a10g": ("bf16", 512), "a30": ("bf16", 2048),
    "rtx-3090": ("bf16", 512), "rtx-a6000": ("bf16", 1024), "a40": ("bf16", 1024),
    "a100-sxm-40gb": ("bf16", 2048), "a100-sxm-80gb": ("bf16", 2048), "a100-pcie-40gb": ("bf16", 2048),
    "a100-pcie-80gb": ("bf16", 2048), "a800-sxm-80gb": ("bf16", 2048),
    "l4": ("bf16", 1024), "rtx-4090": ("bf16", 512),
    "h100-sxm-80gb": ("bf16", 4096), "h100-pcie-80gb": ("bf16", 4096), "gh200-96gb": ("bf16", 4096),
    "h800-sxm-80gb": ("bf16", 4096),
    "h200-sxm-141gb": ("bf16", 4096),
    "rtx-5090": ("bf16", 512), "rtx-pro-6000": ("bf16", 1024), "mi300x": ("bf16", 2048),
    "b200-sxm-180gb": ("bf16", 8192), "b300-sxm-288gb": ("bf16", 8192),
    "gb200-186gb": ("bf16", 8192), "gb300-288gb": ("bf16", 8192),
}  # fmt: skip
"""Dense tensor FLOP of one SM in a clock, fp32 accumulation, from the architecture whitepapers.

Not here: l40s, whose sheet states 1.2 % less than its SMs and clock give, and h20, of which there is no whitepaper.
"""


def facts_of(kind: str, name: str) -> dict[str, Fact]:
    return dict(getattr(load, kind)(name).facts)


@pytest.mark.parametrize("kind", ["gpu", "node", "network", "link"])
def test_every_fact_has_a_unit_a_kind_and_a_source(kind):
    assert load.names(kind)
    for name in load.names(kind):
        facts = facts_of(kind, name)
        assert facts
        for field, fact in facts.items():
            where = f"{kind} {name} {field}"
            assert fact.kind in get_args(FactKind), where
            assert fact.kind != "user", where
            assert len(fact.source) > 8, where
            if field not in UNITLESS:
                number, _, unit = fact.text.partition(" ")
                assert float(number) >= 0, where
                assert unit, where


def test_no_source_points_at_a_place_that_a_stranger_cannot_reach():
    for kind in ("gpu", "node", "network", "link"):
        for name in load.names(kind):
            for field, fact in facts_of(kind, name).items():
                assert ".md:" not in fact.source or "@" in fact.source, (kind, name, field)


@pytest.mark.parametrize("name", TENSOR_FLOPS_PER_CLOCK)
def test_peak_is_sms_times_flops_per_clock_times_clock(name):
    precision, per_clock = TENSOR_FLOPS_PER_CLOCK[name]
    gpu = load.gpu(name)
    assert gpu.num_sms * per_clock * gpu.boost_clock_hz == pytest.approx(gpu.peak_flops[precision], rel=0.01)


def test_peaks_of_the_a100_and_h100_are_those_of_their_sheets():
    assert load.gpu("a100-sxm-80gb").peak_flops["bf16"] == 312e12
    assert load.gpu("h100-sxm-80gb").peak_flops["bf16"] == 989.4e12
    assert load.gpu("h100-sxm-80gb").memory_bytes_per_s == 3350e9
    assert "bf16" not in load.gpu("v100-sxm2-32gb").peak_flops
    assert "nvfp4" not in load.gpu("h100-sxm-80gb").peak_flops


def test_the_driver_keeps_some_memory_of_every_gpu():
    for name in load.names("gpu"):
        gpu = load.gpu(name)
        assert 0.87 * gpu.memory_bytes < gpu.total_memory_bytes < gpu.memory_bytes, name


def test_lower_precision_is_never_slower():
    for name in load.names("gpu"):
        peak = load.gpu(name).peak_flops
        chain = [peak[p] for p in ("fp32", "tf32", "bf16", "fp8", "nvfp4") if p in peak]
        assert chain == sorted(chain), name


def test_the_context_lies_in_its_band():
    for name in load.names("gpu"):
        gpu = load.gpu(name)
        low, high = gpu.cuda_context_band_bytes
        assert 0 < low <= gpu.cuda_context_bytes <= high < 2**31, name


def test_payload_is_below_the_line():
    for name in load.names("network"):
        network = load.network(name)
        if network.connection_bytes_per_s:  # a processor moves the packets, on two queues
            assert network.nic_bytes_per_s == 2 * network.connection_bytes_per_s <= network.line_bytes_per_s, name
            continue
        assert 0.7 * network.line_bytes_per_s < network.nic_bytes_per_s <= network.line_bytes_per_s, name


def test_twelve_nvlinks_of_an_a100_carry_what_nccl_expects():
    # NCCL's constant, 20 GB/s of payload a link: 12 x 20 = 240 GB/s; a ring was measured at 235.
    assert 12 * load.link("nvlink3").bytes_per_s == 240e9
    assert 18 * load.link("nvlink4").bytes_per_s == pytest.approx(370.8e9)


@pytest.mark.parametrize("kind", ["gpu", "node", "network", "link", "model"])
def test_unknown_names_raise_keyerror(kind):
    look_up = load.model_config if kind == "model" else getattr(load, kind)
    for wrong in ("h10", "", "..", "parameters", "H100"):
        with pytest.raises(KeyError):
            look_up(wrong)


def test_a_name_is_never_a_way_out_of_the_folder():
    with pytest.raises(KeyError):
        load.gpu("../links/c2c")
    with pytest.raises(KeyError):
        load.model_config("../../units")


@pytest.mark.parametrize("kind", KINDS)
def test_describe_gives_rows_for_everything(kind):
    assert [name for name, _ in overview(kind)] == list(load.names(kind))
    assert all(line for _, line in overview(kind))
    for name in load.names(kind):
        rows = describe(kind, name)
        assert rows
        assert all(row.name and isinstance(row.value, str) for row in rows), name


def test_describe_shows_the_source_of_a_peak():
    row = next(row for row in describe("gpu", "h100-sxm-80gb") if row.name == "peak_flops.bf16")
    assert (row.value, row.kind) == ("989.4 TFLOP/s", "datasheet")
    assert row.source.startswith("NVIDIA H100 Tensor Core GPU datasheet")
