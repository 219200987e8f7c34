"""What the CPU spends: issuing kernels and collectives, optimizer steps on the host, plain Python.

    T(launch) = whole(whose code) * (driver / speed(desktop) + share(who calls, whose code) / speed(reference))
    speed     = single-thread score of the node's processor over that of the one measured

The share of eager torch (Python, dispatcher, autograd, allocator) is measured on whole blocks of each code, forward and
backward apart, and divided by the kernels that the ledger has for them (validation/measure/measure_host.py); compiled
code keeps the driver's. These are the least of many repeats in a hot loop. Where the host limits steps of Megatron-LM,
they take ``whole`` times as long: caches are colder, eight ranks and their libraries' threads share the node, Python
was older (before 3.11 slower by about a quarter, "What's New In Python 3.11"). It is fitted to wall-clock times that
Megatron-LM's functional tests recorded on DGX A100 (validation/measure/fit_host.py). Leaves out: that a kernel's own
share differs from its block's mean; other versions of Python and torch under other code than Megatron's.

A step on the CPU takes as long as the slower of two:

    T(memory)  = ranks of the node * elements * bytes / (fraction * bandwidth of the host's memory)
    T(threads) = elements * T(element, one thread) / min(OpenMP threads of a rank, cores / ranks of the node)

CPU Adam reads gradient, parameter and two moments and writes back parameter and moments, in fp32: 16 + 12 bytes an
element; ``omp parallel for`` divides them evenly among the rank's threads (deepspeed/ops/csrc/includes/cpu_adam.h,
Step_AVX), as at::parallel_for does those of torch's own kernels. Threads of all ranks beyond the node's cores take
turns. The 16-bit copy for the GPU is a cast of its own. Times of one thread are measured on tensors that no cache holds
(validation/measure/measure_cpu_step.py); other processors' go as their single-thread scores, but no core moves more
bytes than it can keep on their way (``stream`` of processors.yaml). Leaves out: that cores of one chiplet share its
link, that memory of the other socket is farther, and AVX2 where there is no AVX-512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from sim import units
from sim.cost.efficiency import read
from sim.ir.program import Caller

if TYPE_CHECKING:
    from sim.scenario.calibration import HostTimes

CPU_ADAM_BYTES = 16 + 12
"""Bytes moved for an element (fp32 gradient, parameter, two moments in; the last three out)."""
ELEMENT_BYTES = {
    "cpu_adam": CPU_ADAM_BYTES,
    "cpu_torch_adam": 80,
    "cpu_sgd": 8 + 4,
    "cpu_scale": 4 + 4,
    "cpu_copy": 4 + 4,
    "cpu_cast": 4 + 2,
    "cpu_overflow": 12,
}
"""Work that is bound by host memory -> bytes moved for an element.

torch's own kernels on the CPU: AdamW one kernel after another (torch/optim/adam.py, _single_tensor_adam: ``mul_`` 8,
``lerp_`` 12, ``mul_`` 8, ``addcmul_`` 12, ``sqrt`` 8, ``div`` 8, ``add_`` 8, ``addcdiv_`` 16); an SGD update, ``mul_``
and a copy of fp32, a cast of fp32 to 16 bit; ``isinf().any()`` and ``isnan().any()`` of 16 bit (the absolute value in
and out, in and a mask out, the mask in; in, out and in again).
"""
MODULE_KINDS = ("zero3_forward", "zero3_backward")
"""Hooks of DeepSpeed's ZeRO-3 around one torch module, a pass (validation/measure/measure_zero3.py)."""


@dataclass(frozen=True, slots=True)
class HostCoefficients:
    """Times of the issuing CPU thread of one node and code, in seconds, and CPU Adam's share of the host's memory.

    ``launch_s`` is by caller, ``module_s`` what a framework's hooks take around a module, by kind. ``points`` is the
    processor's single-thread score; ``assumed`` says what of it was not known ("" if nothing). ``element_s`` is what
    one thread takes for an element of a step on the CPU, by kind.
    """

    launch_s: Mapping[Caller, float]
    collective_s: float
    wait_s: float
    module_s: Mapping[str, float]
    python_step_s: float
    cpu_adam_fraction: float
    element_s: Mapping[str, float]
    points: float
    assumed: str


