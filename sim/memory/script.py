"""Chunks as the allocator sees them: what they allocate and free, and nothing else of them.

A chunk becomes a :class:`Script`, in which storages are numbered as they come (registers). So chunks that ask for the
same bytes in the same order are one script, of whatever layer, virtual stage or pipeline rank they are; a :class:`Code`
says which storages the registers of one chunk are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sim.ir.program import Alloc, Chunk, Free, Mark, Storage, UseOn
from sim.memory.allocator import MIN_BLOCK_BYTES, SMALL_BYTES, round_size

# A slot is the number of a storage. Those of which each microbatch has its own carry a bit, the microbatch above it.
OWN = 1 << 24
MICROBATCH = 25
SLOT_MASK = OWN - 1


# A position as one number: index of the call above so many bits, index into the chunk below.
CALL = 24

USE = -(1 << 40)
"""An action is a number: register to allocate one, ~register to free it, ``USE`` - register where from here on another
stream uses its block."""


@dataclass(slots=True, eq=False)
class Script:
    """What a chunk asks of the allocator.

    ``sizes``   bytes of the block of each register, rounded; ``pools`` the number of its pool
    ``inputs``  registers that are live before; ``outputs`` those that are new afterwards, or of other streams' use
    """

    actions: tuple[int, ...]
    sizes: tuple[int, ...]
    pools: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(slots=True)
class Code:
    """One chunk of one program.

    ``slots``      slot of each register; ``inputs`` and ``outputs`` are the slots of the script's
    ``positions``  index into the chunk, for each action
    ``marks``      (index of the action from which on, phase, module)
    ``gains``      what it leaves allocated: slot -> (storage, phase, module), None where an earlier chunk's mark rules
    ``losses``     slots that it frees and does not allocate again
    ``growth``     how many more storages are live afterwards
    ``host``       host storages in the order in which they are allocated (True) and freed
    """

    script: Script
    slots: list[int]
    inputs: list[int]
    outputs: list[int]
    positions: list[int]
    marks: list[tuple[int, str, str]]
    gains: dict[int, tuple[Storage, str | None, str]]
    losses: list[int]
    growth: int
    host: list[tuple[bool, Storage]]


class Scripts:
    """The scripts of all programs of a world, and the numbers of their pools: (stream, whether small) -> number."""

    def __init__(self, divisions: int) -> None:
        self.divisions = divisions
        self.pools: dict[tuple[str, bool], int] = {}
        self._known: dict[object, Script] = {}

    def script(self, *parts: tuple[int, ...]) -> Script:
        """Return the script of these parts, the same object whenever they are the same."""
        return self._known.get(parts) or self._known.setdefault(parts, Script(*parts))


class Compiler:
    """Turns the chunks of one program into code; slots are numbered over all of them."""

    def __init__(self, scripts: Scripts) -> None:
        nothing = Storage("", 0, "buffers")
        self.storages: list[Storage] = [nothing]
        """By the number in a slot; 0 is nobody's, so that every slot is true."""
        self._scripts = scripts
        self._slots: dict[int, int] = {}
        self.sizes = [0]
        self._pools = [0]
        """By the number in a slot: bytes of its block, and number of its pool."""

    def _slot(self, storage: Storage) -> int:
        storages, scripts = self.storages, self._scripts
        slot = len(storages) | (OWN if storage.per_microbatch else 0)
        self._slots[id(storage)] = slot
        storages.append(storage)
        divisions, num_bytes = scripts.divisions, storage.num_bytes
        # round_size, without the call for what is most usual
        size = round_size(num_bytes, divisions) if divisions else -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        pool = storage.stream, size <= SMALL_BYTES
        number = scripts.pools.get(pool)
        if number is None:
            number = scripts.pools[pool] = len(scripts.pools)
        self.sizes.append(size)
        self._pools.append(number)
        return slot

    def compile(self, chunk: Chunk) -> Code:  # noqa: PLR0912, PLR0915 (one loop over all there is, for speed)
        known = self._slots
        registers: dict[int, int] = {}
        actions: list[int] = []
        positions: list[int] = []
        act, place = actions.append, positions.append
        slots: list[int] = []
        inputs: list[int] = []
        used: dict[int, None] = {}
        marks: list[tuple[int, str, str]] = []
        gained: dict[int, tuple[Storage, str | None, str]] = {}
        lost: dict[int, None] = {}
        host: list[tuple[bool, Storage]] = []
        growth = 0
        phase: str | None = None
        module = ""
        for index, instruction in enumerate(chunk):
            kind = instruction.__class__
            if kind is Alloc:
                storage = instruction.storage  # type: ignore[union-attr]
                if not storage.num_bytes:
                    continue  # torch allocates no block for an empty tensor
                if storage.place != "gpu":
                    host.append((True, storage))
                    continue
                register = registers.get(id(storage))
                if register is None:
                    register = registers[id(storage)] = len(slots)
                    slots.append(known.get(id(storage)) or self._slot(storage))
                place(index)
                act(register)
                gained[register] = (storage, phase, module)
                growth += 1
            elif kind is Free:
                storage = instruction.storage  # type: ignore[union-attr]
                if not storage.num_bytes:
                    continue
                if storage.place != "gpu":
                    host.append((False, storage))
                    continue
                register = registers.get(id(storage))
                if register is None:
                    register = registers[id(storage)] = len(slots)
                    slots.append(known.get(id(storage)) or self._slot(storage))
                    inputs.append(register)
                place(index)
                act(~register)
                if gained.pop(register, None) is None:
                    lost[register] = None
                growth -= 1
            elif kind is Mark:
                phase, module = instruction.phase, instruction.module  # type: ignore[union-attr]
                marks.append((len(positions), phase, module))
            elif kind is UseOn:
                storage, stream = instruction.storage, instruction.stream  # type: ignore[union-attr]
                if storage.num_bytes and storage.place == "gpu" and stream != storage.stream:
                    register = registers.get(id(storage))
                    if register is None:
                        register = registers[id(storage)] = len(slots)
                        slots.append(known.get(id(storage)) or self._slot(storage))
                        inputs.append(register)
                    used[register] = None
                    place(index)
                    act(USE - register)
        outputs = list(gained)
        if used:
            taken = set(inputs)
            outputs += [
                register for register in used if register in taken and register not in lost and register not in gained
            ]
        numbers = [slot & SLOT_MASK for slot in slots]
        sizes, pools = self.sizes, self._pools
        script = self._scripts.script(
            tuple(actions), tuple([sizes[n] for n in numbers]), tuple([pools[n] for n in numbers]),
            tuple(inputs), tuple(outputs),
        )  # fmt: skip
        gains = {slots[register]: what for register, what in gained.items()}
        return Code(
            script, slots, [slots[r] for r in inputs], [slots[r] for r in outputs],
            positions, marks, gains, [slots[r] for r in lost], growth, host,
        )  # fmt: skip


Held = TypeVar("Held")


def replaced(slots: Mapping[int, Held], bits: int) -> dict[int, Held]:
    """Return what each slot holds, for microbatches so many further on (``bits``: their number, shifted)."""
    return {slot + bits if slot & OWN else slot: held for slot, held in slots.items()}


def go_on(live: dict[int, Held], awaiting: list[Any], bits: int, num_calls: int) -> None:
    """Go on as if so many microbatches and calls had been replayed, and had changed nothing else.

    ``awaiting`` are tuples that begin with when a block becomes free; their order stays.
    """
    if bits:
        moved = replaced(live, bits)
        live.clear()
        live.update(moved)
    awaiting[:] = [(at + (num_calls << CALL), *rest) for at, *rest in awaiting]
