"""OpenMP threads of a rank: what a launcher sets where the scenario says nothing, and what they do to a step."""

from __future__ import annotations

import pytest

from sim.ir.program import HostCompute
from sim.parallel.frameworks.flat import host_torch_update
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import Scenario

TEXT = """
model: {{config: llama-2-7b, num_hidden_layers: 1}}
cluster: {{node: dgx-a100-80gb, num_gpus: {num_gpus}}}
framework: {framework}
training: {{sequence_length: 128, micro_batch_size: 1, precision: bf16{more}}}
"""


def scenario(framework: str, num_gpus: int = 8, more: str = "", own: str = "") -> Scenario:
    text = TEXT.format(framework=framework, num_gpus=num_gpus, more=more)
    return load_scenario_text(text + own, "given")


@pytest.mark.parametrize(
    ("framework", "num_gpus", "threads", "whose"),
    [("deepspeed", 8, 0, "deepspeed launcher"), ("fsdp2", 8, 1, "torchrun"), ("fsdp2", 1, 0, "torchrun")],
)
def test_threads_are_what_the_launcher_sets(framework: str, num_gpus: int, threads: int, whose: str) -> None:
    """torchrun writes OMP_NUM_THREADS=1 for several processes a node; without it OpenMP takes all cores (0)."""
    found = scenario(framework, num_gpus)
    assert found.training.cpu_threads == threads
    assert whose in found.sources["training.cpu_threads"]


def test_given_threads_are_kept_and_those_that_change_nothing_are_said() -> None:
    given = scenario("fsdp2", more=", cpu_threads: 16")
    assert given.training.cpu_threads == 16
    assert "training.cpu_threads" not in given.sources
    assert not any("cpu_threads" in text for text in given.warnings)
    assert any("128 cores" in text for text in scenario("fsdp2", more=", cpu_threads: 129").warnings)
    assert any("changes nothing" in text for text in scenario("ddp", more=", cpu_threads: 16").warnings)


def test_a_step_on_the_host_is_longer_by_what_one_thread_takes() -> None:
    """FSDP2 with its states on the host: 2 ns of AdamW on Zen 5 at 3.8 GHz are 2 * 917 * 3.8 / (565 * 3.4) = 3.63 on
    the node's Zen 2, for each of a rank's elements; on 16 threads the bound is the memory, 8 ranks * 80 bytes an
    element at half of 409.6 GB/s: 3.125 ns."""
    one, many = (
        simulate(scenario("fsdp2", more=f", cpu_threads: {threads}", own="fsdp2: {cpu_offload: true}\n"))
        for threads in (1, 16)
    )
    (count,) = {
        each.num_elements
        for program in one.world.programs
        for chunk in program.chunks.values()
        for each in chunk
        if isinstance(each, HostCompute) and each.kind == "cpu_torch_adam"
    }
    expected_s = count * (2 * 917 * 3.8 / (565 * 3.4) - 8 * 80 / (409.6 / 2)) * 1e-9
    assert (one.timeline.end - many.timeline.end) / 1e12 == pytest.approx(expected_s, rel=1e-3)


def test_torch_steps_on_the_host_in_one_pass_only_where_it_is_fused() -> None:
    kinds = [host_torch_update("adamw", how, 1).kind for how in ("foreach", "for-loop", "fused")]
    assert kinds == ["cpu_torch_adam", "cpu_torch_adam", "cpu_adam"]
    assert host_torch_update("sgd", "foreach", 1).kind == "cpu_sgd"
