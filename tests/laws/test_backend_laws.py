"""Laws of the libraries of collectives beside NCCL: gloo, and a plain network of alpha and beta."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost import alpha_beta
from sim.cost.backend import backend
from sim.cost.gloo import sends, work
from sim.cost.model import CostModel
from sim.engine.network import flow_of
from sim.ir.traffic import Traffic
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import ClusterSpec
from sim.units import ticks

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "barrier")


def machine(name: str, num_nodes: int, alpha_s: float = 5e-6, beta: float = 50e9) -> Cluster:
    node = load.node("dgx-a100-80gb")
    plain = {"alpha_s": alpha_s, "beta_bytes_per_s": beta} if name == "alpha-beta" else {}
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=load.network("ib-hdr-200-rail"), num_nodes=num_nodes,
                    num_gpus=8 * num_nodes, backend=name, **plain)  # type: ignore[arg-type]
    )  # fmt: skip


def alone_ticks(cluster: Cluster, traffic: Traffic) -> int:
    links = CostModel(cluster, cluster.spec.gpu).links
    flows = [flow_of(phase, links) for phase in traffic.phases]
    return sum(flow.latency + ticks(flow.alone_s) for flow in flows)


@given(st.sampled_from(KINDS), st.integers(2, 16), st.integers(0, 2**34), st.floats(1e-7, 1e-3), st.floats(1e8, 1e12))
def test_a_plain_network_takes_its_closed_form_to_the_tick(
    kind: str, n: int, tensor_bytes: int, alpha_s: float, beta: float
) -> None:
    cluster = machine("alpha-beta", 2, alpha_s, beta)
    traffic = alpha_beta.plan_collective(cluster, [tuple(range(n))], kind, tensor_bytes)
    waits_s = alpha_beta.rounds(kind, n) * alpha_s
    closed = ticks(waits_s) + ticks(alpha_beta.port_bytes(kind, n, tensor_bytes) / beta)
    assert alone_ticks(cluster, traffic) == closed
    assert closed == pytest.approx(alpha_beta.time_s(kind, n, tensor_bytes, alpha_s, beta) * 1e12, abs=2)


@given(st.sampled_from(["gloo", "alpha-beta"]), st.sampled_from(KINDS), st.integers(2, 16), st.integers(0, 2**28),
       st.integers(1, 2**28))  # fmt: skip
@settings(max_examples=60)
def test_more_bytes_take_no_less_time(name: str, kind: str, n: int, tensor_bytes: int, more: int) -> None:
    cluster, group = machine(name, 2), tuple(range(n))
    plan = backend(name).plan_collective
    less = alone_ticks(cluster, plan(cluster, [group], kind, tensor_bytes))
    assert less <= alone_ticks(cluster, plan(cluster, [group], kind, tensor_bytes + more))


@given(st.sampled_from(KINDS), st.integers(2, 33), st.integers(1, 2**20))
def test_gloo_moves_what_a_collective_has_to(kind: str, n: int, elements: int) -> None:
    """Everyone gets what it lacks: no rank receives less, and the busiest sends what ``work`` says."""
    size = 4 * n * elements
    sent, received = [0] * n, [0] * n
    for source, target, num_bytes in sends(kind, n, size):
        sent[source] += num_bytes
        received[target] += num_bytes
    lacks = {"all_reduce": 2 * (n - 1) * size // n, "reduce_scatter": (n - 1) * size // n, "broadcast": size,
             "all_gather": (n - 1) * size // n, "all_to_all": (n - 1) * size // n}.get(kind, 0)  # fmt: skip
    assert min(received[1:]) >= lacks
    assert max(sent) == work(kind, n, size).sent_bytes


@given(st.sampled_from(KINDS[:-1]), st.integers(2, 16), st.integers(1, 2**30))
def test_ports_send_what_ports_receive(kind: str, n: int, tensor_bytes: int) -> None:
    cluster = machine("alpha-beta", 2)
    loads = alpha_beta.plan_collective(cluster, [tuple(range(n))], kind, tensor_bytes).phases[0].loads
    out = sum(load for link, load in loads if not (link - cluster.num_links) % 2)
    assert out == pytest.approx(sum(load for link, load in loads if (link - cluster.num_links) % 2))
    assert min(link for link, _ in loads) >= cluster.num_links


def scenario(**cluster: Any) -> str:
    model = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
             "vocab_size": 1000}  # fmt: skip
    return yaml.safe_dump(
        {
            "model": model,
            "cluster": {"node": "dgx-a100-80gb", "num_nodes": 2, **cluster},
            "framework": "fsdp2",
            "parallelism": {"tp": 2},
            "training": {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 16},
        }
    )


@pytest.mark.parametrize("given_", [{"backend": "gloo"}, {"backend": "alpha-beta", "alpha": "5 us", "beta": "20 GB/s"}])
def test_a_folded_answer_is_that_of_all_ranks(given_: dict[str, str]) -> None:
    """Sixteen ranks, tensor and data parallel: the two axes' collectives overlap."""
    asked = load_scenario_text(scenario(**given_), "law.yaml")
    folded, whole = simulate(asked), simulate(asked, fold=False)
    assert len(folded.world.programs) < len(whole.world.programs) == 16
    assert folded.timeline.end == whole.timeline.end
    peaks = {rank: f.peak_allocated_bytes for f in folded.footprints for rank in f.ranks}
    assert peaks == {rank: f.peak_allocated_bytes for f in whole.footprints for rank in f.ranks}
    assert folded.report.communication == whole.report.communication
