"""What the engine asks of the cost layer. It knows no more of hardware than this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sim.ir.ledger import Kernel
from sim.ir.program import Caller, Collective, Communicator, Copy, HostCompute, Recv, Send
from sim.ir.traffic import Link, Traffic


class Cost(Protocol):
    """Durations of single instructions on an otherwise idle machine, and the wires of transfers.

    ``rank`` is the representative of a class; ``ranks`` all of them (what they do, they do together).
    """

    @property
    def links(self) -> Sequence[Link]:
        """All links; ``Phase.loads`` index into it."""
        ...

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        """Time on the GPU, alone."""
        ...

    def beside_s(self, kernel: Kernel, rank: int, sms: int, memory_bytes_per_s: float) -> float:
        """Time on the GPU while others hold so many SMs and move so much memory. Asked if a traffic takes SMs."""
        ...

    def waits_for_sms(self, kernel: Kernel, sms: int) -> bool:
        """Whether blocks of it wait while others hold so many SMs, and none of its own leaves before it ends."""
        ...

    def memory_bytes(self, traffic: Traffic) -> float:
        """Bytes that a collective moves in the memory of each GPU. Asked if it takes SMs."""
        ...

    def launch_s(self, kernel: Kernel, rank: int, caller: Caller) -> float:
        """Time that the host takes to issue it (framework and driver), by who does so."""
        ...

    def issue_s(self, rank: int, caller: Caller) -> float:
        """Time that the host takes to issue a collective, send, receive or copy, by who does so."""
        ...

    def wait_s(self) -> float:
        """Time from the end of what the host waits for until it goes on."""
        ...

    def host_s(self, work: HostCompute, ranks: tuple[int, ...]) -> float:
        """Time of CPU work, with the ranks of the same node that do it at the same time."""
        ...

    def collective(self, collective: Collective, communicator: Communicator) -> Traffic:
        """Traffic of all groups of the communicator together."""
        ...

    def point_to_point(self, message: Send | Recv, communicator: Communicator) -> Traffic: ...

    def copy(self, copy: Copy, ranks: tuple[int, ...]) -> Traffic:
        """Traffic of that copy on all ranks together."""
        ...
