"""How long a kernel takes that moves more than it computes.

    move    = bytes from memory / (share * bandwidth) + bytes from the L2 / L2 bandwidth
    random  = random numbers / (numbers a clock * SMs * clock)
    T       = floor + max(sqrt(move^2 + random^2), FLOPs / vector peak)

``share`` is of the family (elementwise, norm, softmax, reduce, amax, gather, scatter, copy, optimizer). The L2 serves
what fits in the part of it that stays resident (the kernel before has just written it); beyond that, a stream evicts
what it is about to read: of b bytes with R resident, 2 R - b are found, and none from 2 R on.

Arithmetic hides behind memory (fp32 gelu takes as long as relu on V100, A100 and L4, to 1 %), random numbers do not
wholly: ten rounds of Philox are some hundred integer instructions for four of them (cuRAND, curand_philox4x32_x.h), on
64 lanes an SM from Volta to Hopper, and dropout's threads keep in step (``__syncthreads`` in each round of
``fused_dropout_kernel_vec``, aten/src/ATen/native/cuda/Dropout.cu). It takes 1.2 ms for 2^28 16-bit elements on A100
40 GB, 1.2 times what five bytes an element take; with the square root one rate suits that and V100's sizes.

Source of the form: Williams et al., "Roofline", CACM 52(4), 2009. The floor is why achieved bandwidth grows with size.
Leaves out: reads that miss lines (strided access), atomics beyond their family's share.
Checked by: tests/laws/test_cost_laws.py, validation/measure/fit_memory.py.
"""

from __future__ import annotations

import math

from sim.cost.efficiency import MemoryCoefficients
from sim.cost.roofline import Machine


def memory_bound_s(
    family: str, moved_bytes: int, flops: int, machine: Machine, coefficients: MemoryCoefficients, random: int = 0
) -> float:
    """Return the time of a kernel that moves ``moved_bytes`` (reads and writes), in seconds.

    ``machine.peak_flops`` is the rate of plain fp32 arithmetic; ``random``: how many random numbers it draws.
    """
    c = coefficients
    share = c.fractions.get(family, c.fractions["elementwise"])
    resident = c.resident_fraction * machine.l2_bytes
    found = max(0.0, min(moved_bytes, 2 * resident - moved_bytes))
    rate = share * machine.memory_bytes_per_s
    move_s = (moved_bytes - found) / rate + found / (rate * c.l2_over_memory)
    if random:
        move_s = math.hypot(move_s, random / (c.random_per_clock * machine.num_sms * machine.clock_hz))
    return c.floor_s + max(move_s, flops / machine.peak_flops)
