"""Small plans, and somebody who answers instead of the simulator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sim.planner.bounds import Bounds
from sim.planner.load import load_plan_text
from sim.planner.schema import Plan
from sim.planner.space import Candidate, candidates, scenario_of

TINY = """
model: {hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 4,
        vocab_size: 4096, name: tiny}
workload: {steps: 10000, sequence_length: 512, global_batch_size: 32}
"""
ONE_NODE = TINY + "goal: {fastest: true}\ncandidates: {nodes: dgx-h100, num_gpus: [2, 4, 8]}\n"
TWO_SITES = (
    "model: llama-3-8b\nworkload: {tokens: 1e11, sequence_length: 8192, global_batch_size: 256}\n"
    "goal: {deadline: 90 days}\ncandidates: {nodes: [dgx-h100, dgx-a100-80gb], num_gpus: [8, 64]}\n"
)


def plan_of(text: str, *overrides: str) -> Plan:
    return load_plan_text(text, "x.yaml", overrides)


class Pretended:
    """Answers at once: a step takes its bound and up to ``spread`` more, as a hash of the scenario and the seed says.

    Its sharper bound lies between the two. ``asked`` are the candidates, in the order in which they came.
    """

    def __init__(self, plan: Plan, seed: int = 0, spread: float = 0.2, more_bytes: int = 2 << 30) -> None:
        self._plan, self._seed, self._spread, self._more = plan, seed, spread, more_bytes
        self._bounds = Bounds(plan)
        self._known = {repr(scenario_of(plan, c)): c for c in candidates(plan)}
        self.asked: list[Candidate] = []

    width = 1

    def run(
        self, scenarios: Sequence[dict[str, Any]], folder: str, ahead: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        return [self._answer(scenario) for scenario in scenarios]

    def floor_s(self, scenario: dict[str, Any], folder: str) -> float:
        c = self._known[repr(scenario)]
        digest = self._digest(c)
        return self._bounds.bound(c).time_s * (1 + self._spread * digest[0] / 255 * digest[2] / 255)

    def _digest(self, c: Candidate) -> bytes:
        return hashlib.sha256(f"{self._seed} {c!r}".encode()).digest()

    def _answer(self, scenario: dict[str, Any]) -> dict[str, Any]:
        c = self._known.get(repr(scenario))
        if c is None:  # the recommended one on a slower network
            return outcome(2.0, 1 << 30, 80 << 30)
        self.asked.append(c)
        bound = self._bounds.bound(c)
        digest = self._digest(c)
        step_s = bound.time_s * (1 + self._spread * digest[0] / 255)
        capacity = self._plan.sites[c.site].gpu.total_memory_bytes
        return outcome(step_s, bound.memory_bytes + self._more * digest[1] // 255, capacity)


def outcome(step_s: float, peak: int, capacity: int) -> dict[str, Any]:
    fits = peak <= capacity
    return {
        "version": 3, "fits": fits, "fits_gpu": fits, "step_s": step_s,
        "parts": {"compute": step_s * 0.6, "exposed_communication": step_s * 0.3, "bubble": 0.0,
                  "optimizer": step_s * 0.05, "other": step_s * 0.05},
        "exposed": {"tp": step_s * 0.25, "dp": step_s * 0.05}, "mfu": 0.4, "tokens_per_s": 1e5,
        "peak_device_bytes": min(peak, capacity), "capacity_bytes": capacity,
        "short_bytes": max(0, peak - capacity), "short_stage": 0, "host_short_bytes": 0,
        "at_peak": {"parameters": peak // 2, "activations": peak // 4}, "beside": {"nccl": peak // 8},
        "probability_fits": None, "step_band_s": [step_s * 0.9, step_s * 1.5],
    }  # fmt: skip
