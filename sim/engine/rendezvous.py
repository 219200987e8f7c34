"""Where ranks meet: the n-th collective that each host issues on a communicator is one meeting, as in NCCL.

Nothing names a meeting but its number, and the number is that of issue, whatever stream it is issued to. So classes
that disagree about the order meet in the wrong one: seen as a mismatch of kinds or sizes where they differ, and as a
deadlock where two communicators are entered crosswise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.engine.cost import Cost
from sim.engine.network import Network
from sim.errors import CollectiveMismatchError
from sim.ir.program import Chunk, Collective, Communicator, Copy, Program, Recv, Send, World
from sim.ir.traffic import Traffic

Message = Collective | Send | Recv
_MOVES = (Collective, Send, Recv, Copy)
Role = tuple[str, int]
"""(send, recv or all; rank of the representative): who takes part in a meeting."""


def kind_of(message: Message) -> str:
    """Return what a message is called: the collective's kind, "send" or "recv"."""
    if isinstance(message, Collective):
        return message.kind
    return "send" if isinstance(message, Send) else "recv"


def _role(program: Program, message: Message) -> Role:
    return ("all" if isinstance(message, Collective) else kind_of(message), program.rank)


@dataclass(slots=True, eq=False)
class Meeting:
    """One collective, or one send with its receive. ``start`` is when the last one arrived, -1 before."""

    communicator: Communicator
    instance: int
    done: Any
    arrived: dict[Role, Message] = field(default_factory=dict)
    traffic: Traffic | None = None
    start: int = -1


