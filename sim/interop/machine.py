"""A machine as foreign files describe it, and the topology file that says the same.

``nvidia-smi topo -m`` and NCCL's XML say how devices hang together, not which GPU, link generation, memory or processor
they are. What they leave out is taken from the GPU's name where one is given, else guessed, and every guess is a note
that ends up as a comment in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = ("gpu", "nvswitch", "pcie-switch", "cpu", "nic")

NVLINK = {7: ("nvlink2", 6), 8: ("nvlink3", 12), 9: ("nvlink4", 18), 10: ("nvlink5", 18)}
"""Link and number of links of a GPU, by major compute capability."""
PCIE_GENERATION = {7: 3, 8: 4, 9: 5, 10: 5, 12: 5}
PER_SOCKET = {3: "128 GB/s", 4: "204.8 GB/s", 5: "307.2 GB/s"}
"""Memory bandwidth of a socket of the time of a PCIe generation: 6 channels at 2666, 8 at 3200, 8 at 4800 MT/s."""
SOCKET_LINK = {3: "upi-skylake", 4: "upi-skylake", 5: "upi-sapphire-rapids"}


@dataclass
class Machine:
    """Devices, and wires as sentences of a topology file. ``labels``: what the foreign file calls a device."""

    title: str
    gpu: str
    cpu_vendor: str = "intel"
    counts: dict[str, int] = field(default_factory=dict)
    wires: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_cores: int = 0
    pcie_generation: int = 4
    multicast: bool = False
    nvlink_domain_nodes: int = 1

    def add(self, kind: str, label: str = "") -> str:
        """Return the name of one more device."""
        assert kind in KINDS
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        if label:
            self.labels[f"{kind}{number}"] = label
        return f"{kind}{number}"


def topology_text(machine: Machine) -> str:
    """Return the topology file of a machine."""
    sockets = machine.counts.get("cpu", 1)
    lines = [f"title: {machine.title}", f"gpu: {machine.gpu}", f"cpu_vendor: {machine.cpu_vendor}"]
    if machine.notes:
        lines[:0] = [f"# {note}" for note in machine.notes]
    lines += [
        f"host_memory: {256 * sockets} GB  # not in the source: a guess",
        f"host_memory_bandwidth: {_times(PER_SOCKET[machine.pcie_generation], sockets)}  # not in the source: a guess",
        f"cpu_cores: {machine.num_cores or 32 * sockets}" + ("" if machine.num_cores else "  # a guess"),
    ]
    if machine.multicast:
        lines.append("nvswitch_multicast: true")
    if machine.nvlink_domain_nodes > 1:
        lines.append(f"nvlink_domain_nodes: {machine.nvlink_domain_nodes}")
    devices = ", ".join(f"{kind}: {machine.counts[kind]}" for kind in KINDS if machine.counts.get(kind))
    lines.append(f"devices: {{{devices}}}")
    named = [f"{name} {label}" for name, label in machine.labels.items() if name != label.lower()]
    for start in range(0, len(named), 6):
        lines.append(f"# {', '.join(named[start : start + 6])}")
    lines.append("wires:")
    lines += [f"  - {wire}" for wire in machine.wires]
    return "\n".join(lines) + "\n"


def _times(rate: str, count: int) -> str:
    return f"{float(rate.removesuffix(' GB/s')) * count:g} GB/s"


def join_sockets(machine: Machine) -> None:
    """Wire every two sockets."""
    count = machine.counts.get("cpu", 0)
    link = {"amd": "xgmi-epyc", "arm": "grace-link"}.get(machine.cpu_vendor, SOCKET_LINK[machine.pcie_generation])
    if count == 2:
        machine.wires.append(f"cpu0 to cpu1 by {link}")
    elif count > 2:
        machine.wires.append(f"among cpu[0-{count - 1}] by {link}")


def wire_nvlinks(machine: Machine, pairs: dict[tuple[int, int], int], major: int) -> None:
    """Add NVLinks: ``pairs`` of GPUs with how many links join them.

    A GPU that reaches others over more links than it has reaches them through switches.
    """
    kind, most = NVLINK.get(major, ("nvlink3-bridge" if major == 8 else "nvlink4", 12))
    out: dict[int, int] = {}
    widest: dict[int, int] = {}
    for (a, b), count in pairs.items():
        for gpu in (a, b):
            out[gpu] = out.get(gpu, 0) + count
            widest[gpu] = max(widest.get(gpu, 0), count)
    if out and max(out.values()) > most:
        switch = machine.add("nvswitch")
        for gpu in sorted(out):
            machine.wires.append(f"gpu{gpu} to {switch} by {widest[gpu]} x {kind}")
        machine.multicast = major >= 9
        return
    for (a, b), count in sorted(pairs.items()):
        machine.wires.append(f"gpu{a} to gpu{b} by {count} x {kind}")


def has_nvlink(gpu: str, compute_capability: tuple[int, int]) -> bool:
    """Return whether boards of a GPU have NVLink: a bridge's or a baseboard's.

    Sources: NVIDIA's data sheets of Ada's and RTX Blackwell's boards, T4 and A10, which name PCIe alone (RTX 4090 and
    5090: "NVLink (SLI-Ready): No"); AWS's A10G is an A10.
    """
    return compute_capability not in ((8, 9), (12, 0)) and gpu not in ("t4", "a10", "a10g")


def guess_gpu(links: int, num_gpus: int) -> tuple[str, str]:
    """Return (GPU, why) by the NVLinks between two GPUs, where nobody said."""
    if links >= 18:
        return "h100-sxm-80gb", "18 NVLinks: H100, H200 or later; H100 taken"
    if links >= 12:
        return "a100-sxm-80gb", "12 NVLinks: A100 SXM"
    if links == 6 and num_gpus > 2:
        return "v100-sxm3-32gb", "6 NVLinks: V100 behind NVSwitch"
    if links in (1, 2):
        return "v100-sxm2-16gb", "1 or 2 NVLinks between GPUs: V100 in a mesh"
    if links:
        return "a100-pcie-80gb", f"{links} NVLinks: a bridge; A100 PCIe taken"
    return "a100-pcie-80gb", "no NVLink: A100 PCIe taken"


def spans(numbers: Sequence[int]) -> str:
    """Return ``0-3,8`` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
