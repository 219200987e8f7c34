"""Lower bounds of a candidate's memory and step, from the ledger alone: what no schedule and no luck can beat.

Time. The ops of a layer, sharded as the candidate shards them, are laid out on their streams with the durations that
they have on an idle machine, and nothing waits for a host: ``f`` and ``b`` are what forward and backward of a block
add. A pipeline rank s runs all its passes one after another, cannot start before the first microbatch has come through
the stages before it, and its last gradient has to go back through them:

    T  >=  max over s  of  sum over i < s of f_i  +  M (f_s + b_s)  +  sum over i < s of b_i

with a virtual stage's share of f_i and b_i where ranks have several (Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters", SC 2021, section 2.2). Megatron's messages between nodes take at least what
all ranks of a node, which send at one time, put on its NICs: each that a rank waits for between two passes adds that,
and so does each from rank to rank before its first pass and after its last (``_messages_s``). What is gathered before
the first forward and reduced from the last backward on takes what it takes of a node's NICs, and so does what is
gathered and reduced for every microbatch. Kernels take what they take on the slowest GPU (``_slowest``). Host,
launches, other contention, kernels that collectives other than tensor-parallel ones slow down, messages within a
node, and the optimizer's step are left out: they only add.

Memory. Weights, main gradients and optimizer states of the fullest stage, what autograd keeps of the microbatches that
are under way on it (1F1B: as many as stages from here to the end), and the CUDA context. Left out: what lives during a
pass, fragmentation, NCCL's buffers, libraries.

Checked by: tests/laws/test_planner_laws.py, against the simulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.cluster.topology import Cluster, build_cluster
from sim.cost.model import CostModel, CostSettings
from sim.cost.nccl.plan import plan_collective
from sim.cost.spread import Slowest, pipelines_of, slowest_of
from sim.engine.beside import durations_beside
from sim.engine.network import flow_of
from sim.ir.ledger import Kernel, Layer, Ledger
from sim.ir.program import COMPUTE, Collective, Compute, Record, Wait
from sim.ir.traffic import Traffic
from sim.model.transformer import describe
from sim.parallel.emit import LayerPlan, plan_layer
from sim.parallel.frameworks.flat import copy
from sim.parallel.frameworks.megatron import fused_gradients
from sim.parallel.precision import dtypes_of, exchange_sms_of, recompute_of, transformed
from sim.parallel.shard import ShardPlan, shard_ledger
from sim.parallel.stages import blocks_per_stage
from sim.planner.schema import Plan
from sim.planner.space import Candidate, scenario_of
from sim.scenario.load import load_scenario_mapping
from sim.scenario.schema import ClusterSpec, Scenario
from sim.units import TICKS_PER_S, ticks

SAFETY = 1 - 1e-6
"""Ticks are whole: sums of rounded times may fall short of the sum by so little."""
_DEVIATIONS = 0.5
"""The slowest GPU of a candidate is bounded in steps of so many standard deviations, 1 % of a step's time: candidates
share what was worked out for one of them."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No simulation of the candidate has a shorter step or holds less on a GPU.

    ``compute_s`` is what the kernels of a GPU take in a step, the mean of all.
    """

    time_s: float
    compute_s: float
    memory_bytes: int
    state_bytes: int
    stage: int
    """The stage that holds most."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one layer of a kind adds to the passes of a microbatch."""

    forward_s: float
    backward_s: float
    compute_s: float
    kept_bytes: int
    transient_bytes: int
    parameters: int