class Meetings:
    """All meetings of a run."""

    def __init__(self, env: Any, network: Network, cost: Cost, world: World) -> None:
        self._env = env
        self._network = network
        self._cost = cost
        self._world = world
        self._ranks = {program.rank: program.ranks for program in world.programs}
        self._roles: dict[tuple[str, bool], tuple[Role, ...]] = {}
        self._count: dict[tuple[str, Role], int] = {}
        self._open: dict[tuple[str, int], Meeting] = {}
        self._traffic: dict[tuple[int, str], tuple[Message, Traffic]] = {}
        self.lone: dict[int, None] = {}
        """Ids of messages that are taken to share links with nothing."""

    def number(self, communicator: Communicator, program: Program, message: Message) -> int:
        """Return which meeting on the communicator a class means with the message that its host issues now."""
        key = (communicator.name, _role(program, message))
        found = self._count.get(key, 0)
        self._count[key] = found + 1
        return found

    def numbers(self, program: Program, counts: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Return which meeting on each communicator a class means with the first of so many collectives; count all."""
        role = ("all", program.rank)
        found: dict[str, int] = {}
        for name, times in counts:
            found[name] = first = self._count.get((name, role), 0)
            self._count[name, role] = first + times
        return found

    def arrive(self, communicator: Communicator, program: Program, message: Message, instance: int) -> Meeting:
        """Note that a class has reached a message; start the transfer if it was the last. Wait for ``done``."""
        roles = self._roles_of(communicator, isinstance(message, Collective))
        role = _role(program, message)
        assert role in roles, f"{_who(program.ranks)} {kind_of(message)} on {communicator.name} takes no part in it"
        meeting = self._open.get((communicator.name, instance))
        if meeting is None:
            meeting = Meeting(communicator, instance, self._env.event())
            self._open[communicator.name, instance] = meeting
        self._check(meeting, role, message)
        meeting.arrived[role] = message
        if len(meeting.arrived) == len(roles):
            del self._open[communicator.name, instance]
            self._start(meeting)
        return meeting

    def _start(self, meeting: Meeting) -> None:
        message = meeting.arrived[min(meeting.arrived)]  # the same whoever comes last
        meeting.start = self._env.now
        meeting.traffic = self.traffic_of(message, meeting.communicator)
        self._network.start(meeting.traffic, id(message) in self.lone).callbacks.append(
            lambda _: meeting.done.succeed()
        )

    def traffic_of(self, message: Message, communicator: Communicator) -> Traffic:
        key = (id(message), communicator.name)  # the programs keep their messages, so ids stay their own
        found = self._traffic.get(key)
        if found is None:
            if isinstance(message, Collective):
                traffic = self._cost.collective(message, communicator)
            else:
                traffic = self._cost.point_to_point(message, communicator)
            found = self._traffic[key] = (message, traffic)
        return found[1]

    def _roles_of(self, communicator: Communicator, collective: bool) -> tuple[Role, ...]:
        """Return who has to come: every class for a collective; for a pair, the classes of both columns."""
        key = (communicator.name, collective)
        found = self._roles.get(key)
        if found is None:
            programs = [self._world.programs[i] for i in communicator.classes]
            if collective:
                found = tuple(("all", program.rank) for program in programs)
            else:
                rank_of = {rank: program.rank for program in programs for rank in program.ranks}
                senders = sorted({rank_of[sender] for sender, _ in communicator.groups})
                receivers = sorted({rank_of[receiver] for _, receiver in communicator.groups})
                found = (*(("send", rank) for rank in senders), *(("recv", rank) for rank in receivers))
            self._roles[key] = found
        return found

    def _check(self, meeting: Meeting, role: Role, message: Message) -> None:
        if not meeting.arrived:
            return
        other_role, other = next(iter(meeting.arrived.items()))
        if isinstance(message, Collective) and isinstance(other, Collective):
            agree = message.kind == other.kind
        else:
            agree = not isinstance(message, Collective) and not isinstance(other, Collective)
        if agree and message.tensor_bytes == other.tensor_bytes:
            return
        sides = sorted([(other_role[1], other), (role[1], message)], key=lambda side: side[0])
        said = [f"{_who(self._ranks[rank])} {kind_of(m)} '{m.name}' of {m.tensor_bytes} bytes" for rank, m in sides]
        raise CollectiveMismatchError(
            f"operation {meeting.instance} on {meeting.communicator.name}: {said[0]}, but {said[1]}"
        )

    def who_waits(self) -> list[str]:
        """Return one line for each meeting that some have reached and others have not."""
        lines = []
        for (name, _), meeting in sorted(self._open.items(), key=lambda item: item[0]):
            message = meeting.arrived[min(meeting.arrived)]
            roles = self._roles_of(meeting.communicator, isinstance(message, Collective))
            here = sorted(rank for role, rank in meeting.arrived for rank in self._ranks[rank])
            missing = sorted(rank for role in roles if role not in meeting.arrived for rank in self._ranks[role[1]])
            lines.append(f"{kind_of(message)} '{message.name}' on {name}: {_who(here)} wait for {_who(missing)}")
        return lines


def _who(ranks: Sequence[int]) -> str:
    """Return "ranks [0, 1, 2]"; of more than eight the first three, the last and the number."""
    if len(ranks) > 8:
        return f"ranks [{', '.join(map(str, ranks[:3]))}, ..., {ranks[-1]}] ({len(ranks)})"
    return f"ranks [{', '.join(map(str, ranks))}]"


def _times(program: Program) -> dict[int, tuple[Message | Copy, int]]:
    """Return the transfers of a step by id, in the order of chunks, and how often each is called."""
    chunks: dict[int, tuple[Chunk, int]] = {}
    for name, calls in Counter(call.chunk for call in program.step).items():
        chunk = program.chunks[name]
        chunks[id(chunk)] = (chunk, chunks.get(id(chunk), (chunk, 0))[1] + calls)
    times: dict[int, tuple[Message | Copy, int]] = {}
    for chunk, calls in chunks.values():
        for step in chunk:
            if step.__class__ in _MOVES:
                assert isinstance(step, _MOVES)
                times[id(step)] = (step, calls + times.get(id(step), (step, 0))[1])
    return times


Moved = tuple[int, Traffic, tuple[str, str]]
"""Ticks of a transfer that nothing can slow down, what it moves, and its (communicator, stream)."""


def solo_transfers(
    world: World, cost: Cost, meetings: Meetings, network: Network, trusting: bool = True
) -> dict[tuple[int, int], Moved]:
    """Return the collectives that nothing can slow down, by (rank, message's id).

    A class does them by itself, and their links carry nothing but what the same stream of the class issues, which
    comes one after the other. Lone transfers come in between; ``run`` sees to it that they did. Whoever is ``trusting``
    takes for lone as well what a class does on its communicator once a step, on another stream than all the rest (the
    sum of the norms' gradients after the last backward pass, say).
    """
    found: list[tuple[tuple[int, str], Message | Copy, Traffic, str]] = []
    for program in world.programs:
        times = _times(program)
        owned: list[tuple[str, Collective]] = []
        for step, _ in times.values():
            user = (program.rank, step.stream)
            if isinstance(step, Copy):
                found.append((user, step, cost.copy(step, program.ranks), ""))
                continue
            communicator = world.communicators[program.axes[step.axis]]
            if communicator.num_ranks == 1:
                continue
            own = communicator.name if isinstance(step, Collective) and len(communicator.classes) == 1 else ""
            found.append((user, step, meetings.traffic_of(step, communicator), own))
            if communicator.lone:
                meetings.lone[id(step)] = None
            elif own and isinstance(step, Collective):
                owned.append((own, step))
        often = dict.fromkeys((name, step.stream) for name, step in owned if times[id(step)][1] > 1)
        used = dict.fromkeys(name for name, _ in often)
        if trusting:
            aside = [step for name, step in owned if name in used and (name, step.stream) not in often]
            meetings.lone.update((id(step), None) for step in aside)
    network.learn(tuple({id(traffic): traffic for _, _, traffic, _ in found}.values()))
    users: dict[int, tuple[int, str] | None] = {}
    for user, message, traffic, own in found:
        for link in network.links_of(traffic) if id(message) not in meetings.lone else ():
            if users.setdefault(link, user if own else None) != user:
                users[link] = None
    return {
        (user[0], id(message)): (network.alone(traffic), traffic, (own, user[1]))
        for user, message, traffic, own in found
        if own and id(message) not in meetings.lone and all(users[link] == user for link in network.links_of(traffic))
    }
