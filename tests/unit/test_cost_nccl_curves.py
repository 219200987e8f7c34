"""Curves that were measured elsewhere than what the coefficients were fitted on: the wires give them, within 15 %.

From 64 MiB up: below, the sites themselves differ (8 H200 or H100 at 1 MiB: 40 GB/s at one, 72 at the other).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cost_nccl import MIB, alone_s, bus, machine

from sim.catalog import load
from sim.cluster.topology import build_cluster
from sim.cost.copies import plan_copy
from sim.cost.nccl.plan import plan_collective
from sim.pipeline import simulate
from sim.report.report import result
from sim.scenario.load import load_scenario
from sim.scenario.schema import ClusterSpec

TOLERANCE = 0.15
GIB = 2**10
ML = "stas00/ml-engineering@744d01e1, network/README.md"
VTRAIN = "VIA-Research/vTrain@f8dda84, trace/a100/AR_GPU*_1M_1024M_LUT (in place)"


@pytest.mark.parametrize(
    ("name", "num_gpus", "mib", "measured_gb", "source"),
    [
        ("dgx-1", 8, 4 * GIB, 122, f"{ML}: V100, hybrid cube mesh"),
        ("dgx-a100-80gb", 8, 64, 171, ML),
        ("dgx-a100-80gb", 8, 256, 194, ML),
        ("dgx-a100-80gb", 8, GIB, 229, ML),
        ("dgx-a100-80gb", 8, 16 * GIB, 235, ML),
        ("dgx-a100-80gb", 2, 64, 166.1, VTRAIN),
        ("dgx-a100-80gb", 2, GIB, 196.9, VTRAIN),
        ("dgx-a100-80gb", 3, 256, 200.4, VTRAIN),
        ("dgx-a100-80gb", 4, 64, 186.2, VTRAIN),
        ("dgx-a100-80gb", 6, GIB, 226.9, VTRAIN),
        ("dgx-a100-80gb", 8, 64, 202.6, VTRAIN),
        ("dgx-h100", 8, 64, 374.5, "xxrjun/nccl-tests-cluster@455de4f"),
        ("dgx-h100", 8, 128, 416.4, "xxrjun/nccl-tests-cluster@455de4f"),
        ("dgx-h100", 8, GIB, 469.6, "xxrjun/nccl-tests-cluster@455de4f"),
        ("dgx-h100", 8, 16 * GIB, 482, "xxrjun/nccl-tests-cluster@455de4f"),
        ("dgx-h100", 4, 4 * GIB, 364.4, "xxrjun/nccl-tests-cluster@455de4f"),
        ("dgx-h200", 8, 128, 402, ML),
        ("dgx-h200", 8, GIB, 464, ML),
        ("dgx-b200", 8, 16 * GIB, 846, ML),
        # two sockets, PCIe 4 and 5
        ("pcie-8x-a100-80gb", 8, 512, 24, f"{ML}: PCIe 4"),
        ("pcie-8x-rtx-pro-6000-pairs", 8, 512, 24.7, "ai-dynamo/aiconfigurator@095f58a51"),
    ],
)
def test_bus_bandwidth_of_an_all_reduce(name: str, num_gpus: int, mib: int, measured_gb: float, source: str) -> None:
    cluster = machine(name)
    assert bus(cluster, "all_reduce", tuple(range(num_gpus)), mib * MIB) / 1e9 == pytest.approx(
        measured_gb, rel=TOLERANCE
    ), source


@pytest.mark.parametrize(
    ("node", "num_nodes", "network", "kind", "mib", "measured_gb"),
    [
        # argonne-lcf/alcf-nccl-tests@385be33: Sophia, two DGX A100 with eight HDR NICs each; Polaris, four A100 and two
        # Slingshot NICs a node. Coefficients over the network are those of an H100 cluster.
        ("dgx-a100-80gb", 2, "ib-hdr-200-rail", "all_reduce", GIB, 180.5),
        ("dgx-a100-80gb", 2, "ib-hdr-200-rail", "all_gather", GIB, 177),
        ("dgx-a100-80gb", 2, "ib-hdr-200-rail", "all_to_all", GIB, 40),
        ("hgx-a100-4-80gb", 2, "slingshot-11-2", "all_reduce", 256, 36),
        ("hgx-a100-4-80gb", 8, "slingshot-11-2", "all_gather", 256, 36),
    ],
)
def test_bus_bandwidth_between_nodes(
    node: str, num_nodes: int, network: str, kind: str, mib: int, measured_gb: float
) -> None:
    facts = load.node(node)
    cluster = build_cluster(
        ClusterSpec(
            node=facts,
            gpu=load.gpu(facts.gpu),
            network=load.network(network),
            num_nodes=num_nodes,
            num_gpus=num_nodes * facts.num_gpus,
        )
    )
    found = bus(cluster, kind, tuple(range(cluster.num_gpus)), mib * MIB)
    assert found / 1e9 == pytest.approx(measured_gb, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("mib", "measured_gb"), [(512, 586), (GIB, 681), (2 * GIB, 758), (4 * GIB, 839), (8 * GIB, 835)]
)
def test_one_rack_of_gb200(mib: int, measured_gb: float) -> None:
    """72 GPUs on one fabric; CoreWeave's nccl-tests (README at cb86553). No such rack was fitted: the round of NVLS is
    B200's, a head at a time."""
    cluster = machine("gb200-nvl72", 18)
    found = bus(cluster, "all_reduce", tuple(range(72)), mib * MIB)
    assert found / 1e9 == pytest.approx(measured_gb, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("num_nodes", "kind", "measured_gb"),
    [
        (1, "all_reduce", 681),
        (2, "all_reduce", 838),
        (16, "all_reduce", 897),
        (2, "all_to_all", 680),
        (16, "all_to_all", 649),
    ],
)
def test_trays_of_a_gb300_rack(num_nodes: int, kind: str, measured_gb: float) -> None:
    """Four GPUs a tray, 8 GiB, NCCL 2.28.7: Oracle's published nccl-tests output of GB300 (BM.GPU.GB300.4). One tray
    has rings, more have NVLS. (An all-to-all in one tray measured 625, here 521.)"""
    cluster = machine("gb300-nvl72", num_nodes)
    found = bus(cluster, kind, tuple(range(4 * num_nodes)), 8 * GIB * MIB)
    assert found / 1e9 == pytest.approx(measured_gb, rel=TOLERANCE)


