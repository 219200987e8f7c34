"""How long NCCL's kernels take: measured coefficients over terms that follow from how they work.

NCCL's own model (``tuning.py``) is for choosing; it leaves out what a kernel does beside sending. Here the time
of an algorithm with a protocol is a sum of terms, each with one measured coefficient:

    ring/LL      start + hop x steps + S/n (steps / channel + 1 / tail) / channels
    ring/LL128   start + hop x steps + S/n steps / (share x wires)
    ring/Simple  start + hop x steps + S/n (steps / (share x wires) + 1 / last of the kind)
    nvls/Simple  (S/R + 2) rounds of R = channels x heads x chunk bytes: round x heads + R / byte
    nvls_tree    level x log2(nodes) + S / (share x wires)
    p2p          start + peer x peers + simple + S/n (peers / (share x wires) + 1 / last) + chunk in flight / chunk

*steps* are those of the ring (2(n-1) or n-1). The last step of each loop only copies what has come into the result and
sends nothing, so the wires rest for ``S/n / last`` (src/device/all_reduce.h, all_gather.h: n or 2n-1 primitives, n-1 or
2(n-1) of which send). LL runs at the rate of its channels, whose number grows with the message (src/enqueue.cc,
topoGetAlgoInfo). Between nodes each step also costs a ``turn`` for each other GPU of the node: with one ring for each
NIC, every GPU stands at another place of each ring (seen on 10 nodes of 1, 2, 4, 8 GPUs; no source says why). A round
of NVLS is one chunk of each head and channel; the chunk grows with the message (calcCollChunking), and two rounds fill
the pipeline of scatter, reduction and multicast. ``wires`` is what NCCL takes the NVLinks (or the PCIe port) of a GPU
for, so that a coefficient is a share and holds for a part with fewer links.

Coefficients: ``sim/catalog/measured/nccl_*.yaml``, fitted by ``validation/measure/check_nccl.py``, which calls
:func:`terms_of` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sim import units
from sim.catalog.schema import GpuFacts
from sim.cost.efficiency import MEASURED, source_of

TERMS: dict[str, tuple[str, ...]] = {
    "ring/LL": ("start", "hop", "channel", "tail"),
    "ring/LL128": ("start", "hop", "turn", "share"),
    "ring/Simple": ("start", "hop", "turn", "share", "all_reduce", "all_gather", "reduce_scatter"),
    "nvls/Simple": ("round", "byte"),
    "nvls_tree/Simple": ("level", "share"),
    "p2p": ("start", "peer", "simple", "share", "last", "chunk"),
}
"""Names of the terms of an algorithm with a protocol: times (``TIMES``), rates, or shares of one."""
TIMES = frozenset({"start", "hop", "turn", "round", "level", "peer", "simple"})
NVLS_CHUNKS = ((64, 131072, 65536), (8, 65536, 32768), (2, 32768, 16384))
"""A message of fewer than (first) rounds with chunks of (second) bytes takes chunks of (third) bytes."""
P2P_CHUNK = {"nvlink": 512 * 1024, "pci": 128 * 1024, "shm": 128 * 1024, "net": 128 * 1024}
MOST_TURNS = 7
"""Turns of a step: measured on nodes of up to 8 GPUs. A domain of more (the 72 of an NVLink rack) is taken to have as
many: what the term stands for is a matter of a node's NICs and processors, and does not go on with NVLink's reach."""
P2P_LL_BYTES = 16384
"""A channel's part of a message up to which it goes by LL: NCCL_P2P_LL_THRESHOLD."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the terms of one collective are made of. ``wires`` in bytes per second; ``part`` a channel's share of one
    message (p2p) or the bytes of a round (NVLS)."""

    kind: str
    num_ranks: int
    num_nodes: int
    tensor_bytes: float
    channels: int
    wires: float
    part: float = 0.0
    heads: int = 0


def nvls_round_bytes(tensor_bytes: float, channels: int, heads: int, chunk: int = 131072) -> int:
    """Return the bytes of a round of NVLS on one node. Source: src/enqueue.cc, calcCollChunking."""
    together = channels * heads
    for rounds, above, smaller in NVLS_CHUNKS:
        if chunk >= above and tensor_bytes < rounds * together * chunk:
            chunk = smaller
    return together * chunk


def terms_of(name: str, hw: str, work: Work) -> tuple[float, ...]:
    """Return what each coefficient of ``TERMS[name]`` is multiplied with: counts, then bytes (a share's: seconds)."""
    n, size = work.num_ranks, work.tensor_bytes
    steps = 2 * (n - 1) if work.kind == "all_reduce" else n - 1
    per = size / n
    if work.kind in ("broadcast", "reduce"):  # a chain: everything crosses every hop, in a pipeline
        per = size / max(steps, 1)
    turns = steps * min(n // work.num_nodes - 1, MOST_TURNS) if work.num_nodes > 1 else 0
    over_wires = per * steps / work.wires if work.wires else 0.0
    if name == "ring/LL":
        return 1.0, steps, per * steps / work.channels, per / work.channels
    if name == "ring/LL128":
        return 1.0, steps, turns, over_wires
    if name == "ring/Simple":
        last = (per if work.kind == kind else 0.0 for kind in TERMS[name][4:])
        return (1.0, steps, turns, over_wires, *last)
    if name == "nvls/Simple":
        rounds = size / work.part + 2
        return rounds * work.heads, rounds * work.part
    if name == "nvls_tree/Simple":
        return work.num_nodes.bit_length() - 1, size / work.wires
    in_flight = min(work.part, P2P_CHUNK[hw])
    by_ll = work.part <= P2P_LL_BYTES
    return 1.0, n - 1, not by_ll, over_wires, per, in_flight


Coefficients = tuple[float, ...]
"""In the order of ``TERMS``: seconds, seconds per byte, or the inverse of a share."""


def coefficients_of(name: str, entry: Mapping[str, Any]) -> Coefficients:
    """Return the coefficients that a catalogue entry says; a term that it leaves out costs nothing."""
    found = []
    for term in TERMS[name]:
        value = entry.get(term)
        if value is None:
            found.append(0.0)
        elif term in TIMES:
            found.append(units.parse_duration(value))
        else:
            found.append(1 / value if term == "share" else 1 / units.parse_rate(value))
    return tuple(found)


def split(name: str, coefficients: Coefficients, parts: tuple[float, ...]) -> tuple[float, float]:
    """Return (latency, time of the bytes), in seconds."""
    latency_s = flow_s = 0.0
    for term, coefficient, part in zip(TERMS[name], coefficients, parts, strict=True):
        if term in TIMES:
            latency_s += coefficient * part
        else:
            flow_s += coefficient * part
    return latency_s, flow_s


@lru_cache(maxsize=32)
def _read(system: str) -> Mapping[str, Any]:
    import yaml

    path = MEASURED / f"nccl_{system.replace('-', '_')}.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: Mapping[str, Any] = yaml.load(path.read_text(encoding="utf-8"), loader) if path.exists() else {}
    return found


NEXT_BEST = {"nvlink": ("a100-sxm", "h100-sxm", "b200-sxm"), "pci": ("rtx-pro-6000",), "shm": ("rtx-pro-6000",)}
"""Whose coefficients stand in, by architecture: up to Ampere, Hopper, Blackwell. The network was measured on H100."""


def residuals_of(gpu: GpuFacts, several_nodes: bool) -> Mapping[str, Any] | None:
    """Return what the fit says of held-out collectives, of the machine whose coefficients a GPU takes."""
    own = source_of(gpu)
    generation = min(max(gpu.compute_capability[0] - 8, 0), 2) if gpu.vendor == "nvidia" else 0
    name = "residuals_between_nodes" if several_nodes else "residuals_one_node"
    for system in (own.name, NEXT_BEST["nvlink"][generation], "h100-sxm"):
        stated = _read(system).get("collectives", {}).get(name)
        if stated is not None:
            found: Mapping[str, Any] = stated
            return found
    return None


def measured_by(gpu: GpuFacts, name: str, hw: str) -> tuple[str, Coefficients] | None:
    """Return (system, coefficients) of an algorithm over ``hw`` (``nvlink``, ``pci``, ``shm``, ``net``) on a GPU."""
    own = source_of(gpu).name
    generation = 0
    if gpu.vendor == "nvidia":
        generation = min(max(gpu.compute_capability[0] - 8, 0), 2)
    others = NEXT_BEST.get(hw, ("h100-sxm",))
    for system in (own, others[min(generation, len(others) - 1)], *others):
        entry = _read(system).get(hw, {}).get(name)
        if entry is not None:
            return system, coefficients_of(name, entry)
    return None
