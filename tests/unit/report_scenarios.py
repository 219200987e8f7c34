"""Small answered scenarios that the tests of the report share, each simulated once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sim.pipeline import Simulation, simulate
from sim.scenario.load import load_scenario_text

MODEL = """
model:
  hidden_size: 512
  intermediate_size: 1024
  num_hidden_layers: 3
  num_attention_heads: 8
  num_key_value_heads: 4
  vocab_size: 4096
  hidden_act: silu
"""
JOB = """
training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 64, precision: bf16, recompute: full}
"""
ZERO_3 = MODEL + "cluster: {node: dgx-h100, num_nodes: 2}\nframework: deepspeed\nparallelism: {zero: 3}" + JOB
ZERO_2 = MODEL + "cluster: {node: dgx-a100-80gb}\nframework: deepspeed\nparallelism: {zero: 2}" + JOB
DDP = MODEL + "cluster: {node: dgx-h100}\nframework: ddp" + JOB
TOO_LARGE = (
    "model: llama-2-13b\ncluster: {node: dgx-a100-40gb}\nframework: ddp\n"
    "training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 8, precision: bf16}\n"
)
TEXTS = {"zero_3": ZERO_3, "zero_2": ZERO_2, "ddp": DDP, "too_large": TOO_LARGE}


@cache
def answered(name: str) -> Simulation:
    """Return a recorded simulation of one of ``TEXTS``."""
    return simulate(load_scenario_text(TEXTS[name], f"{name}.yaml"), record=True)


def write(folder: Path, name: str) -> Path:
    """Write a scenario file and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(TEXTS[name], encoding="utf-8")
    return path
