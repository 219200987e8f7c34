"""What a fact looks like: a value in base units, its kind and its source.

The data files hold text with units (``value: 989.4 TFLOP/s``); ``load`` parses them with ``sim.units`` into
the plain fields below and keeps the provenance of every field in ``facts``, for ``sim explain`` and ``sim catalog``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FactKind = Literal["datasheet", "measured", "assumed", "derived", "user"]


@dataclass(frozen=True, slots=True)
class Fact:
    """Where a value comes from. ``text`` is the value as written, with its unit."""

    text: str
    kind: FactKind
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One kind of GPU. Bandwidths are of one direction; FLOP/s are dense.

    ``total_memory_bytes``   what cudaMemGetInfo calls total: what context, libraries and the framework share
    ``peak_flops``           dense peak by precision ("bf16", "fp16", "tf32", "fp32", "fp8", "mxfp8", "nvfp4", "int8");
                             absent: unsupported
    ``boost_clock_hz``       the clock at which ``peak_flops`` is defined
    ``cuda_context_bytes``   context with lazily loaded kernels, before any library
    ``copy_bytes_per_s``     device to device within one GPU, 0 if unknown
    """

    name: str
    vendor: Literal["nvidia", "amd"]
    architecture: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    total_memory_bytes: int
    memory_bytes_per_s: float
    l2_bytes: int
    num_sms: int
    boost_clock_hz: float
    power_w: float
    peak_flops: Mapping[str, float]
    cuda_context_bytes: int
    peer_to_peer: bool = True
    """Whether the driver lets GPUs of this kind reach each other's memory over PCIe (GeForce: no)."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    cuda_context_band_bytes: tuple[int, int] = (0, 0)
    """What has been seen of it, least and most: no table by driver is published."""
    spread: float | None = None
    """Standard deviation of matmuls' speed from GPU to GPU; None: as measured (sim/cost/spread.py)."""


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """One kind of wire: payload bandwidth of one direction, latency of one crossing."""

    name: str
    kind: str
    bytes_per_s: float
    latency_s: float
    facts: Mapping[str, Fact] = field(default_factory=dict)
    copy_bytes_per_s: float = 0.0
    """What a copy engine reaches over it, where that was measured; 0 where not: use ``bytes_per_s``."""


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """The network between nodes.

    ``nic_bytes_per_s``  payload of one NIC and direction; ``nics_per_node`` how many a node has
    ``oversubscription`` leaf uplink capacity is 1/oversubscription of the ports below
    ``topology``         ``rail-optimised`` (NIC i of every node on leaf i) or ``fat-tree``
    ``gpudirect``        whether NICs reach GPU memory without a copy through the host
    """

    name: str
    fabric: Literal["infiniband", "roce", "efa", "slingshot", "omni-path", "ethernet"]
    nic_bytes_per_s: float
    nics_per_node: int
    latency_s: float
    topology: Literal["rail-optimised", "fat-tree"] = "rail-optimised"
    oversubscription: float = 1.0
    gpudirect: bool = True
    nodes_per_leaf: int = 32
    facts: Mapping[str, Fact] = field(default_factory=dict)
    line_bytes_per_s: float = 0.0
    """What one NIC's port is sold as ("400 Gbit/s"); ``nic_bytes_per_s`` is what gets through it."""
    connection_bytes_per_s: float = 0.0
    """What one connection carries (a queue pair, which NCCL opens for each channel of each pair of ranks) where a
    processor moves its packets; 0: as much as the NIC."""
    channels_per_peer: int = 0
    """Channels that NCCL gives a message to another node (NCCL_NCHANNELS_PER_NET_PEER); 0: by its own rule."""
    sharp: bool = False
    """Whether its switches reduce for NCCL (SHARP's plugin, NCCL_COLLNET_ENABLE=1)."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One kind of node: devices and wires between them, as a topology file under ``topologies/`` says.

    ``devices``  (name, kind): kind is gpu, nvswitch, pcie-switch, cpu (a socket with its memory), nic
    ``wires``    (device, device, link kind, count): both directions exist; ``count`` equal links in parallel
    """

    name: str
    title: str
    gpu: str
    num_gpus: int
    devices: tuple[tuple[str, str], ...]
    wires: tuple[tuple[str, str, str, int], ...]
    host_memory_bytes: int
    host_memory_bytes_per_s: float
    num_cpu_cores: int
    default_network: str
    power_w: float = 0.0
    nvswitch_multicast: bool = False
    """Switches that reduce and multicast (NVLS): H100's generation on."""
    cpu_vendor: Literal["intel", "amd", "arm", "power"] = "intel"
    """NCCL's limits between nodes and its rule for peer access depend on it."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    cpu: str = ""
    nvlink_domain_nodes: int = 1
    """Nodes whose NVSwitches are one fabric: 18 trays of an NVL72 rack, else 1."""
