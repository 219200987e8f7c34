"""Laws of the engine, on random worlds that cannot deadlock; and a slow engine, one event an instruction, agrees."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import host, segments
from sim.engine.beside import durations_beside
from sim.engine.network import Network, fair_shares, flow_of
from sim.engine.rendezvous import Meetings
from sim.engine.run import run
from sim.ir.ledger import Kernel, Pointwise
from sim.ir.program import (
    HOST,
    Alloc,
    Call,
    Chunk,
    Collective,
    Communicator,
    Compute,
    Copy,
    Free,
    HostCompute,
    HostWait,
    Instruction,
    Mark,
    Program,
    Record,
    Recv,
    Send,
    Storage,
    UseOn,
    Wait,
    World,
)
from sim.ir.timeline import Timeline
from sim.ir.traffic import Link, Phase, Traffic
from sim.report.metrics import communication, step_parts
from sim.units import ticks

NUM_LINKS = 4
STREAMS = ("compute", "comm", "side")


@dataclass
class RandomCost:
    """Kernels carry their own times; ``phases`` are the traffic of each thing that moves, by name or size."""

    links: tuple[Link, ...]
    traffics: tuple[Traffic, ...]
    asked: list[Traffic] = field(default_factory=list)

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        assert isinstance(kernel, Pointwise)
        return kernel.flops_per_element * 1e-7

    def launch_s(self, kernel: Kernel, rank: int, caller: str = "framework") -> float:
        assert isinstance(kernel, Pointwise)
        return int(kernel.kind) * 1e-7

    def beside_s(self, kernel: Kernel, rank: int, sms: int, memory_bytes_per_s: float) -> float:
        return self.kernel_s(kernel, rank) * (1 + sms / 8)

    def waits_for_sms(self, kernel: Kernel, sms: int) -> bool:
        return False

    def memory_bytes(self, traffic: Traffic) -> float:
        return traffic.sms * 1e3

    def issue_s(self, rank: int, caller: str = "framework") -> float:
        return 3e-7

    def wait_s(self) -> float:
        return 2e-7

    def host_s(self, work: HostCompute, ranks: tuple[int, ...]) -> float:
        return work.num_elements * 1e-7

    def _traffic(self, number: int) -> Traffic:
        return self.traffics[number % len(self.traffics)]

    def collective(self, collective: Collective, communicator: Communicator) -> Traffic:
        return self._traffic(collective.tensor_bytes)

    def point_to_point(self, message: Send | Recv, communicator: Communicator) -> Traffic:
        return self._traffic(message.tensor_bytes)

    def copy(self, copy: Copy, ranks: tuple[int, ...]) -> Traffic:
        return self._traffic(copy.num_bytes)


# --- random worlds --------------------------------------------------------------------------------

loads = st.lists(
    st.tuples(st.integers(0, NUM_LINKS - 1), st.one_of(st.floats(1.0, 1e4), st.sampled_from((1e-9, 1e-6, 1e6)))),
    max_size=3,
    unique_by=lambda load: load[0],
).map(lambda found: tuple(sorted(found)))
phases = st.builds(
    lambda latency, load, capped: Phase(latency * 1e-7, load, 100.0 if capped else 0.0, 1e9 if capped else 0.0),
    st.integers(0, 3),
    loads,
    st.booleans(),
)
traffics = st.builds(
    lambda found, sms: Traffic("ring", tuple(found), 1, sms),
    st.lists(phases, min_size=0, max_size=2),
    st.sampled_from((0, 0, 2, 5)),
)
costs = st.builds(
    RandomCost,
    st.lists(st.floats(1e8, 1e10), min_size=NUM_LINKS, max_size=NUM_LINKS).map(
        lambda rates: tuple(Link(str(i), "nvlink", rate) for i, rate in enumerate(rates))
    ),
    st.lists(traffics, min_size=2, max_size=4).map(tuple),
)
stream = st.sampled_from(STREAMS)
event = st.sampled_from(("e", "f"))
storages = tuple(Storage(f"s{i}", 1, "temporary", per_microbatch=bool(i), stream=STREAMS[i]) for i in range(2))
storage = st.sampled_from(storages)
kernels = st.builds(
    lambda launch, gpu, on: Compute("op", Pointwise(str(launch), (), (), gpu), on),
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from(("compute", "compute", "side")),
)
local = st.one_of(
    kernels,
    kernels,
    kernels,
    st.builds(Record, event, stream),
    st.builds(Wait, event, stream),
    st.builds(HostWait, event),
    st.builds(HostCompute, st.just("work"), st.just("python"), st.integers(0, 9)),
    st.builds(Copy, st.just("copy"), st.just("host_to_device"), st.integers(0, 9), stream),
    st.builds(Alloc, storage),
    st.builds(Free, storage),
    st.builds(UseOn, storage, stream),
    st.builds(Mark, st.just("forward"), st.sampled_from(("a", "b"))),
)


own_collectives = st.builds(
    Collective, st.just("own"), st.just("all_gather"), st.just("own"), st.integers(0, 9), st.just("bf16"), stream
)
marks = st.builds(Mark, st.sampled_from(("forward", "backward")), st.sampled_from(("a", "b")))
events = st.one_of(st.builds(Record, event, stream), st.builds(Wait, event, stream))
plain = st.one_of(
    kernels, kernels, kernels, own_collectives, own_collectives, events, events, marks, st.builds(HostWait, event)
)


@st.composite
def worlds(draw: st.DrawFn, local: st.SearchStrategy[Any] = local, most: int = 5) -> World:
    """All classes issue the same messages in the same order, so that none can wait for ever."""
    num_classes = draw(st.integers(1, 3))
    chunks: list[dict[str, Chunk]] = [{} for _ in range(num_classes)]
    pairs = [(a, b) for a in range(num_classes) for b in range(num_classes) if a != b]
    for name in ("c0", "c1"):
        written: list[list[Instruction]] = [[] for _ in range(num_classes)]
        for number in range(draw(st.integers(0, 4))):
            for own in written:
                own.extend(draw(st.lists(local, max_size=most)))
            size = draw(st.integers(0, 9))
            pair = draw(st.sampled_from([None, *pairs]))
            for i, own in enumerate(written):
                if pair is None:
                    own.append(Collective(f"m{number}", "all_gather", "dp", size, "bf16", draw(stream)))
                elif i == pair[0]:
                    own.append(Send(f"m{number}", f"to{pair[1]}", size, draw(stream)))
                elif i == pair[1]:
                    own.append(Recv(f"m{number}", f"from{pair[0]}", size, draw(stream)))
        for i, own in enumerate(written):
            own.extend(draw(st.lists(local, max_size=most)))
            chunks[i][name] = tuple(own)
    calls = tuple(Call(name, i) for i, name in enumerate(draw(st.lists(st.sampled_from(("c0", "c1")), max_size=4))))
    programs = tuple(
        Program(
            (2 * i, 2 * i + 1),
            0,
            chunks[i],
            (),
            calls,
            calls,
            {"dp": "dp", "own": f"own{i}"}
            | {f"to{b}": f"{a}>{b}" for a, b in pairs if a == i}
            | {f"from{a}": f"{a}>{b}" for a, b in pairs if b == i},
        )
        for i in range(num_classes)
    )
    communicators = {"dp": Communicator("dp", "dp", (tuple(range(2 * num_classes)),), tuple(range(num_classes)))}
    for i in range(num_classes):
        communicators[f"own{i}"] = Communicator(f"own{i}", "own", ((2 * i, 2 * i + 1),), (i,))
    for a, b in pairs:
        groups = ((2 * a, 2 * b), (2 * a + 1, 2 * b + 1))
        communicators[f"{a}>{b}"] = Communicator(f"{a}>{b}", "pp", groups, (a, b))
    return World(2 * num_classes, programs, communicators)


# --- the slow engine ------------------------------------------------------------------------------

Found = list[tuple[int, str, tuple[int, int], int, int]]


def slow_run(world: World, cost: RandomCost, depth: int) -> tuple[Found, dict[int, int], set[tuple[Any, ...]]]:
    """One event an instruction, the host in real time; only links and meetings are the engine's own.

    Returns (rank, stream, position, start, end) of everything, the end of each rank, and the releases.
    """
    env = simpy.Environment()
    network = Network(env, cost.links)
    meetings = Meetings(env, network, cost, world)
    found: Found = []
    rank_end: dict[int, int] = {}
    releases: list[tuple[Any, ...]] = []
    slower: dict[tuple[int, str], Mapping[int, int]] = {}

    def beside(program: Program, chunk: str) -> Mapping[int, int]:
        def traffic_of(step: Collective) -> Traffic | None:
            communicator = world.communicators[program.axes[step.axis]]
            return None if communicator.num_ranks == 1 else meetings.traffic_of(step, communicator)

        def alone(kernel: Kernel) -> int:
            return ticks(cost.kernel_s(kernel, program.rank))

        key = (program.rank, chunk)
        if key not in slower:
            slower[key] = durations_beside(program.chunks[chunk], alone, traffic_of, cost, program.rank)
        return slower[key]

    def stream_process(program: Program, name: str, queue: deque[Any], full: Any) -> Iterator[Any]:
        while True:
            if not queue:
                full[0] = env.event()
                yield full[0]
            what, position, done, instance = queue.popleft()
            start = env.now
            if isinstance(what, Compute):
                assert position is not None
                alone = ticks(cost.kernel_s(what.kernel, program.rank))
                yield env.timeout(beside(program, program.step[position[0]].chunk).get(position[1], alone))
            elif isinstance(what, Copy):
                yield network.start(cost.copy(what, program.ranks))
            elif isinstance(what, Collective | Send | Recv):
                communicator = world.communicators[program.axes[what.axis]]
                yield meetings.arrive(communicator, program, what, instance).done
            elif what is not None:  # an event to wait for
                yield what
            if position is not None:
                found.append((program.rank, name, position, start, env.now))
                rank_end[program.rank] = max(rank_end.get(program.rank, 0), env.now)
            done.succeed(env.now)

    def host_process(program: Program) -> Iterator[Any]:  # noqa: PLR0912
        queues: dict[str, tuple[deque[Any], list[Any]]] = {}
        launched: dict[str, list[Any]] = {}
        recorded: dict[str, Any] = {}
        used: dict[Any, list[str]] = {}
        issued: list[tuple[int, tuple[int, int]]] = []

        def put(name: str, what: Any, position: Any = None) -> Any:
            if name not in queues:
                queues[name] = (deque(), [None])
                env.process(stream_process(program, name, *queues[name]))
            queue, full = queues[name]
            instance = 0
            if isinstance(what, Collective | Send | Recv):
                instance = meetings.number(world.communicators[program.axes[what.axis]], program, what)
            queue.append((what, position, done := env.event(), instance))
            if full[0] is not None and not full[0].triggered:
                full[0].succeed()
            return done

        def release(freed: tuple[int, int], at: int, done: Any) -> Iterator[Any]:
            yield env.all_of(done)
            if env.now > at:
                releases.append((program.rank, freed, env.now, issued))

        for number, call in enumerate(program.step):
            for index, step in enumerate(program.chunks[call.chunk]):
                position = (number, index)
                if isinstance(step, Compute | Copy | Collective | Send | Recv):
                    seconds = cost.launch_s(step.kernel, 0) if isinstance(step, Compute) else cost.issue_s(0)
                    yield env.timeout(ticks(seconds))
                    before = launched.setdefault(step.stream, [])
                    if len(before) >= depth and not before[-depth].processed:
                        yield before[-depth]
                    before.append(put(step.stream, step, position))
                elif isinstance(step, HostCompute):
                    start = env.now
                    yield env.timeout(ticks(cost.host_s(step, program.ranks)))
                    found.append((program.rank, HOST, position, start, env.now))
                elif isinstance(step, Record):
                    recorded[step.event] = put(step.stream, None)
                elif isinstance(step, Wait) and step.event in recorded:
                    put(step.stream, recorded[step.event])
                elif isinstance(step, HostWait) and step.event in recorded:
                    asked = env.now
                    if not recorded[step.event].processed:
                        yield recorded[step.event]
                    if env.now > asked:
                        yield env.timeout(ticks(cost.wait_s()))
                elif isinstance(step, Alloc | Free | UseOn):
                    key = (step.storage.name, call.microbatch if step.storage.per_microbatch else 0)
                    if isinstance(step, UseOn):
                        if step.stream != step.storage.stream:
                            used.setdefault(key, []).append(step.stream)
                    elif (on := used.pop(key, None)) and isinstance(step, Free):
                        env.process(release(position, env.now, [put(name, None) for name in dict.fromkeys(on)]))
                issued.append((env.now, position))
        rank_end[program.rank] = max(rank_end.get(program.rank, 0), env.now)

    for program in world.programs:
        env.process(host_process(program))
    env.run()
    places = set()
    for rank, freed, tick, issued in releases:
        end = (len(world.programs[rank // 2].step), 0)
        places.add((rank, freed, next((position for at, position in issued if at >= tick), end)))
    return sorted(found), rank_end, places


def taken_apart(timeline: Timeline) -> Found:
    """What the timeline says of each instruction."""
    found: Found = []
    for span in timeline.spans:
        if span.kernels:
            found += [(span.rank, span.stream, (span.position[0], i), s, e) for i, s, e in span.kernels]
        else:
            found.append((span.rank, span.stream, span.position, span.start, span.end))
    return sorted(found)


def run_with(world: World, cost: RandomCost, depth: int, *, skipping: bool = True) -> Timeline:
    with patch.object(host, "LAUNCH_QUEUE_DEPTH", depth), patch.object(segments, "MAX_KERNELS", depth // 2):
        return run(world, cost, skipping=skipping)


depths = st.sampled_from((2, 4, 6, 1024))


@settings(deadline=None, max_examples=300)
@given(worlds(), costs, depths)
def test_segments_change_nothing(world: World, cost: RandomCost, depth: int) -> None:
    timeline = run_with(world, cost, depth)
    found, rank_end, releases = slow_run(world, cost, depth)
    assert taken_apart(timeline) == found
    assert timeline.rank_end == rank_end
    assert {(r.rank, r.freed_at, r.reusable_at) for r in timeline.releases} == releases


@settings(deadline=None, max_examples=400)
@given(worlds(plain, 12), costs, depths)
def test_stretches_change_nothing(world: World, cost: RandomCost, depth: int) -> None:
    with patch.object(segments, "MIN_LAUNCHES", 1):
        timeline = run_with(world, cost, depth)
    with patch.object(segments, "MIN_LAUNCHES", 10**9):
        step_by_step = run_with(world, cost, depth)
    assert tuple(timeline.spans) == tuple(step_by_step.spans)
    assert timeline.rank_end == step_by_step.rank_end
    for ours, theirs in zip(timeline.link_use, step_by_step.link_use, strict=True):
        assert (ours.link, ours.busy) == (theirs.link, theirs.busy)
        assert abs(ours.num_bytes - theirs.num_bytes) <= 1e-9 * theirs.num_bytes
    assert taken_apart(timeline) == slow_run(world, cost, depth)[0]


@st.composite
def repeating(draw: st.DrawFn, world: World) -> World:
    """A world that calls its chunks again and again, in groups, with something before, between and after."""
    step: list[str] = []
    for _ in range(draw(st.integers(1, 2))):
        step += draw(st.lists(st.sampled_from(("c0", "c1")), max_size=3))
        step += draw(st.sampled_from((["c0"], ["c1"], ["c0", "c1"], ["c0", "c0", "c1"]))) * draw(st.integers(8, 24))
    step += draw(st.lists(st.sampled_from(("c0", "c1")), max_size=3))
    calls = tuple(Call(name, 3 * number) for number, name in enumerate(step))
    return replace(world, programs=tuple(replace(program, step=calls) for program in world.programs))


quiet = st.one_of(
    kernels, kernels, kernels, own_collectives, events, events, marks, st.builds(HostWait, event),
    st.builds(HostCompute, st.just("work"), st.just("python"), st.integers(0, 9)),
    st.builds(Copy, st.just("copy"), st.just("host_to_device"), st.integers(0, 9), stream),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(worlds(quiet).flatmap(repeating), costs, depths)
def test_skipping_what_repeats_changes_nothing(world: World, cost: RandomCost, depth: int) -> None:
    with patch.object(segments, "MIN_LAUNCHES", 2):
        skipped = run_with(world, cost, depth)
        plain = run_with(world, cost, depth, skipping=False)
    assert tuple(skipped.spans) == tuple(plain.spans)
    assert (skipped.end, skipped.rank_end) == (plain.end, plain.rank_end)
    assert len(skipped.spans) == len(plain.spans)
    for rank in plain.rank_end:
        whole = replace(plain, spans=tuple(plain.spans))
        assert step_parts(skipped, rank) == step_parts(whole, rank)
        assert communication(skipped, rank) == communication(whole, rank)
    for ours, theirs in zip(skipped.link_use, plain.link_use, strict=True):
        assert (ours.link, ours.busy) == (theirs.link, theirs.busy)
        assert abs(ours.num_bytes - theirs.num_bytes) <= 1e-9 * theirs.num_bytes


@settings(deadline=None, max_examples=60)
@given(worlds(), costs, depths)
def test_spans_of_one_stream_do_not_overlap(world: World, cost: RandomCost, depth: int) -> None:
    last: dict[tuple[int, str], int] = {}
    for span in run_with(world, cost, depth).spans:
        assert last.get((span.rank, span.stream), 0) <= span.start <= span.end
        last[span.rank, span.stream] = span.end
        ends = [span.start] + [tick for _, *kernel in span.kernels for tick in kernel] + [span.end]
        assert ends == sorted(ends)


@settings(deadline=None, max_examples=60)
@given(worlds(), costs)
def test_bytes_sent_are_bytes_carried_within_capacity(world: World, cost: RandomCost) -> None:
    timeline = run(world, cost)
    meetings = {
        (s.transfer.communicator, s.transfer.instance) if s.transfer.communicator else (s.rank, s.stream, s.start):
        s.transfer.tensor_bytes
        for s in timeline.spans
        if s.transfer and (s.transfer.communicator or s.transfer.wire_bytes)
    }  # fmt: skip
    copies = [s.transfer.tensor_bytes for s in timeline.spans if s.transfer and not s.transfer.communicator]
    met = [size for key, size in meetings.items() if len(key) == 2]
    sent = [0.0] * NUM_LINKS
    for size in met + copies:
        for phase in cost._traffic(size).phases:
            for link, num_bytes in phase.loads:
                sent[link] += num_bytes
    carried = {use.link: use for use in timeline.link_use}
    for link, num_bytes in enumerate(sent):
        if num_bytes:
            use = carried[link]
            assert abs(use.num_bytes - num_bytes) <= 1e-9 * num_bytes
            assert use.num_bytes <= cost.links[link].bytes_per_s * use.busy * 1e-12 * (1 + 1e-9)
            assert use.busy <= timeline.end
        else:
            assert link not in carried


@settings(deadline=None, max_examples=60)
@given(worlds(), costs)
def test_the_step_is_no_shorter_than_what_one_stream_or_one_host_does(world: World, cost: RandomCost) -> None:
    timeline = run(world, cost)
    for program in world.programs:
        issuing, busy = 0, dict.fromkeys(STREAMS, 0)
        for call in program.step:
            for step in program.chunks[call.chunk]:
                if isinstance(step, Compute):
                    issuing += ticks(cost.launch_s(step.kernel, 0))
                    busy[step.stream] += ticks(cost.kernel_s(step.kernel, 0))
                elif isinstance(step, HostCompute):
                    issuing += ticks(cost.host_s(step, program.ranks))
                elif isinstance(step, Copy | Collective | Send | Recv):
                    issuing += ticks(cost.issue_s(0))
                    size = step.num_bytes if isinstance(step, Copy) else step.tensor_bytes
                    for phase in cost._traffic(size).phases:
                        busy[step.stream] += ticks(phase.latency_s) + ticks(flow_of(phase, cost.links).alone_s)
        assert timeline.rank_end[program.rank] >= max(issuing, *busy.values())
        assert timeline.end >= timeline.rank_end[program.rank]


at_once = st.builds(
    lambda gpu, on: Compute("op", Pointwise("0", (), (), gpu), on), st.integers(0, 5), st.sampled_from(STREAMS)
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(at_once, at_once, events), max_size=30).map(tuple), costs)
def test_the_gpu_does_the_kernels_of_all_streams_in_the_sum_of_their_times(chunk: Chunk, cost: RandomCost) -> None:
    """It is never idle while the host is ahead, and never faster than its kernels: so the end is monotone in each."""
    program = Program((0,), 0, {"c": chunk}, (), (Call("c", 0),), (Call("c", 0),))
    work = sum(ticks(cost.kernel_s(step.kernel, 0)) for step in chunk if isinstance(step, Compute))
    assert run(World(1, (program,), {}), cost).end == work


@settings(deadline=None, max_examples=200)
@given(worlds(most=12), costs)
def test_a_chunk_is_no_shorter_than_the_kernels_of_all_its_streams(world: World, cost: RandomCost) -> None:
    once = (Call("c0", 0),)
    timeline = run(replace(world, programs=tuple(replace(p, step=once, first_step=once) for p in world.programs)), cost)
    for program in world.programs:
        kernels = [step.kernel for step in program.chunks["c0"] if isinstance(step, Compute)]
        assert timeline.rank_end[program.rank] >= sum(ticks(cost.kernel_s(kernel, 0)) for kernel in kernels)


@settings(deadline=None, max_examples=60)
@given(worlds(), costs, st.randoms(use_true_random=False))
def test_the_order_of_classes_changes_nothing(world: World, cost: RandomCost, random: Any) -> None:
    order = list(range(len(world.programs)))
    random.shuffle(order)
    communicators = list(world.communicators.values())
    random.shuffle(communicators)
    other = World(
        world.world_size,
        tuple(world.programs[i] for i in order),
        {
            c.name: Communicator(c.name, c.axis, c.groups, tuple(order.index(i) for i in c.classes))
            for c in communicators
        },
    )
    assert run(other, cost) == run(world, cost)


@settings(deadline=None, max_examples=200)
@given(st.lists(phases.filter(lambda phase: bool(phase.loads)), min_size=1, max_size=6), costs)
def test_shares_are_max_min_fair(active: list[Phase], cost: RandomCost) -> None:
    """No link above capacity; who is below its cap has a full link on which nobody has a greater share."""
    flows = [flow_of(phase, cost.links) for phase in active]
    shares = fair_shares(flows)
    used = [0.0] * NUM_LINKS
    for flow, share in zip(flows, shares, strict=True):
        assert 0 < share <= flow.cap
        for link, load in flow.loads:
            used[link] += load / flow.links_s * share / cost.links[link].bytes_per_s
    assert max(used) <= 1 + 1e-9
    for flow, share in zip(flows, shares, strict=True):
        if share < flow.cap * (1 - 1e-9):
            assert any(
                used[link] >= 1 - 1e-9
                and all(
                    theirs <= share * (1 + 1e-9)
                    for other, theirs in zip(flows, shares, strict=True)
                    if other.mask & 1 << link
                )
                for link, _ in flow.loads
            )


def ends_of(jobs: list[tuple[int, Traffic]], links: tuple[Link, ...], order: list[int]) -> dict[int, int]:
    """Start each transfer at its tick, those of one tick in the given order; return when each ends."""
    env = simpy.Environment()
    network = Network(env, links)
    ends: dict[int, int] = {}

    def job(number: int) -> Iterator[Any]:
        start, traffic = jobs[number]
        yield env.timeout(start)
        yield network.start(traffic)
        ends[number] = env.now

    for number in order:
        env.process(job(number))
    env.run()
    return ends


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 3).map(lambda n: n * 100_000), traffics), min_size=2, max_size=6),
    costs,
    st.randoms(use_true_random=False),
)
def test_the_order_within_a_tick_changes_nothing(
    jobs: list[tuple[int, Traffic]], cost: RandomCost, random: Any
) -> None:
    order = list(range(len(jobs)))
    random.shuffle(order)
    assert ends_of(jobs, cost.links, order) == ends_of(jobs, cost.links, list(range(len(jobs))))