class Bounds:
    """Bounds of a plan's candidates. What layers of one shape cost is worked out once for each kind of GPU."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._parts: dict[tuple[object, ...], tuple[_Part, _Part, _Part]] = {}
        self._ledgers: dict[tuple[object, ...], Ledger] = {}
        self._plans: dict[tuple[object, ...], tuple[tuple[Layer, LayerPlan], ...]] = {}
        self._costs: dict[tuple[int, int, Slowest, str], tuple[CostModel, Cluster]] = {}
        self._alone: dict[tuple[object, ...], float] = {}
        self._traffic: dict[tuple[object, ...], Traffic] = {}

    def bound(self, c: Candidate) -> Bound:
        """Return the bound of a candidate."""
        embedding, block, head = self._parts_of(c)
        num_stages = c.pp * (2 if c.schedule in _IN_A_V else c.vpp)
        counts = blocks_per_stage(self._plan.draft.num_hidden_layers, num_stages)
        forward, backward, compute, kept, parameters = [], [], [], [], []
        for stage, blocks in enumerate(counts):
            ends = [embedding] * (stage == 0) + [head] * (stage == num_stages - 1)
            forward.append(blocks * block.forward_s + sum(part.forward_s for part in ends))
            backward.append(blocks * block.backward_s + sum(part.backward_s for part in ends))
            compute.append(blocks * block.compute_s + sum(part.compute_s for part in ends))
            kept.append(blocks * block.kept_bytes)
            parameters.append(blocks * block.parameters + sum(part.parameters for part in ends))
        ranks = _ranks(c, num_stages)
        m = c.num_microbatches
        time_s, before_s = 0.0, 0.0
        message_s = self._message_s(c)
        for rank, stages in enumerate(ranks):
            own = m * sum(forward[s] + backward[s] for s in stages)
            own += _messages_s(c, rank, message_s, max(forward[s] + backward[s] for s in stages))
            gathered_s, reduced_s = self._at_the_ends_s(c, sum(parameters[s] for s in stages))
            last = backward[stages[-1]] if c.schedule in _RETURNING else 0.0
            late_s = max(0.0, gathered_s / len(stages) - forward[stages[0]])
            own += late_s if c.vpp == 1 or not rank else 0.0
            own += max(0.0, reduced_s / len(stages) - last) if c.schedule in _RETURNING and not rank else 0.0
            time_s = max(time_s, before_s + own)
            if c.schedule in _RETURNING:
                before_s += 2 * message_s + forward[rank] + backward[rank] + (late_s if c.vpp > 1 and not rank else 0.0)
            elif c.schedule not in _IN_A_V:
                before_s += forward[rank]
        compute_s = m * sum(compute) / c.pp
        memory, states, fullest = 0, 0, 0
        for rank, stages in enumerate(ranks):
            state = _state_bytes(c, sum(parameters[s] for s in stages))
            held = state + _under_way(c, rank) * min(kept[s] for s in stages)
            at_head = head.kept_bytes + head.transient_bytes if num_stages - 1 in stages else 0
            held += max(block.transient_bytes, at_head)
            if held > memory:
                memory, states, fullest = held, state, rank
        gpu = self._plan.sites[c.site].gpu
        return Bound(
            time_s=max(time_s, self._network_s(c, sum(parameters), block.parameters)) * SAFETY,
            compute_s=compute_s * SAFETY,
            memory_bytes=memory + gpu.cuda_context_bytes,
            state_bytes=states,
            stage=fullest,
        )

    # --- a layer -----------------------------------------------------------------------------

    def _parts_of(self, c: Candidate) -> tuple[_Part, _Part, _Part]:
        site = self._plan.sites[c.site]
        in_node = min(site.node.num_gpus, c.num_gpus)
        key = (
            c.site, in_node, c.num_gpus > in_node, c.framework, c.tp, c.cp, c.zero == 3, c.micro_batch_size,
            c.recompute, c.pp > 1 and c.framework == "deepspeed", c.dp == 1, _slowest(c),
            min(c.num_gpus // c.pp, 2 * in_node),
        )  # fmt: skip
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._price(c, in_node)
        return found

    def _price(self, c: Candidate, in_node: int) -> tuple[_Part, _Part, _Part]:
        scenario = load_scenario_mapping(scenario_of(self._plan, c), "bound", folder=self._plan.folder)
        cost, cluster = self._cost(c, scenario, in_node)
        found = []
        for layer, plan in self._layers(c, scenario):
            forward = self._times(c, cost, cluster, plan.forward)
            backward = self._times(c, cost, cluster, plan.backward)
            kept, there = _bytes(layer, plan, plan.forward, 0)
            _, back = _bytes(layer, plan, plan.backward, kept)
            gather_s, reduce_s = _copies_s(c, cost, layer)
            found.append(
                _Part(
                    forward_s=forward[0] + gather_s,
                    backward_s=backward[0] + gather_s + reduce_s,
                    compute_s=forward[1] + backward[1] + 2 * gather_s + reduce_s,
                    kept_bytes=kept,
                    transient_bytes=max(there, back) - kept,
                    parameters=layer.num_parameters,
                )
            )
        return found[0], found[1], found[2]

    def _layers(self, c: Candidate, scenario: Scenario) -> tuple[tuple[Layer, LayerPlan], ...]:
        """Return embedding, block and head as a rank of the candidate has them, with the plans of their passes."""
        training, dtypes = scenario.training, dtypes_of(scenario)
        flash = scenario.cluster.gpu.compute_capability >= (8, 0)
        local = scenario.framework != "megatron" or scenario.megatron.transformer_impl == "local"
        whole = (training.code, dtypes, training.micro_batch_size, training.attention, flash, local, scenario.megatron)
        key = (*whole, c.framework, c.tp, c.cp, training.recompute)
        found = self._plans.get(key)
        if found is not None:
            return found
        ledger = self._ledgers.get(whole)
        if ledger is None:
            ledger = self._ledgers[whole] = describe(
                scenario.model, training, parameter_dtype=dtypes.parameter, compute_dtype=dtypes.compute,
                autocast=dtypes.autocast, flash=flash, local=local, megatron=scenario.megatron,
            )  # fmt: skip
        # three layers stand for all: blocks are one object
        ends = Ledger(
            layers=(ledger.layers[0], ledger.layers[1], ledger.layers[-1]), parameter_dtype=ledger.parameter_dtype,
            compute_dtype=ledger.compute_dtype, batch_inputs=ledger.batch_inputs, matmul_flops=ledger.matmul_flops,
            flops_formula=ledger.flops_formula,
        )  # fmt: skip
        sharded = transformed(shard_ledger(
            ends,
            ShardPlan(
                tp=c.tp, sp=c.sp, cp=c.cp, style="megatron" if c.framework in ("megatron", "deepspeed") else "dtensor",
                prepare_module_input=c.framework == "fsdp2",
            ),
        ), scenario)  # fmt: skip
        fused = c.framework == "megatron" and scenario.megatron.gradient_accumulation_fusion
        recompute = recompute_of(scenario)
        found = self._plans[key] = tuple(
            (
                layer,
                plan_layer(
                    layer, recompute, sharded.parameter_dtype, sharded.batch_inputs,
                    fused_gradients(layer) if fused else frozenset(),
                ),
            )
            for layer in sharded.layers
        )  # fmt: skip
        return found

    # --- time --------------------------------------------------------------------------------

    def _cost(self, c: Candidate, scenario: Scenario, in_node: int) -> tuple[CostModel, Cluster]:
        """Return the cost model of a small cluster that holds a tensor-parallel group: two nodes if it has several."""
        nodes = max(min(2, scenario.cluster.num_nodes), -(-c.tp // in_node))
        key = (c.site, in_node * nodes, _slowest(c), c.framework)
        found = self._costs.get(key)
        if found is None:
            spec = scenario.cluster
            small = ClusterSpec(
                node=spec.node, gpu=spec.gpu, network=spec.network if nodes > 1 else None, num_nodes=nodes,
                num_gpus=in_node * nodes, written=spec.written,
            )  # fmt: skip
            cluster = build_cluster(small)
            settings = CostSettings(
                compiled=scenario.training.compile, code=scenario.training.code, slowest=_slowest(c),
                exchange_sms=exchange_sms_of(scenario),
            )  # fmt: skip
            found = self._costs[key] = (CostModel(cluster, spec.gpu, settings), cluster)
        return found

    def _times(self, c: Candidate, cost: CostModel, cluster: Cluster, steps: Iterable[Any]) -> tuple[float, float]:
        """Return what a layer's pass takes where layers follow each other, and what of it kernels take.

        Kernels beside a tensor-parallel exchange are as much slower as the engine makes them. Whatever else runs takes
        SMs too: no kernel gets further by any tick, so no exchange begins earlier, and what it slows down is no less.
        Where matmuls hold all SMs to their end that does not follow (what holds up one exchange spares another kernel),
        and nothing is counted.
        """
        instructions = [step for step in steps if isinstance(step, Compute | Collective | Record | Wait)]
        slower: Mapping[int, int] = {}
        if c.tp > 1 and not cost.persistent:

            def alone(kernel: Kernel) -> int:
                return ticks(cost.kernel_s(kernel, 0))

            def traffic_of(message: Collective) -> Traffic | None:
                return cost.exchanged(self._traffic_of(c, cluster, message)) if message.axis == "tp" else None

            slower = durations_beside((*instructions,) * 3, alone, traffic_of, cost, 0)
        clock: dict[str, float] = {}
        events: dict[str, float] = {}
        ends = []
        compute_s = 0.0
        at = 0
        for repeat in range(3):
            for step in instructions:
                if isinstance(step, Compute):
                    time_s = cost.kernel_s(step.kernel, 0)
                    if not repeat:
                        compute_s += time_s
                    if at in slower:
                        time_s = max(time_s, slower[at] / TICKS_PER_S)
                    clock[step.stream] = clock.get(step.stream, 0.0) + time_s
                elif isinstance(step, Collective):
                    time_s = self._alone_s(c, cluster, step)
                    clock[step.stream] = clock.get(step.stream, 0.0) + time_s
                elif isinstance(step, Record):
                    events[step.event] = clock.get(step.stream, 0.0)
                else:
                    clock[step.stream] = max(clock.get(step.stream, 0.0), events.get(step.event, 0.0))
                at += 1
            ends.append(clock.get(COMPUTE, 0.0))
        return min(ends[2] - ends[1], ends[1] - ends[0]) if slower else ends[2] - ends[1], compute_s

    def _alone_s(self, c: Candidate, cluster: Cluster, collective: Collective) -> float:
        """Return the time of a tensor-parallel collective that shares its links with nothing else."""
        if collective.axis != "tp":
            return 0.0
        stage = min(cluster.num_gpus, c.num_gpus // c.pp)
        key = (c.site, cluster.num_gpus, stage, c.tp, collective.kind, collective.tensor_bytes)
        found = self._alone.get(key)
        if found is None:
            traffic = self._traffic_of(c, cluster, collective)
            flows = [flow_of(phase, cluster.links) for phase in traffic.phases]
            found = self._alone[key] = sum(flow.latency / TICKS_PER_S + flow.alone_s for flow in flows)
        return found

    def _traffic_of(self, c: Candidate, cluster: Cluster, collective: Collective) -> Traffic:
        """Return what all tensor-parallel groups of a stage in the small cluster move together.

        Groups of other stages, which stand behind it (tp-cp-dp-pp), need not meet at the same time.
        """
        gpus = max(c.tp, min(cluster.num_gpus, c.num_gpus // c.pp))
        key = (c.site, cluster.num_gpus, gpus, c.tp, collective.kind, collective.tensor_bytes)
        found = self._traffic.get(key)
        if found is None:
            groups = tuple(tuple(range(at, at + c.tp)) for at in range(0, gpus - c.tp + 1, c.tp))
            found = plan_collective(cluster, groups, collective.kind, collective.tensor_bytes)
            self._traffic[key] = found
        return found

    def _nic_s(self, c: Candidate, ranks: int, num_bytes: float) -> float:
        """Return the time that a rank's share of its node's NICs needs for a ring's (n - 1) / n of so many bytes.

        ``ranks`` are those of the ring; those of them in one node share their shares: of n nodes each sends as much.
        """
        site = self._plan.sites[c.site]
        if site.network is None or c.num_gpus <= site.node.num_gpus or site.node.nvlink_domain_nodes > 1:
            return 0.0
        in_node = max(1, min(ranks, site.node.num_gpus // c.tp))
        nodes = -(-ranks // in_node)
        rings_in_node = max(1, site.node.num_gpus // in_node)
        rate = site.network.nic_bytes_per_s * site.network.nics_per_node / rings_in_node
        return num_bytes * (nodes - 1) / nodes / rate

    def _message_s(self, c: Candidate) -> float:
        """Return the time that a node's NICs need for one message of each of its GPUs to another node's.

        A stage's ranks are neighbours (tp-cp-dp-pp, megatron/core/parallel_state.py): where they fill whole nodes, all
        of a node send to another. A message is a microbatch's hidden states in 16 bit, divided over the sequence.
        """
        site = self._plan.sites[c.site]
        ranks = c.tp * c.cp * c.dp
        waited_for = c.framework == "megatron" and c.schedule in ("1f1b", "interleaved")
        if c.pp == 1 or not waited_for or ranks % site.node.num_gpus or site.node.nvlink_domain_nodes > 1:
            return 0.0
        if site.network is None:
            return 0.0
        tokens = c.micro_batch_size * self._plan.workload.sequence_length // (c.cp * c.tp)
        num_bytes = 2 * tokens * self._plan.draft.hidden_size
        return site.node.num_gpus * num_bytes / (site.network.nic_bytes_per_s * site.network.nics_per_node)

    def _at_the_ends_s(self, c: Candidate, parameters: int) -> tuple[float, float]:
        """Return the times to gather a rank's parameters before the first forward, and to reduce their gradients.

        Megatron's distributed optimizer gathers in 16 bit as the first microbatch's forward needs it and reduces in
        fp32 from the last microbatch's backward on (megatron/core/distributed/param_and_grad_buffer.py).
        """
        if c.framework != "megatron" or c.dp * c.cp == 1:
            return 0.0, 0.0
        each = self._nic_s(c, c.dp * c.cp, 1.0)
        return (2 * parameters * each if c.zero else 0.0), 4 * parameters * each

    def _network_s(self, c: Candidate, parameters: int, block: int) -> float:
        """Return the time that NICs need for what a framework gathers and reduces for every microbatch.

        Each microbatch gathers the shards in 16 bit for forward and for backward, those of the embedding and the head
        (``parameters`` of all, less those of the blocks) once, and reduces gradients: FSDP2 in fp32 (sim's default),
        ZeRO-3 in 16 bit. Torch's pipelines gather and reduce once a step, or more often (``_PipelineScheduleRuntime``).
        """
        blocks = block * self._plan.draft.num_hidden_layers
        ends = parameters - blocks
        times = c.num_microbatches
        if c.framework == "fsdp2" and c.pp > 1:
            moved, times = 6 * parameters, 1
        elif c.framework in ("fsdp1", "fsdp2"):
            moved = 8 * blocks + 6 * ends if c.zero == 3 else 4 * parameters
            moved -= 2 * parameters if c.framework == "fsdp1" else 0
        elif c.framework == "deepspeed" and c.zero == 3:
            moved = 6 * blocks + 4 * ends
        else:
            return 0.0
        return times * moved / c.pp * self._nic_s(c, c.shard_size or c.dp * c.cp, 1.0)


_IN_A_V = ("zb-v", "v-half", "v-min", "dualpipev")
_RETURNING = ("1f1b", "interleaved", "gpipe")
"""Schedules whose last pass on every rank is a whole backward, whose gradient goes back through the ranks before."""


def _messages_s(c: Candidate, rank: int, message_s: float, turn_s: float) -> float:
    """Return what Megatron's messages add at least to the passes of a rank, between its first and its last.

    1F1B: all are waited for, those one way and back of one turn together; the first rank's backward sends nothing and
    its forward receives nothing, the last rank's the other way round. Interleaved: those of warm-up and cool-down are
    waited for, at least one after each pass; those of the turns between them, of a forward and a backward (``turn_s``
    at most), run beside passes (``forward_backward_pipelining_with_interleaving`` with ``overlap_p2p_comm``), but
    each has to be through before the next of its way.
    """
    m = c.num_microbatches
    if not message_s:
        return 0.0
    if c.schedule == "1f1b":
        warmup = min(c.pp - rank - 1, m)
        if rank == 0:
            return max(0, m + warmup - 1) * message_s
        return (m - 1 if rank == c.pp - 1 else 2 * m - 1) * message_s
    total = m * c.vpp
    warmup = min(2 * (c.pp - rank - 1) + (c.vpp - 1) * c.pp, total)
    turns = total - warmup
    carried_s = max(0.0, 2 * turns - m - 4) * message_s  # one stage in so many sends or receives nothing one way
    return max(0, 2 * warmup - 2) * message_s + max(0.0, carried_s - turns * turn_s)


def _copies_s(c: Candidate, cost: CostModel, layer: Layer) -> tuple[float, float]:
    """Return the kernels' times by which FSDP2 copies out what it gathered of a block, and in what it reduces.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, ``foreach_all_gather_copy_out`` and
    ``foreach_reduce_scatter_copy_in``.
    """
    if c.framework != "fsdp2" or c.dp == 1 or layer.kind != "block":
        return 0.0, 0.0
    parameters = layer.num_parameters
    out = copy("copy out", parameters, "bf16", "bf16")
    in_ = copy("copy in", parameters, "bf16", "fp32")
    return cost.kernel_s(out.kernel, 0) if c.zero == 3 else 0.0, cost.kernel_s(in_.kernel, 0)


def _slowest(c: Candidate) -> Slowest:
    """Return a pace that the slowest GPU of a candidate does not beat, one of few."""
    pipelines = pipelines_of(c.framework, c.zero, c.dp)
    exact = slowest_of(c.num_gpus, c.pp, c.num_microbatches * c.vpp, pipelines)
    return Slowest(1, exact.deviations // _DEVIATIONS * _DEVIATIONS)


def _ranks(c: Candidate, num_stages: int) -> list[list[int]]:
    """Return the virtual stages of each pipeline rank."""
    if c.schedule in _IN_A_V and c.pp > 1:
        return [[rank, num_stages - 1 - rank] for rank in range(c.pp)]
    return [list(range(rank, num_stages, c.pp)) for rank in range(c.pp)]


def _under_way(c: Candidate, rank: int) -> int:
    """Return the passes of single virtual stages whose activations a rank holds at its fullest, at least.

    1F1B: a rank runs as many forward passes ahead as there are ranks behind it. Interleaved: twice that, and all its
    chunks but one of p microbatches more (``get_num_warmup_microbatches`` in
    megatron/core/pipeline_parallel/schedules.py). Others: one microbatch.
    """
    m = c.num_microbatches
    if c.pp == 1:
        return 1
    if c.schedule == "1f1b":
        return min(m, c.pp - rank)
    if c.schedule == "gpipe":
        return m
    if c.schedule == "interleaved":
        return min(m * c.vpp, 2 * (c.pp - rank - 1) + (c.vpp - 1) * c.pp + 1)
    return 1


def _state_bytes(c: Candidate, parameters: int) -> int:
    """Return the bytes of weights, main gradients and Adam's states that a rank holds while activations are.

    Sources: Rajbhandari et al., "ZeRO", SC 2020, section 3 (2 + 2 + 12 bytes a parameter), and the frameworks' own
    buffers: Megatron accumulates in fp32 (megatron/core/distributed/param_and_grad_buffer.py), FSDP2 shards fp32.
    """
    several = c.num_microbatches > 1
    if c.framework == "megatron":
        return int(parameters * (6 + 12 / (c.dp * c.cp if c.zero else 1)))
    if c.framework == "deepspeed":
        whole, sharded = {0: (14, 0), 1: (2, 12), 2: (2, 12), 3: (0, 14)}[c.zero]
        return int(parameters * (whole + sharded / (c.dp * c.cp)))
    if c.framework in ("fsdp1", "fsdp2"):
        return int(parameters * (16 if several else 12) / (c.shard_size or c.dp * c.cp))
    return parameters * 12


def _bytes(layer: Layer, plan: LayerPlan, steps: Sequence[Any], held: int) -> tuple[int, int]:
    """Return the bytes that a layer's pass leaves alive and its peak, beginning with ``held``."""
    sizes: Mapping[int, int] = {
        0: layer.input.num_bytes if layer.input else 0,
        1: layer.output.num_bytes if layer.output else 0,
        2: layer.output.num_bytes if layer.output else 0,
        3: layer.input.num_bytes if layer.input else 0,
    }
    peak = held
    for step in steps:
        if step.__class__ is not tuple or step[0] not in ("alloc", "free"):
            continue
        slot = step[1]
        num_bytes = sizes[slot] if slot < 4 else plan.slots[slot - 4].num_bytes
        if slot >= 4 and plan.slots[slot - 4].parameter:
            continue  # gradients are the framework's
        held += num_bytes if step[0] == "alloc" else -num_bytes
        peak = max(peak, held)
    return held, peak
