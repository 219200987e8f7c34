"""Program: what one class of identical ranks does in a step. One program, read twice.

Instructions stand in the order in which the *host* issues them. The engine reads them for time:
each names its stream, streams are in order, ``Record`` and ``Wait`` are CUDA's events. The allocator
reads the same list for bytes. There are no durations here.

Repetition is kept: a program is a list of calls of chunks, and a chunk is worked out once however
many microbatches call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sim.ir.ledger import DType, Kernel

Category = Literal["parameters", "gradients", "optimizer", "activations", "buffers", "temporary"]
CollectiveKind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "barrier", "shift"
]

COMPUTE = "compute"
"""The stream that torch calls the current one."""
HOST = "host"
"""The CPU thread that issues; its spans are the work the program asks of the CPU itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A block of device memory. Compared by identity: two storages of one name are two blocks.

    ``per_microbatch``: each microbatch that calls the chunk has its own instance, freed by a chunk
    that the same microbatch calls; otherwise there is one instance, whoever allocates and frees it.
    ``stream`` is the stream on which it is allocated: the allocator keeps pools apart by it.
    ``place`` is ``gpu``, or ``host`` for pinned and pageable memory of the node.
    """

    name: str
    num_bytes: int
    category: Category
    per_microbatch: bool = False
    stream: str = COMPUTE
    place: Literal["gpu", "host"] = "gpu"


# --- instructions ------------------------------------------------------------------------------


Caller = Literal["framework", "forward", "backward", "checkpoint", "library", "graph"]
"""Who issues a kernel or transfer, on which the host's time for it depends: a framework's hook or step, the model's
Python, the autograd engine, the model's Python just after a checkpoint's own (the first kernel that runs again),
a library's C++ within a call that was paid for, or a CUDA graph that was launched."""


@dataclass(frozen=True, slots=True)
class Compute:
    """One kernel on ``stream``. ``op`` names the op of the ledger (or framework) it belongs to.

    ``blocking``: the stream is empty when the kernel is issued, and the host goes on when it has run.
    """

    op: str
    kernel: Kernel
    stream: str = COMPUTE
    caller: Caller = "framework"
    blocking: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """``tensor_bytes`` follows nccl-tests: an all-gather's output, a reduce-scatter's input, else the buffer.

    ``axis`` names the communicator of this rank (``World.communicators``).
    """

    name: str
    kind: CollectiveKind
    axis: str
    tensor_bytes: int
    dtype: DType
    stream: str
    caller: Caller = "framework"


@dataclass(frozen=True, slots=True)
class Send:
    """Point to point over the pair communicator ``axis``; the peer has the matching ``Recv``."""

    name: str
    axis: str
    tensor_bytes: int
    stream: str
    caller: Caller = "framework"


@dataclass(frozen=True, slots=True)
class Recv:
    name: str
    axis: str
    tensor_bytes: int
    stream: str
    caller: Caller = "framework"


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between GPU and host memory (device-to-device copies are ``Compute``)."""

    name: str
    direction: Literal["host_to_device", "device_to_host"]
    num_bytes: int
    stream: str
    caller: Caller = "framework"


@dataclass(frozen=True, slots=True)
class HostCompute:
    """Work of the CPU that the host thread waits for: DeepSpeed's CPU Adam, for one.

    ``kind`` is ``cpu_adam`` (``num_elements`` updated), other work of a step's threads on that many elements
    (``cpu_torch_adam``, ``cpu_sgd``, ``cpu_scale``, ``cpu_copy``, ``cpu_cast``, ``cpu_overflow``), ``python``
    (interpreter steps), a framework's hooks around that many modules (``zero3_forward``, ``zero3_backward``), or what
    the driver does for the allocator: calls (``cuda_malloc``, ``cuda_free``), pages of 2 MiB (``cuda_malloc_page``,
    ``cuda_free_page``), handles of expandable segments (``map_handle``, ``unmap_handle``).
    """

    op: str
    kind: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class Alloc:
    storage: Storage


@dataclass(frozen=True, slots=True)
class Free:
    storage: Storage


@dataclass(frozen=True, slots=True)
class UseOn:
    """``tensor.record_stream(stream)``: when freed, reusable only after ``stream`` has got there."""

    storage: Storage
    stream: str


@dataclass(frozen=True, slots=True)
class Record:
    """``event.record(stream)``. Recording again replaces the event, as in CUDA."""

    event: str
    stream: str


@dataclass(frozen=True, slots=True)
class Wait:
    """``stream.wait_event(event)``: the event as last recorded when the host issues this; never recorded: no-op."""

    event: str
    stream: str


@dataclass(frozen=True, slots=True)
class HostWait:
    """``event.synchronize()``: the host issues nothing more until the event has happened."""

    event: str


@dataclass(frozen=True, slots=True)
class Mark:
    """From here on, what is issued belongs to this phase and module (for reports; costs nothing)."""

    phase: Literal["setup", "forward", "backward", "optimizer"]
    module: str


Instruction = (
    Compute | Collective | Send | Recv | Copy | HostCompute | Alloc | Free | UseOn | Record | Wait | HostWait | Mark
)
Chunk = tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Run the chunk of that name, for that microbatch (0 where it does not matter)."""

    chunk: str
    microbatch: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """What every rank of one class does.

    ``setup``       once, before training: parameters, optimizer states, persistent buffers
    ``first_step``  the first optimizer step, where it differs (lazy states); else equal to ``step``
    ``step``        every later step: the one that is timed
    ``ranks``       the global ranks of the class, ascending; the first represents it
    ``axes``        axis -> name of the communicator of the representative
    ``stage``       pipeline stage
    """

    ranks: tuple[int, ...]
    stage: int
    chunks: Mapping[str, Chunk]
    setup: tuple[Call, ...]
    first_step: tuple[Call, ...]
    step: tuple[Call, ...]
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.ranks[0]


@dataclass(frozen=True, slots=True)
class Communicator:
    """Equal groups of ranks that meet at the same time, folded into one.

    ``groups`` are all the process groups it stands for, each in ring order; ``classes`` are indices
    into ``World.programs`` of the classes whose ranks take part. Pair communicators (send and
    receive) have groups of (sender, receiver).

    ``lone``: its transfers are taken to share links with nothing else that moves meanwhile, by which ranks whose links
    they load unevenly are one class. The engine holds them to it.

    ``within``: the process groups whose library communicators carry the messages of its pairs, where pairs have none of
    their own.
    """

    name: str
    axis: str
    groups: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]
    lone: bool = False
    within: tuple[tuple[int, ...], ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of one group."""
        return len(self.groups[0])


@dataclass(frozen=True, slots=True)
class World:
    """All programs of a job, one for each class of identical ranks, and who meets whom."""

    world_size: int
    programs: tuple[Program, ...]
    communicators: Mapping[str, Communicator]
