"""Exchanges of tensor parallelism in pieces: what they do is what they did whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from sim.ir.ledger import Gemm, Op, size
from sim.ir.program import COMPUTE, Collective, Compute, Send, Wait, World
from sim.parallel.overlap_tp import MARGIN, PIPELINED
from sim.pipeline import programs, simulate
from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario

MODEL = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16,
    "vocab_size": 32000,
}  # fmt: skip
TP = 4


def asked(tmp_path: Any, framework: str, overlap: bool, **more: Any) -> Scenario:
    import yaml

    settings = {"megatron": "tp_comm_overlap", "fsdp2": "async_tensor_parallel"}
    training: dict[str, Any] = {"sequence_length": 2048, "micro_batch_size": 2, "global_batch_size": 16}
    if framework == "fsdp2":
        training["compile"] = True
    training |= more.pop("training", {})
    document: dict[str, Any] = {
        "model": MODEL,
        "cluster": {"node": "dgx-h100"},
        "framework": framework,
        "parallelism": {"tp": TP, "sp": True, **more.pop("parallelism", {})},
        "training": training,
        framework: {settings[framework]: overlap, **more.pop("settings", {})},
        **more,
    }
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump(document))
    return load_scenario(file)


def moved(world: World) -> Mapping[str, int]:
    """Bytes that a rank sends over tp in a step: of gathers and scatters (n - 1)/n, of shifts all."""
    total: dict[str, int] = {}
    program = world.programs[0]
    for call in program.step:
        for step in program.chunks[call.chunk]:
            if isinstance(step, Collective) and step.axis == "tp" and step.kind != "all_reduce":
                sent = step.tensor_bytes * (TP if step.kind == "shift" else TP - 1) // TP
                total[step.kind] = total.get(step.kind, 0) + sent
    return total


def flops(world: World) -> int:
    program = world.programs[0]
    return sum(
        step.kernel.flops
        for call in program.step
        for step in program.chunks[call.chunk]
        if isinstance(step, Compute) and isinstance(step.kernel, Gemm)
    )


@pytest.mark.parametrize("framework", ["megatron", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_pieces_send_and_multiply_what_whole_exchanges_do(
    tmp_path: Any, framework: str, recompute: str, precision: str
) -> None:
    training = {"recompute": recompute, "precision": precision}
    whole = programs(asked(tmp_path, framework, False, training=training))[1]
    cut = programs(asked(tmp_path, framework, True, training=training))[1]
    assert "shift" not in moved(whole)
    assert moved(cut)["shift"] > 0
    assert sum(moved(cut).values()) == sum(moved(whole).values())
    assert flops(cut) == flops(whole)


def test_user_buffers_gather_around_a_ring_and_scatter_in_four_pieces(tmp_path: Any) -> None:
    """A block's forward: qkv and fc1 gathered in tp - 1 shifts each, proj and fc2 reduced in four pieces each."""
    from sim.parallel import overlap_tp

    seen: list[tuple[Op, ...]] = []
    original = overlap_tp.overlapped_layer

    def noted(layer: Any, tp: int, way: Any) -> Any:
        made = original(layer, tp, way)
        seen.append(made.forward)
        return made

    overlap_tp.overlapped_layer = noted  # type: ignore[assignment]
    try:
        programs(asked(tmp_path, "megatron", True))
    finally:
        overlap_tp.overlapped_layer = original
    (ops,) = seen
    kinds = [op.exchange.kind for op in ops if op.exchange is not None]
    assert kinds.count("shift") == 2 * (TP - 1)
    assert kinds.count("reduce_scatter") == 2 * PIPELINED
    pieces = [k for op in ops for k in op.kernels if isinstance(k, Gemm) and k.pieces > 1]
    assert len(pieces) == 2 * TP + 2 * PIPELINED
    along = [k for k in pieces if size(k.m) == 2 * 2048 // TP]
    assert len(along) == 2 * TP
    reduced = [k for k in pieces if k not in along]
    assert {size(k.n) for k in reduced} == {1024 // PIPELINED}
    assert {k.margin for k in reduced} == {MARGIN}
    assert {k.margin for k in along} == {0}


def test_each_piece_waits_for_its_own_part_and_the_first_for_none(tmp_path: Any) -> None:
    world = programs(asked(tmp_path, "megatron", True))[1]
    chunk = next(c for n, c in world.programs[0].chunks.items() if any(
        isinstance(s, Collective) and s.kind == "shift" for s in c
    ))  # fmt: skip
    first = next(i for i, s in enumerate(chunk) if isinstance(s, Compute) and isinstance(s.kernel, Gemm))
    name = chunk[first].op  # type: ignore[union-attr]
    waits = [
        [s.event for s in chunk[: i + 1] if isinstance(s, Wait) and s.stream == COMPUTE][-1:]
        for i, s in enumerate(chunk)
        if isinstance(s, Compute) and isinstance(s.kernel, Gemm) and s.op.startswith(name)
    ][:TP]
    assert len({tuple(w) for w in waits[1:]}) == TP - 1
    assert all("all_gather" in w[0] for w in waits[1:])


@pytest.mark.parametrize("framework", ["megatron", "fsdp2"])
def test_overlap_shortens_a_step_that_waits_for_long_exchanges(tmp_path: Any, framework: str) -> None:
    training = {"sequence_length": 16384, "micro_batch_size": 4, "global_batch_size": 8}
    long = simulate(asked(tmp_path, framework, False, training=training)).timeline
    short = simulate(asked(tmp_path, framework, True, training=training)).timeline
    assert max(s.end for s in short.spans) < max(s.end for s in long.spans)


# --- messages of 2021 ----------------------------------------------------------------------------


@pytest.mark.parametrize(("vpp", "overlap"), [(1, True), (2, True), (2, False)])
def test_megatron_ranks_send_a_part_and_gather_it(tmp_path: Any, vpp: int, overlap: bool) -> None:
    """Without sp a message is 1/tp of [2048, 2, 1024] in 16 bits, and every one received is gathered whole."""
    parallelism = {"tp": TP, "sp": False, "pp": 2, "vpp": vpp}
    settings = {"overlap_p2p_communication": overlap}

    def of(parts: bool) -> World:
        more = {"scatter_gather_tensors_in_pipeline": parts}
        return programs(asked(tmp_path, "megatron", False, parallelism=parallelism, settings={**settings, **more}))[1]

    whole = 2048 * 2 * 1024 * 2
    for parts in (False, True):
        for program in of(parts).programs:
            steps = [step for call in program.step for step in program.chunks[call.chunk]]
            sends = [step.tensor_bytes for step in steps if isinstance(step, Send)]
            received = [s for s in steps if type(s).__name__ == "Recv"]
            gathered = [s.tensor_bytes for s in steps if isinstance(s, Collective) and s.name == "parts"]
            assert set(sends) == {whole // TP if parts else whole}
            assert gathered == ([whole] * len(received) if parts else [])


def test_a_divided_sequence_is_sent_as_it_is(tmp_path: Any) -> None:
    settings = {"scatter_gather_tensors_in_pipeline": True}
    scenario = asked(tmp_path, "megatron", False, parallelism={"pp": 2}, settings=settings)
    names = {
        s.name
        for p in programs(scenario)[1].programs
        for c in p.chunks.values()
        for s in c
        if isinstance(s, Collective)
    }
    assert "parts" not in names
