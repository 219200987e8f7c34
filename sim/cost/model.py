"""CostModel: how long each single instruction takes. The one object of this layer that the engine sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sim.catalog.schema import GpuFacts
from sim.cost import efficiency, host
from sim.cost.attention import AttentionCoefficients, attention_s
from sim.cost.gemm import PERSISTENT, GemmCoefficients, alignment_factor, blocks_of, gemm_s, result_s
from sim.cost.memory_bound import memory_bound_s
from sim.cost.roofline import Beside, Machine, left_of, machine_of, peak_of
from sim.cost.spread import ALONE, Slowest, Spread, spread_of
from sim.ir.ledger import DTYPE_BYTES, Attention, Gemm, Kernel, Pointwise, size
from sim.ir.program import Caller, Collective, Communicator, Copy, HostCompute, Recv, Send
from sim.ir.traffic import Link, Traffic

if TYPE_CHECKING:
    from sim.cluster.topology import Cluster
    from sim.cost.backend import Backend
    from sim.cost.calibrated import Calibrated
    from sim.scenario.calibration import Calibration


@dataclass(frozen=True, slots=True)
class CostSettings:
    """How the job runs, as far as durations depend on it.

    ``placement``   GPU index of each rank; empty: rank i is on GPU i
    ``compiled``    kernels are issued by code that torch.compile wrote
    ``code``        whose modules run: torch, huggingface or megatron
    ``sustained``   compute-bound kernels follow each other closely, as in training, so that the clock has settled;
                    False: each kernel starts at the boost clock, as in a short benchmark
    ``exchange_sms`` SMs that tensor parallelism's exchanges take where Transformer Engine's user buffers make them;
                    0: NCCL's channels
    ``slow``        rank -> factor on its kernels' times
    ``slowest``     whose pace all ranks have: the slowest's of so many GPUs that wait for each other
    ``calibration`` what was measured on the user's own machine
    ``cpu_threads`` OpenMP threads of each rank; 0: all cores of the node, which its ranks share
    """

    placement: tuple[int, ...] = ()
    compiled: bool = False
    code: str = "torch"
    sustained: bool = True
    exchange_sms: int = 0
    slow: Mapping[int, float] = field(default_factory=dict)
    slowest: Slowest = ALONE
    calibration: Calibration | None = None
    cpu_threads: int = 0


_DEFAULT = CostSettings()
RING_MEMORY_BYTES = 3.0
"""Bytes of a GPU's memory for each byte that it sends: its neighbour writes the byte into a buffer, the GPU reads it
from there, and reads what it adds or writes the result (NCCL, src/device/prims_simple.h: recvReduceCopySend)."""
NVLS_MEMORY_BYTES = 2.0
"""The switch reduces and multicasts: each GPU reads and writes a byte once (src/device/prims_simple.h, MULTIMEM)."""
COPY_MEMORY_BYTES = 2.0
"""A copy engine reads each byte that goes, and writes each that comes."""
MOST_TAKEN = 0.5
"""Largest share of SMs or bandwidth that collectives are taken to hold: what computes has at least an equal part."""
FLAG_SMS = 1
"""A block that waits for flags beside a shift's copies is of a warp or two, for which there is room beside a product's
block on the same SM: 384 threads of 168 registers leave a thousand of 65,536 (cuBLAS's nvjet in NVIDIA/Fuser #5742)."""
_TOKENS = ("batch", "seq")
"""Dimensions that count tokens: a product that contracts over them is the gradient of a weight."""
_FAMILIES = "families of kernels bound by memory"
"""Stands in the account of assumptions for all of them together."""

_FAMILY_ORDER = (
    "elementwise", "norm", "gather", "copy", "reduce", "amax", "softmax", "scatter", "transpose", "columns",
    "optimizer",
)  # fmt: skip
"""In which they are named: which of them is priced first depends on how ranks are folded."""
_SUBJECTS = ("matmuls", "attention", "sdpa", _FAMILIES, "collectives", "CPU Adam")
"""How assumptions begin, in the order in which they are listed; those of the host come first."""


def _subject(text: str) -> tuple[int, str]:
    """Return where an assumption stands in the list: which is met first depends on how ranks are folded."""
    return next((i for i, word in enumerate(_SUBJECTS) if text.startswith(word)), -1), text


def _family(family: str) -> tuple[int, str]:
    """Return where a family stands among those that are named together."""
    return (_FAMILY_ORDER.index(family) if family in _FAMILY_ORDER else len(_FAMILY_ORDER), family)


class CostModel:
    """Durations on ``cluster``, all of whose GPUs are ``gpu``. Implements ``sim.engine.cost.Cost``.

    Kernels are priced once by value and found again by identity: layers that repeat are the same objects.
    """

    def __init__(self, cluster: Cluster, gpu: GpuFacts, settings: CostSettings = _DEFAULT) -> None:
        self._cluster = cluster
        self.gpu = gpu
        self._settings = settings
        self._source = efficiency.source_of(gpu)
        calibration = settings.calibration
        own = calibration.host if calibration is not None else None
        self._host = host.host_coefficients(cluster.spec.node.cpu, settings.code, settings.compiled, own)
        self._memory = efficiency.memory_coefficients(gpu)
        slowest = settings.slowest.deviations
        self._spread = spread_of(gpu) if slowest else Spread(0.0, 0.0)
        self._pace = 1 + self._spread.matmul * slowest
        self._memory_pace = 1 + self._spread.memory * slowest
        vector_flops = gpu.peak_flops.get("fp32") or min(gpu.peak_flops.values())
        self._vector = Machine(vector_flops, 4, gpu.num_sms, gpu.boost_clock_hz, gpu.memory_bytes_per_s, gpu.l2_bytes)
        self._machines: dict[str, Machine] = {}
        self._gemms: dict[str, tuple[GemmCoefficients, str]] = {}
        self._attentions: dict[tuple[str, bool, str, int], tuple[AttentionCoefficients, str, Machine]] = {}
        self._by_identity: dict[int, tuple[float, Kernel]] = {}
        self._by_value: dict[tuple[object, ...], float] = {}
        self._traffic: dict[tuple[object, ...], Traffic] = {}
        self._planned: dict[tuple[object, ...], Traffic] = {}
        self._spans: dict[int, bool] = {}
        self.persistent = gpu.vendor == "nvidia" and gpu.compute_capability in PERSISTENT
        """Blocks of matmuls stay on their SMs until the kernel ends."""
        self._blocks: dict[tuple[int, ...], int] = {}
        self._assumed: dict[str, int] = {}
        self._guessed_families: dict[str, int] = {}
        if self._host.assumed:
            self._assume(self._host.assumed)
        self.calibrated: Calibrated | None = None
        """What the user's own measurements change, if there are any."""
        if calibration is not None:
            from sim.cost.calibrated import Calibrated

            self.calibrated = Calibrated(calibration, cluster, lambda kernel: self._model(kernel, None)[0])
        self.host_assumed = bool(self._host.assumed)
        """The speed of the node's processor is not known."""
        self.num_kernels = 0
        """Different kernels priced so far."""
        self.num_assumed_kernels = 0
        """Those of them whose time rests on numbers that were not measured on this GPU."""

    # --- kernels -------------------------------------------------------------------------------

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        """Return the time of ``kernel`` alone on the GPU of ``rank``, in seconds: at the pace of the slowest."""
        found = self._by_identity.get(id(kernel))
        if found is None:
            found = self._by_identity[id(kernel)] = (self._price(kernel), kernel)
        slow = self._settings.slow
        return found[0] * slow.get(rank, 1.0) if slow else found[0]

    def beside_s(self, kernel: Kernel, rank: int, sms: int, memory_bytes_per_s: float) -> float:
        """Return the time of ``kernel`` while collectives hold so many SMs and move so much of the GPU's memory."""
        memory_share = min(memory_bytes_per_s / self.gpu.memory_bytes_per_s, MOST_TAKEN)
        beside = Beside(min(sms, int(self.gpu.num_sms * MOST_TAKEN)), memory_share)
        return self._price(kernel, beside) * self._settings.slow.get(rank, 1.0)

    def waits_for_sms(self, kernel: Kernel, sms: int) -> bool:
        """Return whether the blocks of ``kernel`` stay on their SMs until it ends, and are too many beside ``sms``."""
        if not self.persistent or not isinstance(kernel, Gemm) or sms <= max(kernel.margin, FLAG_SMS):
            return False
        num_sms = self.gpu.num_sms
        shape = (size(kernel.m), size(kernel.n), size(kernel.k), size(kernel.batch) * kernel.pieces)
        blocks = self._blocks.get(shape)
        if blocks is None:
            coefficients = efficiency.gemm_coefficients(self._source, peak_of(self.gpu, kernel.dtype)[1])[0]
            blocks = self._blocks[shape] = blocks_of(*shape, self._machine(kernel.dtype), coefficients)
        return blocks > num_sms - min(sms, int(num_sms * MOST_TAKEN))

    def memory_bytes(self, traffic: Traffic) -> float:
        """Return the bytes that a collective moves in the memory of each GPU; of another library's than NCCL's, which
        are slow beside that memory, nothing is counted."""
        algorithm = traffic.algorithm.partition("/")[0]
        if algorithm == "copy":
            return traffic.wire_bytes * COPY_MEMORY_BYTES
        if not self._backend.is_nccl:
            return 0.0
        return traffic.wire_bytes * (NVLS_MEMORY_BYTES if algorithm.startswith("nvls") else RING_MEMORY_BYTES)

    def _price(self, kernel: Kernel, beside: Beside | None = None) -> float:
        key: tuple[object, ...]
        if isinstance(kernel, Gemm):
            over_tokens = any(dim.name in _TOKENS for dim in kernel.k)
            key = (
                "gemm",
                size(kernel.m),
                size(kernel.n),
                size(kernel.k),
                size(kernel.batch),
                kernel.dtype,
                over_tokens,
                kernel.result,
                kernel.accumulates,
                kernel.pieces,
                kernel.margin,
                kernel.promotes,
            )
        elif isinstance(kernel, Pointwise):
            key = (kernel.kind, kernel.moved_bytes, kernel.flops, kernel.random_numbers)
        else:
            shapes = (kernel.batch, kernel.heads, kernel.kv_heads, kernel.query, kernel.key, kernel.head_dim)
            key = (kernel.kernel, kernel.direction, *map(size, shapes), kernel.causal, kernel.dtype)
        if beside is not None:
            key = (*key, beside)
        time_s = self._by_value.get(key)
        if time_s is None:
            time_s, assumed = self._model(kernel, beside)
            if self.calibrated is not None:
                time_s, assumed = self._as_measured(self.calibrated, kernel, time_s, assumed, beside is None)
            time_s *= self._memory_pace if isinstance(kernel, Pointwise) else self._pace
            self._by_value[key] = time_s
            if beside is not None:
                return time_s
            self.num_kernels += 1
            if assumed:
                if assumed == _FAMILIES and isinstance(kernel, Pointwise):
                    self._guessed_families[kernel.kind] = self._guessed_families.get(kernel.kind, 0) + 1
                self.num_assumed_kernels += 1
                self._assumed[assumed] = self._assumed.get(assumed, 0) + 1
        return time_s

    def _model(self, kernel: Kernel, beside: Beside | None) -> tuple[float, str]:
        """Return the time by the catalogue's coefficients, and what of it is assumed."""
        if isinstance(kernel, Gemm):
            return self._gemm(kernel, beside)
        if isinstance(kernel, Pointwise):
            return self._pointwise(kernel, beside)
        return self._attention(kernel, beside)

    @staticmethod
    def _as_measured(own: Calibrated, kernel: Kernel, time_s: float, assumed: str, count: bool) -> tuple[float, str]:
        ratio, how = own.ratio(kernel)
        if not how:
            return time_s, assumed
        if count:
            own.note(type(kernel).__name__, how)
        return time_s * ratio, ""

    def _machine(self, dtype: str) -> Machine:
        machine = self._machines.get(dtype)
        if machine is None:
            machine = self._machines[dtype] = machine_of(self.gpu, dtype)
        return machine

    def _matmul_machine(self, dtype: str) -> Machine:
        """The GPU at the clock that its power limit leaves to matmuls."""
        machine, share = self._machine(dtype), self._source.limited
        if share == 1.0:
            return machine
        key = f"{dtype}, limited"
        if key not in self._machines:
            lower = replace(machine, peak_flops=machine.peak_flops * share, clock_hz=machine.clock_hz * share)
            self._machines[key] = lower
        return self._machines[key]

    def _gemm(self, kernel: Gemm, beside: Beside | None) -> tuple[float, str]:
        dtype = kernel.dtype
        if dtype not in self._gemms:
            rate_of = peak_of(self.gpu, dtype)[1]
            coefficients, whose = efficiency.gemm_coefficients(self._source, rate_of)
            if self._settings.sustained:
                droop = efficiency.sustained_droop(self._source, rate_of, coefficients.droop)
                coefficients = replace(coefficients, droop=droop)
            assumed = ""
            if whose:
                assumed = f"matmuls in {dtype} on {self.gpu.name}: shares of peak and bandwidth are those of {whose}"
            if rate_of != dtype:
                assumed += f"{'; ' if assumed else f'matmuls in {dtype}: '}run at the rate of {rate_of}"
            self._gemms[dtype] = (coefficients, assumed)
        coefficients, assumed = self._gemms[dtype]
        machine = self._matmul_machine(dtype)
        if kernel.margin and (beside is None or beside.sms <= kernel.margin):  # tiles for those that it may use
            machine = left_of(machine, Beside(kernel.margin, 0.0 if beside is None else beside.memory_share))
            beside = None
        left_sms = 0
        if beside is not None and self.persistent:
            left_sms = machine.num_sms - beside.sms if beside.sms > FLAG_SMS else 0
            machine = left_of(machine, Beside(0, beside.memory_share))
        elif beside is not None:  # the tiles were chosen for all SMs: those that are left work in whole waves
            machine, coefficients = left_of(machine, beside), replace(coefficients, tail_smoothing=0.0)
        m, n, k, batch = size(kernel.m), size(kernel.n), size(kernel.k), size(kernel.batch)
        over_tokens = any(dim.name in _TOKENS for dim in kernel.k)
        rows = (m, n) if over_tokens else (n, k)
        alignment = efficiency.alignment_of(self.gpu, dtype, batch)
        factor = alignment_factor(*rows, machine.element_bytes, alignment)
        if self._source.limited == 1.0:
            factor *= self._source.power
        if kernel.promotes and machine.element_bytes == 1:
            factor /= efficiency.promotion(self.gpu)
        sustained = self._settings.sustained
        time_s = gemm_s(m, n, k, batch * kernel.pieces, machine, coefficients, factor, sustained, left_sms)
        time_s /= kernel.pieces
        if kernel.accumulates or kernel.result is not None:
            c_bytes = DTYPE_BYTES[kernel.result or "bf16"] * (2 if kernel.accumulates else 1)
            exposed = efficiency.exposed_accumulation(self._source)
            time_s += result_s(m, n, batch, c_bytes, exposed, machine, coefficients)
        return time_s, assumed

    def _attention(self, kernel: Attention, beside: Beside | None) -> tuple[float, str]:
        backward = kernel.direction == "backward"
        key = (kernel.kernel, backward, kernel.dtype, size(kernel.head_dim))
        if key not in self._attentions:
            name, chosen = efficiency.sdpa_kernel(self.gpu) if kernel.kernel == "sdpa" else (kernel.kernel, "")
            coefficients, assumed = efficiency.attention_coefficients(self._source, name, backward, key[3])
            if chosen:
                self._assume(chosen)
            if assumed:
                other = efficiency.attention_coefficients(self._source, name, not backward, key[3])[1]
                which = name if other == assumed else f"{name}, {kernel.direction}"
                assumed = f"attention ({which}) on {self.gpu.name}: {assumed}"
            if self._settings.sustained and (droop := efficiency.attention_droop(self._source, name, backward)):
                coefficients = replace(coefficients, droop=droop)
            machine = self._machine(kernel.dtype)
            if limit := efficiency.LEGACY_FLOPS_PER_CLOCK.get(name, 0.0) * machine.num_sms * machine.clock_hz:
                machine = replace(machine, peak_flops=min(machine.peak_flops, limit))
            self._attentions[key] = (coefficients, assumed, machine)
        coefficients, assumed, machine = self._attentions[key]
        if beside is not None:
            machine = left_of(machine, beside)
        time_s = attention_s(
            size(kernel.batch), size(kernel.heads), size(kernel.kv_heads), size(kernel.query), size(kernel.key),
            size(kernel.head_dim), kernel.causal, backward, machine, coefficients,
        )  # fmt: skip
        return time_s / min(self._source.power, self._source.limited), assumed

    def _pointwise(self, kernel: Pointwise, beside: Beside | None) -> tuple[float, str]:
        vector = self._vector if beside is None else left_of(self._vector, beside)
        time_s = memory_bound_s(
            kernel.kind, kernel.moved_bytes, kernel.flops, vector, self._memory, kernel.random_numbers
        )
        if kernel.kind not in self._memory.assumed and kernel.kind in self._memory.fractions:
            return time_s, ""
        return time_s, _FAMILIES

    # --- host ----------------------------------------------------------------------------------

    def launch_s(self, kernel: Kernel, rank: int, caller: Caller = "framework") -> float:
        """Return the time that the CPU takes to issue ``kernel``, in seconds, by who calls it."""
        return self._host.launch_s[caller]

    def issue_s(self, rank: int, caller: Caller = "framework") -> float:
        """Return the time that the CPU takes to issue a collective, message or copy, in seconds, by who calls it."""
        return self._host.launch_s[caller] if caller in ("library", "graph") else self._host.collective_s

    def wait_s(self) -> float:
        """Return the time from the end of what the CPU waits for until it goes on, in seconds."""
        return self._host.wait_s

    def host_s(self, work: HostCompute, ranks: tuple[int, ...]) -> float:
        """Return the time of CPU work that all of ``ranks`` do at the same time, in seconds.

        The other ranks of their nodes, of whatever class, are taken to do as much at that time: optimizers step
        together.
        """
        if work.kind == "python":
            return host.python_s(work.num_elements, self._host)
        if work.kind in self._host.module_s:
            return work.num_elements * self._host.module_s[work.kind]
        if work.kind not in host.ELEMENT_BYTES:
            return host.driver_s(work.kind, work.num_elements)
        self._assume("CPU Adam: half the bandwidth of host memory")
        node, num_ranks = self._cluster.spec.node, self._cluster.gpus_per_node
        return host.cpu_step_s(
            work.kind, work.num_elements, num_ranks, node.num_cpu_cores, self._settings.cpu_threads,
            node.host_memory_bytes_per_s, self._host,
        )  # fmt: skip

    # --- transfers -----------------------------------------------------------------------------

    @property
    def library(self) -> str:
        """Whose collectives run, as ``cluster.backend`` says it."""
        return self._cluster.spec.backend

    @cached_property
    def _backend(self) -> Backend:
        """Whose collectives run; its module is imported when the first is planned."""
        from sim.cost.backend import backend

        return backend(self._cluster.spec.backend)

    @cached_property
    def links(self) -> Sequence[Link]:
        """All links; ``Phase.loads`` index into it."""
        return self._backend.links(self._cluster)

    def take_over(self, other: CostModel) -> None:
        """Know what another model planned, for the same communicators in the same cluster."""
        self._planned = {**other._planned, **other._traffic}

    def collective(self, collective: Collective, communicator: Communicator) -> Traffic:
        """Return the traffic of all groups of ``communicator`` together."""
        key = (communicator.name, collective.kind, collective.tensor_bytes)
        traffic = self._traffic.get(key)
        if traffic is None:
            groups = self._groups(communicator)
            traffic = self._planned.get(key)
            if traffic is None:
                plan = self._backend.plan_collective
                traffic = plan(self._cluster, groups, collective.kind, collective.tensor_bytes)
            if self.calibrated is not None and self._backend.is_nccl:
                traffic = self.calibrated.collective(traffic, collective.kind, groups, collective.tensor_bytes)
            if collective.axis == "tp":
                traffic = self.exchanged(traffic)
            if assumed := self._backend.assumption(self._cluster, groups):
                self._assume(assumed)
            self._traffic[key] = traffic
        return traffic

    def exchanged(self, traffic: Traffic) -> Traffic:
        """Return the traffic of a tensor-parallel exchange with the SMs that it takes."""
        sms = self._settings.exchange_sms
        return replace(traffic, sms=sms) if 0 < sms < traffic.sms else traffic

    def point_to_point(self, message: Send | Recv, communicator: Communicator) -> Traffic:
        """Return the traffic of one message on all pairs of ``communicator`` together."""
        key = (communicator.name, "send", message.tensor_bytes)
        traffic = self._traffic.get(key) or self._planned.get(key)
        if traffic is None:
            pairs = tuple((group[0], group[1]) for group in self._groups(communicator))
            num_ranks, spans = self._members(communicator)
            plan = self._backend.plan_point_to_point
            traffic = plan(self._cluster, pairs, message.tensor_bytes, num_ranks, spans)
            if self.calibrated is not None and self._backend.is_nccl:
                traffic = self.calibrated.collective(traffic, "send", pairs, message.tensor_bytes)
            self._traffic[key] = traffic
        return traffic

    def _members(self, communicator: Communicator) -> tuple[int, bool]:
        """Return the ranks of the communicator that a message goes in, and whether these stand on several nodes.

        All such communicators are taken to do so where one does: folding does not ask.
        """
        within = communicator.within
        if not within:
            return 2, False
        spans = self._spans.get(id(within))
        if spans is None:
            domain = self._cluster.domain_of
            spans = any(len({domain(gpu) for gpu in self._place(group)}) > 1 for group in within)
            self._spans[id(within)] = spans
        return len(within[0]), spans

    def copy(self, copy: Copy, ranks: tuple[int, ...]) -> Traffic:
        """Return the traffic of ``copy`` on all of ``ranks`` together."""
        key = (ranks, copy.direction, copy.num_bytes)
        traffic = self._traffic.get(key)
        if traffic is None:
            from sim.cost.copies import plan_copy

            traffic = plan_copy(self._cluster, self._place(ranks), copy.direction, copy.num_bytes)
            if self.calibrated is not None:
                traffic = self.calibrated.copy(traffic, copy.direction, copy.num_bytes)
            self._traffic[key] = traffic
        return traffic

    def traffic(
        self, transfer: Collective | Send | Recv | Copy, communicator: Communicator | None, ranks: tuple[int, ...]
    ) -> Traffic:
        """Return what a transfer moves, of whatever kind; ``ranks`` are those that copy, who have no communicator."""
        if isinstance(transfer, Copy):
            return self.copy(transfer, ranks)
        assert communicator is not None
        if isinstance(transfer, Collective):
            return self.collective(transfer, communicator)
        return self.point_to_point(transfer, communicator)

    def _place(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the GPUs of ``ranks``."""
        placement = self._settings.placement
        return tuple(placement[rank] for rank in ranks) if placement else ranks

    def wires_of(self, communicator: Communicator) -> tuple[int, str]:
        """Return over how many nodes a group stands, and what of its collectives' time is assumed ("" if nothing)."""
        groups = [self._place(communicator.groups[0])]
        nodes = {self._cluster.node_of(gpu) for gpu in groups[0]}
        return len(nodes), self._backend.assumption(self._cluster, groups)

    def _groups(self, communicator: Communicator) -> tuple[tuple[int, ...], ...]:
        return tuple(self._place(group) for group in communicator.groups)

    # --- what was guessed ----------------------------------------------------------------------

    def _assume(self, text: str) -> None:
        self._assumed.setdefault(text, 0)

    def assumptions(self) -> tuple[str, ...]:
        """Return what the answers so far rest on that was not measured on this GPU, in the order of ``_SUBJECTS``."""
        texts = [self.calibrated.words(self.num_kernels)] if self.calibrated is not None else []
        for text, count in sorted(self._assumed.items(), key=lambda item: _subject(item[0])):
            if text == _FAMILIES:
                families = ", ".join(sorted(self._guessed_families, key=_family))
                text = f"{families} kernels on {self.gpu.name}: share of the memory bandwidth assumed"  # noqa: PLW2901
            kernels = f" ({count} different kernel{'s' if count > 1 else ''})" if count else ""
            texts.append(text + kernels)
        if self._pace > 1:
            whose = "as V100 has it at its power limit; cluster.gpu.spread says otherwise"
            if self.gpu.spread is not None:
                whose = "cluster.gpu.spread"
            texts.append(
                f"{self._settings.slowest.num_gpus:,} GPUs wait for the slowest of them: matmuls and attention take "
                f"{self._pace - 1:.1%} longer than on an average GPU (standard deviation from GPU to GPU "
                f"{self._spread.matmul:.1%}, {whose})"
            )
        if self._source.limited < 1:
            texts.append(
                f"{self.gpu.name} under a power limit: clock of compute-bound kernels assumed at "
                f"{self._source.limited:.0%}, as matmuls of H100, B200 and GB300 have it in bf16"
            )
        elif self._source.power < 1 and any(key[0] == "gemm" for key in self._by_value):
            texts.append(
                f"{self.gpu.name} draws less power per FLOP/s than {self._source.name}: "
                f"clock of compute-bound kernels assumed at {self._source.power:.0%} (cube root of the ratio)"
            )
        return tuple(texts)
