"""A plan, as types: what is to be trained, on what it may run, what counts, and what things cost.

A :class:`Plan` is complete: every default has been filled in by ``load``, and ``assumptions`` says which were. All
values are in base units: seconds, bytes, watts, US dollars, joules.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic_core import core_schema

from sim.catalog.schema import GpuFacts, NetworkFacts, NodeFacts
from sim.scenario.draft import ModelDraft

Objective = Literal["cheapest", "fastest", "least_energy", "fewest_gpus", "trade_off"]
Term = Literal["on-demand", "reserved", "spot"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class _AsIs:
    """Marks a field whose value a reader has checked already."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.is_instance_schema(source)


class Workload(_Frozen):
    """What is to be trained. ``tokens`` or ``steps``; the other follows from the batch."""

    tokens: PositiveFloat | None = None
    steps: PositiveInt | None = None
    sequence_length: PositiveInt
    global_batch_sizes: tuple[PositiveInt, ...]
    """Sequences of an optimizer step that are tried, ascending."""
    precision: str | None = None
    attention: str | None = None
    optimizer: str = "adamw"

    def num_steps(self, global_batch_size: int) -> float:
        """Return the optimizer steps of the run; tokens need not fill the last."""
        if self.steps is not None:
            return float(self.steps)
        assert self.tokens is not None
        return max(1.0, self.tokens / (global_batch_size * self.sequence_length))


class Goal(_Frozen):
    """What counts. Limits hold for every goal; among what keeps them the best by ``objective`` is recommended."""

    objective: Objective = "cheapest"
    deadline_s: PositiveFloat | None = None
    budget_usd: PositiveFloat | None = None
    usd_per_s: NonNegativeFloat = 0.0
    """Of a trade-off: what a second sooner is worth."""


class Offer(_Frozen):
    """What is paid for a GPU, and to whom. Bought nodes are paid by the hour of their life."""

    provider: str
    term: str
    usd_per_gpu_hour: NonNegativeFloat
    date: str
    source: str
    pays_power: bool = False
    """Whether power and people are paid beside it: for what is owned or bought."""
    usd_per_gpu: NonNegativeFloat = 0.0
    """Of what is bought: the price of a GPU with its share of node and network."""


class Site(_Frozen):
    """One kind of node with its network, and what a GPU-hour on it costs."""

    name: str
    node: Annotated[NodeFacts, _AsIs()]
    gpu: Annotated[GpuFacts, _AsIs()]
    network: Annotated[NetworkFacts, _AsIs()] | None
    written: dict[str, Any]
    """``node`` and ``network`` as a scenario writes them."""
    num_gpus: tuple[PositiveInt, ...]
    owned_gpus: int = 0
    """So many GPUs are there already: they cost power and people, no rent."""
    offer: Offer


class Prices(_Frozen):
    """What is paid beside the GPUs, and how long what is bought lives."""

    usd_per_kwh: NonNegativeFloat
    pue: float = Field(ge=1.0, le=5.0)
    people_usd_per_s: NonNegativeFloat
    lifetime_s: PositiveFloat
    horizon_s: PositiveFloat
    storage_usd_per_byte_s: NonNegativeFloat


class Failures(_Frozen):
    """How often what breaks, and what is done about it."""

    gpu_mtbf_s: PositiveFloat
    """Of one GPU: mean time between failures that end the job."""
    node_mtbf_s: PositiveFloat
    """Of the rest of a node: host, NIC, cable, software."""
    detect_s: NonNegativeFloat
    restart_s: NonNegativeFloat
    repair_s: NonNegativeFloat
    """Until a broken node is back."""
    spare_nodes: int | None = None
    """None: as many as keep a job from waiting in 99 of 100 failures."""
    gpu_spread: float = Field(ge=0.0, le=0.2)
    """Standard deviation of GPUs' speed beyond what a step has of it; all wait for the slowest."""
    checkpoint_interval_s: PositiveFloat | None = None
    """None: the best one."""
    replicas: PositiveInt = 200
    """Simulated runs that the distribution is made of."""
    seed: int = 0


class Storage(_Frozen):
    """Where checkpoints go."""

    write_bytes_per_s_per_node: PositiveFloat
    write_bytes_per_s: PositiveFloat
    bytes_per_parameter: PositiveFloat
    kept: PositiveInt
    """Checkpoints that are kept."""


class Axes(_Frozen):
    """What is tried of each axis. Empty: what makes sense on each machine."""

    tp: tuple[PositiveInt, ...] = ()
    pp: tuple[PositiveInt, ...] = ()
    cp: tuple[PositiveInt, ...] = ()
    vpp: tuple[PositiveInt, ...] = ()
    zero: tuple[int, ...] = ()
    micro_batch_size: tuple[PositiveInt, ...] = ()
    recompute: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    shard_size: tuple[PositiveInt, ...] = ()


class Constraints(_Frozen):
    """What a candidate must keep."""

    max_power_w: PositiveFloat | None = None
    max_gpus: PositiveInt | None = None
    memory_margin: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of a GPU's memory that has to stay free."""


class Plan(_Frozen):
    """One question of what to buy and how to run it."""

    name: str
    folder: str
    model: Any
    """As a scenario writes it."""
    draft: Annotated[ModelDraft, _AsIs()]
    num_parameters: PositiveInt
    workload: Workload
    goal: Goal
    sites: tuple[Site, ...]
    frameworks: tuple[str, ...]
    axes: Axes
    prices: Prices
    failures: Failures
    storage: Storage
    constraints: Constraints
    assumptions: tuple[str, ...]
