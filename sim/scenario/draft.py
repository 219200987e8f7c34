"""What is known of a question while it is still being read.

A value that is missing or wrong has been reported where it stands; whoever asks for it here gets ``UnknownError``, and
the rule that asked is skipped. So each mistake is reported once, and every rule that can be checked is.
"""

from __future__ import annotations

from typing import Any, Literal

from sim.catalog.schema import GpuFacts, NetworkFacts, NodeFacts
from sim.interop.deepspeed_config import DeepSpeedReading


class UnknownError(Exception):
    """A value that is not known, because it was wrong where it stands."""


class _Partial:
    """An object whose attributes may be absent."""

    def __getattr__(self, name: str) -> Any:
        raise UnknownError(name)

    def knows(self, *names: str) -> bool:
        return all(name in self.__dict__ for name in names)

    def forget(self, *names: str) -> None:
        for name in names:
            self.__dict__.pop(name, None)


class ModelDraft(_Partial):
    """Fields of ``schema.ModelConfig``, and where the model comes from."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_act: str
    norm: str
    position: str
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_local_experts: int | None
    num_experts_per_tok: int | None
    at: Literal["place", "catalogue", "file"]
    family: str
    given_positions: bool
    """Whether the config itself says ``max_position_embeddings``."""


class Draft(_Partial):
    """The question, as far as it is known. Names are those of the scenario file; defaults are filled in."""

    model: ModelDraft
    framework: str
    node: NodeFacts
    gpu: GpuFacts
    network: NetworkFacts | None
    backend: str
    sharp: bool | None
    """As the file says; the network's own where it does not."""
    alpha: float | None
    beta: float | None
    nccl: tuple[int, int]
    num_nodes: int
    num_gpus: int
    gives_nodes: bool
    """Whether the file itself says ``num_nodes``."""
    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    zero: int
    sp: bool
    schedule: str
    vpp: int
    layers_per_stage: tuple[int, ...] | None
    order: tuple[str, ...] | None
    cp_comm: str
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    precision: str
    optimizer: str
    recompute: str
    attention: str
    gradient_clipping: float
    compile: bool
    norms: str | None
    softmax: str | None
    metrics: int
    launch_blocking: bool
    cpu_threads: int
    sample_length: int
    recompute_interval: int
    code: str
    checkpoint: str
    loss: str
    deepspeed: DeepSpeedReading | None
    faults: Any
    offload_optimizer: str
    offload_param: str