def host_coefficients(cpu: str, code: str, compiled: bool, measured: HostTimes | None = None) -> HostCoefficients:
    """Return the times on a node's processor ``cpu`` ("2x AMD EPYC 7742"), for the modules of ``code``.

    ``measured`` on the user's machine: the block of torch that it timed says how fast its thread is, in place of the
    processor's score, and a launch what its driver takes.
    """
    facts, processors = read("host.yaml"), read("processors.yaml")
    points, assumed = single_thread_points(cpu, processors)
    reference = _points(processors["reference"], processors)
    if measured is not None and (parts := _against_reference(facts, measured)):
        points, assumed = reference / prod(parts) ** (1 / len(parts)), ""
    whole = float(facts["megatron_whole"]["value"]) if code == "megatron" else 1.0
    slower = whole * reference / points
    driver_s = whole * _duration(facts, "driver") * _points(processors["desktop"], processors) / points
    if measured is not None and measured.driver:
        driver_s = measured.driver

    def share_s(name: str) -> float:
        return driver_s + slower * _duration(facts, "compiled" if compiled else name)

    forward_s = share_s(f"{code}_forward")
    return HostCoefficients(
        launch_s={
            "framework": share_s("framework"),
            "forward": forward_s,
            "backward": share_s(f"{code}_backward"),
            "checkpoint": forward_s + slower * _duration(facts, "checkpoint"),
            "library": driver_s,
            "graph": reference / points * _duration(facts, "graph_node"),
        },
        collective_s=slower * _duration(facts, "collective"),
        wait_s=_duration(facts, "wait"),
        module_s={kind: slower * _duration(facts, kind) for kind in MODULE_KINDS},
        python_step_s=slower * _duration(facts, "python_step"),
        cpu_adam_fraction=float(facts["cpu_adam_fraction"]["value"]),
        element_s=_element_s(facts, processors, cpu, reference / points),
        points=points,
        assumed=assumed,
    )


def _against_reference(facts: Mapping[str, Any], measured: HostTimes) -> list[float]:
    """Return measured over reference time of the block that ``sim calibrate`` runs, forward and backward."""
    pairs = ((measured.forward, "block_forward"), (measured.backward, "block_backward"))
    return [time_s / _duration(facts, name) for time_s, name in pairs if time_s]


def single_thread_points(cpu: str, processors: Mapping[str, Any]) -> tuple[float, str]:
    """Return the single-thread score of a node's processor, and what was assumed."""
    entry = _entry(cpu, processors)
    if entry is not None:
        return _points(entry, processors), ""
    return _points(processors["otherwise"], processors), f"speed of one thread of {cpu or 'the host'} is not known"


def _entry(cpu: str, processors: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((entry for entry in processors["processors"] if entry["name"] in cpu), None)


def _element_s(facts: Mapping[str, Any], processors: Mapping[str, Any], cpu: str, slower: float) -> dict[str, float]:
    """Return what one thread of ``cpu`` takes for an element, by kind; ``slower`` than the one that was measured."""
    entry = _entry(cpu, processors) or processors["otherwise"]
    stream = processors["stream"].get(entry.get("cores"))
    least = 0.0 if stream is None else 1 / units.parse_rate(stream["value"])
    return {
        kind: max(slower * _duration(facts, f"{kind}_element"), num_bytes * least)
        for kind, num_bytes in ELEMENT_BYTES.items()
    }


def _points(entry: Mapping[str, Any], processors: Mapping[str, Any]) -> float:
    if "points" in entry:
        return float(entry["points"])
    per_ghz = float(processors["points_per_ghz"][entry["cores"]]["value"])
    return per_ghz * float(entry["clock"].removesuffix(" GHz"))


def _duration(facts: Mapping[str, Any], name: str) -> float:
    return units.parse_duration(facts[name]["value"])


def cpu_step_s(
    kind: str,
    num_elements: int,
    num_ranks: int,
    num_cores: int,
    num_threads: int,
    host_bytes_per_s: float,
    coefficients: HostCoefficients,
) -> float:
    """Return the time, in seconds, of ``num_ranks`` ranks of one node that step ``num_elements`` each, together.

    ``num_threads`` are each rank's; 0: as many as the node has cores, which the ranks then share.
    """
    memory_s = num_ranks * num_elements * ELEMENT_BYTES[kind] / (coefficients.cpu_adam_fraction * host_bytes_per_s)
    threads = min(num_threads or num_cores, num_cores / num_ranks)
    return max(memory_s, num_elements * coefficients.element_s[kind] / threads)


def driver_s(kind: str, count: int) -> float:
    """Return the time that the CUDA driver takes for so many calls, pages or handles (``driver.yaml``), in seconds."""
    return count * _duration(_driver(), kind)


@cache
def _driver() -> Mapping[str, Any]:
    found: Mapping[str, Any] = read("driver.yaml")
    return found


def python_s(num_steps: int, coefficients: HostCoefficients) -> float:
    """Return the time of ``num_steps`` interpreter steps, in seconds."""
    return num_steps * coefficients.python_step_s
