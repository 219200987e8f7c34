"""Times of NCCL's kernels: the terms by hand, the files of coefficients, and laws of the whole."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cost_nccl import MIB, alone_s, machine

from sim.catalog import load
from sim.cost.efficiency import MEASURED
from sim.cost.nccl import terms
from sim.cost.nccl.messages import p2p_channels
from sim.cost.nccl.plan import assumption, plan_collective
from sim.cost.nccl.terms import Work

FILES = sorted(MEASURED.glob("nccl_*.yaml"))


def test_the_terms_of_a_ring_by_hand() -> None:
    """Eight ranks, all-reduce of 80 MB over wires of 100 GB/s: 14 steps of 10 MB, and 10 MB that are only copied."""
    work = Work("all_reduce", 8, 1, 80e6, 24, 100e9)
    assert terms.terms_of("ring/Simple", "nvlink", work) == (
        1.0, 14, 0, pytest.approx(14 * 10e6 / 100e9), 10e6, 0.0, 0.0,
    )  # fmt: skip
    entry = {"start": "20 us", "hop": "2 us", "share": 0.5, "all_reduce": "500 GB/s"}
    coefficients = terms.coefficients_of("ring/Simple", entry)
    latency_s, flow_s = terms.split("ring/Simple", coefficients, terms.terms_of("ring/Simple", "nvlink", work))
    assert latency_s == pytest.approx(20e-6 + 14 * 2e-6)
    assert flow_s == pytest.approx(14 * 10e6 / 50e9 + 10e6 / 500e9)


def test_a_turn_is_paid_between_nodes_only() -> None:
    inside = Work("all_gather", 16, 1, 1e6, 16, 100e9)
    between = Work("all_gather", 16, 2, 1e6, 16, 100e9)
    assert terms.terms_of("ring/LL128", "nvlink", inside)[2] == 0
    assert terms.terms_of("ring/LL128", "net", between)[2] == 15 * 7


def test_a_rack_has_no_more_turns_than_the_largest_node_that_was_measured() -> None:
    """Seven each step, though 36 GPUs of a group share a domain."""
    racks = Work("all_gather", 288, 8, 1e9, 32, 700e9)
    assert terms.terms_of("ring/LL128", "net", racks)[2] == 287 * 7


@pytest.mark.parametrize(
    ("mib", "chunk"),
    [(1, 16384), (7, 16384), (8, 32768), (63, 32768), (64, 65536), (1023, 65536), (1024, 131072)],
)
def test_chunks_of_nvls_grow_with_the_message(mib: int, chunk: int) -> None:
    """16 channels, 8 heads: 128 chunks a round; below 2 rounds of 32 KiB, 8 of 64 KiB, 64 of 128 KiB the next smaller
    (nccl src/enqueue.cc, calcCollChunking)."""
    assert terms.nvls_round_bytes(mib * MIB, 16, 8) == 128 * chunk


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_coefficients_say_what_they_rest_on(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    assert "aiconfigurator @095f58a51" in text
    assert data["collectives"]["residuals_one_node"]["mean_abs"] < 0.10
    assert data["collectives"].get("residuals_between_nodes", {"mean_abs": 0.0})["mean_abs"] < 0.15
    for hw, entries in data.items():
        if hw not in ("nvlink", "pci", "shm", "net"):
            continue
        for name, entry in entries.items():
            assert set(entry) <= set(terms.TERMS[name])
            assert all(c >= 0 for c in terms.coefficients_of(name, entry))


def test_a_gpu_without_measurements_takes_those_of_its_like() -> None:
    found = {}
    for gpu in ("v100-sxm2-16gb", "a100-sxm-40gb", "h20-sxm-96gb", "gb200-186gb", "mi300x"):
        entry = terms.measured_by(load.gpu(gpu), "ring/Simple", "nvlink")
        assert entry is not None
        found[gpu] = entry[0]
    assert found == {
        "v100-sxm2-16gb": "a100-sxm",
        "a100-sxm-40gb": "a100-sxm",
        "h20-sxm-96gb": "h100-sxm",
        "gb200-186gb": "gb200",
        "mi300x": "a100-sxm",
    }
    assert terms.measured_by(load.gpu("h100-sxm-80gb"), "tree/LL", "net") is None


@pytest.mark.parametrize(
    ("num_ranks", "per_node", "num_nodes", "channels"),
    [
        # parts of a message at 1 GiB over 400 Gbit/s: ceil(50 / 14) = 4 channels, halved until all ranks' batches of
        # eight fit in the channels of the rings (src/graph/paths.cc, ncclTopoComputeP2pChannels)
        (2, 1, 2, 4),  # 4 x 1 batch in 4 channels
        (10, 1, 10, 2),  # 2 x 2 batches
        (16, 8, 2, 4),  # 4 x 2 batches in 16
        (40, 4, 10, 2),
        (80, 8, 10, 1),  # 10 batches in 16
    ],
)
def test_channels_of_messages_between_nodes(num_ranks: int, per_node: int, num_nodes: int, channels: int) -> None:
    cluster = machine("dgx-h100", num_nodes)
    assert num_ranks == per_node * num_nodes
    assert p2p_channels(cluster, num_ranks, 1, 2**30, True) == channels


@pytest.mark.parametrize(
    ("num_ranks", "mib", "channels"),
    [(8, 1, 4), (8, 64, 4), (8, 128, 8), (8, 256, 16), (8, 1024, 32), (4, 64, 8), (2, 64, 16)],
)
def test_channels_of_messages_inside_a_node(num_ranks: int, mib: int, channels: int) -> None:
    """32 channels over all ranks, doubled while a part exceeds 16 MiB (src/enqueue.cc, addP2pToPlan). nccl-tests on
    H100 show the steps: 128 MiB over 8 ranks at 163 GB/s, 256 MiB at 300, 512 MiB at 356."""
    assert p2p_channels(machine("dgx-h100"), num_ranks, 1, mib * MIB, False) == channels


@pytest.mark.parametrize("name", ["dgx-h100", "dgx-a100-80gb", "dgx-b200", "pcie-8x-rtx-pro-6000-pairs"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_a_larger_message_is_hardly_ever_faster(name: str, kind: str) -> None:
    """NCCL's choice may cost time where its model is wrong, so a larger message may take a little less: never 15 %."""
    cluster = machine(name)
    times = [alone_s(cluster, plan_collective(cluster, [tuple(range(8))], kind, 2**power)) for power in range(10, 33)]
    assert all(later > 0.85 * sooner for sooner, later in pairwise(times))
    assert times[-1] > 3.2 * times[-3]  # four times the bytes; NVLS's chunks double in between


