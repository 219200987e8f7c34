"""CUDA graphs: what is captured costs the host a node each; hooks and the optimizer are issued as ever."""

from __future__ import annotations

from typing import Any

import pytest

from sim.cost.host import host_coefficients
from sim.ir.ledger import Dim, Pointwise, Tensor
from sim.ir.program import Call, Collective, Compute, HostWait, Mark, Program, Record
from sim.parallel.graphs import graphed
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_mapping

X = Tensor("x", (Dim("n", 1 << 20),), "bf16")
ADD = Pointwise("elementwise", (X,), (X,))
OWN = Compute("add", ADD, caller="forward")
HOOK = Compute("cast", ADD)
SUM = Collective("sum", "all_reduce", "tp", 1 << 20, "bf16", "nccl:tp", "forward")
CHUNK = (Mark("forward", "batch"), OWN, Mark("forward", "block.0"), HOOK, OWN, SUM, OWN, Mark("forward", "head"), OWN)
WAIT = (Record("e", "compute"), HostWait("e"))


def callers(chunks: dict[str, tuple[Any, ...]], *, whole: bool) -> dict[str, list[str]]:
    (program,) = graphed([Program((0,), 0, chunks, (), (), (Call("forward.first"),))], whole=whole)
    return {name: [step.caller for step in chunk if hasattr(step, "caller")] for name, chunk in program.chunks.items()}


def test_a_block_is_one_launch_and_the_rest_of_it_are_nodes() -> None:
    """Its first kernel stands for the call that replays; a hook's kernel and what is no block's stay outside."""
    found = callers({"forward.first": CHUNK, "optimizer": CHUNK}, whole=False)
    assert found["forward.first"] == ["forward", "framework", "forward", "graph", "graph", "forward"]
    assert found["optimizer"] == [step.caller for step in CHUNK if not isinstance(step, Mark)]


def test_a_full_iteration_captures_hooks_and_waits_for_nothing() -> None:
    (program,) = graphed(
        [Program((0,), 0, {"forward.first": (*CHUNK, *WAIT), "optimizer": (*CHUNK, *WAIT)}, (), (), ())], whole=True
    )
    passes, optimizer = program.chunks["forward.first"], program.chunks["optimizer"]
    assert {step.caller for step in passes if isinstance(step, Compute | Collective)} == {"graph"}
    assert not any(isinstance(step, HostWait) for step in passes)
    assert optimizer == (*CHUNK, *WAIT)


def test_equal_instructions_and_chunks_stay_one_object() -> None:
    (program,) = graphed([Program((0,), 0, {"forward.first": CHUNK, "forward.last": CHUNK}, (), (), ())], whole=True)
    first, last = program.chunks["forward.first"], program.chunks["forward.last"]
    assert first is last
    assert first[1] is first[4] is first[8]


def step_s(impl: str, scope: str) -> float:
    scenario = {
        "model": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False, "hidden_act": "silu",
            "norm": "rmsnorm", "bias": False, "position": "rope",
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 8},
        "framework": "megatron",
        "megatron": {"cuda_graph_impl": impl, "cuda_graph_scope": scope, "check_for_nan_in_grad": False},
        "training": {"sequence_length": 1024, "micro_batch_size": 1, "global_batch_size": 32, "precision": "bf16"},
    }  # fmt: skip
    content: dict[str, Any] = simulate(load_scenario_mapping(scenario, "t", folder=".")).report.to_dict()
    return float(content["step"]["time_s"])


def test_small_blocks_are_bound_by_launches_and_the_more_is_captured_the_faster() -> None:
    eager, blocks, whole = step_s("none", "full"), step_s("local", "full"), step_s("local", "full_iteration")
    assert whole < blocks < 0.7 * eager


@pytest.mark.parametrize("code", ["megatron", "torch"])
def test_nodes_and_a_library_s_launches_cost_less_than_the_model_s_own(code: str) -> None:
    launch_s = host_coefficients("", code, False).launch_s
    assert launch_s["graph"] < launch_s["library"] < launch_s["forward"]
