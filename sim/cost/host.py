"""What the CPU spends: issuing kernels and collectives, optimizer steps on the host, plain Python.

Issuing one kernel from eager torch costs the framework's share (Python, dispatcher, autograd, allocator) and
the driver's; compiled code keeps the driver's. CPU Adam is bound by host memory: it reads gradient, parameter and
two moments and writes back parameter and moments, in fp32 (deepspeed/ops/csrc/adam/cpu_adam_impl.cpp, Step_1):
16 + 12 bytes an element. Ranks of one node share the memory. The 16-bit copy for the GPU is a cast of its own.
"""

from __future__ import annotations

from sim.cost.efficiency import HostCoefficients

CPU_ADAM_BYTES = 16 + 12
"""Bytes moved for an element (fp32 gradient, parameter, two moments in; the last three out)."""
ELEMENT_BYTES = {
    "cpu_adam": CPU_ADAM_BYTES,
    "cpu_sgd": 8 + 4,
    "cpu_scale": 4 + 4,
    "cpu_copy": 4 + 4,
    "cpu_cast": 4 + 2,
    "cpu_overflow": 12,
}
"""Work that is bound by host memory -> bytes moved for an element.

torch's own kernels on the CPU: an SGD update, ``mul_`` and a copy of fp32, a cast of fp32 to 16 bit; ``isinf().any()``
and ``isnan().any()`` of 16 bit (the absolute value in and out, in and a mask out, the mask in; in, out and in again).
"""


def launch_s(coefficients: HostCoefficients, compiled: bool) -> float:
    """Return the time to issue one kernel, in seconds."""
    return coefficients.driver_s + (coefficients.compiled_s if compiled else coefficients.framework_s)


def cpu_adam_s(
    num_elements: int,
    num_ranks: int,
    host_bytes_per_s: float,
    coefficients: HostCoefficients,
    element_bytes: int = CPU_ADAM_BYTES,
) -> float:
    """Return the time, in seconds, of ``num_ranks`` ranks of one node that update ``num_elements`` each, together.

    Other work that is bound by host memory takes the same share of its bandwidth, and its own ``element_bytes``.
    """
    return num_ranks * num_elements * element_bytes / (coefficients.cpu_adam_fraction * host_bytes_per_s)


def python_s(num_steps: int, coefficients: HostCoefficients) -> float:
    """Return the time of ``num_steps`` interpreter steps, in seconds."""
    return num_steps * coefficients.python_step_s