def test_the_script_fits_what_the_simulator_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the simulator itself produced are fitted by its own coefficients again."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "validation" / "measure"))
    import check_nccl

    rows = [
        row._replace(time_s=check_nccl.predicted_s(row)[0])
        for kind in ("all_reduce", "all_gather", "reduce_scatter")
        for gpus in (2, 4, 8)
        for power in range(24, 30)
        if (row := check_nccl.Row("a100-sxm", "2.27", kind, gpus, 1, 2**power, 0.0, "one node")).tensor_bytes
    ]
    entry = check_nccl.fit(rows)["nvlink"]["ring/Simple"]
    known = yaml.safe_load((MEASURED / "nccl_a100_sxm.yaml").read_text(encoding="utf-8"))["nvlink"]["ring/Simple"]
    for fitted, written in zip(
        terms.coefficients_of("ring/Simple", entry), terms.coefficients_of("ring/Simple", known), strict=True
    ):
        assert fitted == pytest.approx(written, rel=0.02)
    sys.modules.pop("check_nccl")


@pytest.mark.parametrize(
    ("name", "num_nodes", "said"),
    [
        ("dgx-h100", 1, ""),
        ("dgx-h100", 2, ""),
        ("dgx-a100-80gb", 1, ""),
        ("dgx-a100-80gb", 2, "collectives between nodes (ib-hdr-200-rail): latencies of H100 over InfiniBand assumed"),
        ("dgx-1", 1, "collectives on v100-sxm2-16gb: times of NCCL's kernels assumed to be those of a100-sxm"),
    ],
)
def test_what_was_measured_elsewhere_is_said(name: str, num_nodes: int, said: str) -> None:
    cluster = machine(name, num_nodes)
    assert assumption(cluster, [tuple(range(cluster.num_gpus))]) == said
