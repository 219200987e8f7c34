"""How long a kernel takes that moves more than it computes.

    T = floor + max(bytes from memory / (share * bandwidth) + bytes from the L2 / L2 bandwidth, FLOPs / vector peak)

``share`` is of the family (elementwise, norm, softmax, reduce, gather, scatter, copy, optimizer). The L2 serves what
fits in the part of it that stays resident (the kernel before has just written it); beyond that, a stream evicts what
it is about to read: of b bytes with R resident, 2 R - b are found, and none from 2 R on.

Source of the form: Williams et al., "Roofline", CACM 52(4), 2009. The floor is why achieved bandwidth grows with size.
Leaves out: reads that miss lines (strided access), atomics beyond their family's share.
Checked by: tests/laws/test_cost_laws.py.
"""

from __future__ import annotations

from sim.cost.efficiency import MemoryCoefficients
from sim.cost.roofline import Machine


def memory_bound_s(
    family: str, moved_bytes: int, flops: int, machine: Machine, coefficients: MemoryCoefficients
) -> float:
    """Return the time of a kernel that moves ``moved_bytes`` (reads and writes), in seconds.

    ``machine.peak_flops`` is the rate of plain fp32 arithmetic.
    """
    c = coefficients
    share = c.fractions.get(family, c.fractions["elementwise"])
    resident = c.resident_fraction * machine.l2_bytes
    found = max(0.0, min(moved_bytes, 2 * resident - moved_bytes))
    rate = share * machine.memory_bytes_per_s
    move_s = (moved_bytes - found) / rate + found / (rate * c.l2_over_memory)
    return c.floor_s + max(move_s, flops / machine.peak_flops)