def test_two_nodes_sum_at_almost_twice_the_pace_of_three() -> None:
    """Between two nodes a tree crosses the network once each way, and NVLinks have room for it.

    NVIDIA/nccl#527: 57.2 GB/s over two p4d, 31.8 over three, at 1 GiB (its EFA carried two thirds of the line's rate).
    """
    two, three = machine("p4d", 2), machine("p4d", 3)
    assert plan_collective(two, [tuple(range(16))], "all_reduce", GIB * MIB).algorithm == "tree/Simple"
    found = bus(two, "all_reduce", tuple(range(16)), GIB * MIB) / bus(three, "all_reduce", tuple(range(24)), GIB * MIB)
    assert found == pytest.approx(57.17 / 31.75, rel=TOLERANCE)


@pytest.mark.parametrize(("num_gpus", "measured_gb"), [(1, 12.0), (16, 3.0)])
@pytest.mark.parametrize("direction", ["host_to_device", "device_to_host"])
def test_offload_on_a_dgx_2_shares_its_uplinks(num_gpus: int, measured_gb: float, direction: str) -> None:
    """ZeRO-Infinity, arXiv 2104.07857, Figure 2b: 12 GB/s for one GPU alone, 3.0 for each of sixteen."""
    cluster = machine("dgx-2")
    traffic = plan_copy(cluster, tuple(range(num_gpus)), direction, 10**9)
    assert 1 / alone_s(cluster, traffic) == pytest.approx(measured_gb, rel=0.01)


@pytest.mark.parametrize(("node", "efficiency"), [("dgx-a100-80gb", 0.95), ("pcie-8x-a100-80gb-switch", 0.50)])
def test_tensor_parallelism_needs_a_switch(node: str, efficiency: float, tmp_path: Path) -> None:
    """Layers as wide as GPT-3's over 8 A100: what is left of the step without exposed communication is about 95 % over
    NVSwitch and about 50 % over PCIe; here within 6 points."""
    config = {
        "model_type": "gpt2",
        "n_embd": 12288,
        "n_layer": 2,
        "n_head": 96,
        "vocab_size": 51200,
        "n_positions": 2048,
    }
    (tmp_path / "model.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tp.yaml").write_text(
        f"model: ./model.json\ncluster: {{node: {node}, num_nodes: 1}}\nframework: megatron\nparallelism: {{tp: 8}}\n"
        "training: {sequence_length: 2048, micro_batch_size: 4, global_batch_size: 16, precision: bf16}\n",
        encoding="utf-8",
    )
    step = result(simulate(load_scenario(tmp_path / "tp.yaml", ())).report, ())["step"]
    assert 1 - step["exposed_communication_s"] / step["time_s"] == pytest.approx(efficiency, abs=0.06)
