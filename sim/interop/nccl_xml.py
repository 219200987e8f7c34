"""NCCL's XML: a topology (``NCCL_TOPO_FILE``, ``NCCL_TOPO_DUMP_FILE``) or the graphs it found (``NCCL_GRAPH_*_FILE``).

A topology is ``system > cpu > pci ... > gpu | nic > net`` with ``nvlink`` and ``c2c`` inside a gpu (src/graph/xml.cc,
topo.cc). Files that clouds ship say less than a dump: no NVLinks, no ``gpu`` elements, sometimes no class of a PCI
device; NCCL asks the machine for the rest. Here the rest follows from the GPU's name, and is noted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers import expat

from sim.errors import Finding, ScenarioError
from sim.interop.machine import NVLINK, PCIE_GENERATION, Machine, join_sockets, wire_nvlinks

GPU_OF = {
    "0x1db1": "v100-sxm2-16gb", "0x1db5": "v100-sxm2-32gb", "0x1db6": "v100-pcie-32gb", "0x1db8": "v100-sxm3-32gb",
    "0x1eb8": "t4",
    "0x20b0": "a100-sxm-40gb", "0x20b2": "a100-sxm-80gb", "0x20f1": "a100-pcie-40gb", "0x20b5": "a100-pcie-80gb",
    "0x20b7": "a30", "0x2235": "a40", "0x2236": "a10", "0x2237": "a10g", "0x2230": "rtx-a6000", "0x2204": "rtx-3090",
    "0x26b9": "l40s", "0x27b8": "l4", "0x2684": "rtx-4090", "0x2b85": "rtx-5090", "0x2330": "h100-sxm-80gb",
    "0x2331": "h100-pcie-80gb", "0x2335": "h200-sxm-141gb", "0x2329": "h20-sxm-96gb", "0x2342": "gh200-96gb",
    "0x2901": "b200-sxm-180gb", "0x2941": "gb200-186gb", "0x3182": "b300-sxm-288gb", "0x2bb5": "rtx-pro-6000",
}  # fmt: skip
"""PCI device identifiers of NVIDIA (vendor 0x10de), from the PCI ID database (pci-ids.ucw.cz)."""
CUBE_MESH = {
    (0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2,
    (2, 6): 1, (3, 7): 1, (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2,
}  # fmt: skip
"""NVLinks between the GPUs of a DGX-1 with V100, as its ``nvidia-smi topo -m`` says."""
PATTERNS = {1: "balanced tree", 2: "split tree", 3: "tree", 4: "ring", 5: "NVLS", 6: "CollNet direct"}
_GENERATION = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_UNKNOWN_WIDTHS = ("63", "255")
"""What Linux says of a width that it does not know: PCIE_LNK_WIDTH_UNKNOWN (include/linux/pci.h), and a link status
of all ones; the speed is then "Unknown"."""
_GPU_OF_SM = {
    70: ("v100-pcie-32gb", "v100-sxm2-32gb"), 75: ("t4", "t4"), 80: ("a100-pcie-80gb", "a100-sxm-80gb"),
    86: ("a10g", "a40"), 89: ("l40s", "l40s"), 90: ("h100-pcie-80gb", "h100-sxm-80gb"),
    100: ("b200-sxm-180gb", "b200-sxm-180gb"), 103: ("b300-sxm-288gb", "b300-sxm-288gb"),
    120: ("rtx-pro-6000", "rtx-pro-6000"),
}  # fmt: skip
"""By compute capability: a GPU of it without NVLinks, one with."""
_WITH_C2C = {90: "gh200-96gb", 100: "gb200-186gb", 103: "gb300-288gb"}
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
_INSIDE = {
    "": ("system", "graphs"), "system": ("cpu",), "cpu": ("pci", "nic"), "pci": ("pci", "gpu", "nic", "pcilink"),
    "gpu": ("nvlink", "c2c"), "nic": ("net",), "graphs": ("graph",), "graph": ("channel",), "channel": ("gpu", "net"),
}  # fmt: skip


@dataclass
class Element:
    """One element, with the line that it starts in."""

    name: str
    line: int
    values: dict[str, str]
    inside: list[Element] = field(default_factory=list)

    def of(self, *names: str) -> list[Element]:
        return [element for element in self.inside if element.name in names]


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph of a dump: ``pattern`` in words, GB/s of a channel inside a node and between, GPUs of each channel."""

    pattern: str
    bw_intra: float
    bw_inter: float
    type_intra: str
    type_inter: str
    channels: tuple[tuple[str, ...], ...]


def looks_like(text: str) -> bool:
    return text.lstrip().startswith("<")


def parse(text: str, file: str) -> Element:
    """Return the root element. Raises ScenarioError where it is not XML, or not of NCCL."""
    top = Element("", 0, {})
    stack = [top]
    findings: list[Finding] = []
    parser = expat.ParserCreate()

    def start(name: str, values: dict[str, str]) -> None:
        element = Element(name, parser.CurrentLineNumber, values)
        known = _INSIDE.get(stack[-1].name)
        if known is not None and name not in known and len(stack) < 3:
            where = f"inside <{stack[-1].name}>" if stack[-1].name else "at the top"
            remedy = f"NCCL has {' or '.join(f'<{word}>' for word in known)} there"
            findings.append(Finding(file, element.line, f"<{name}> {where}", remedy))
        stack[-1].inside.append(element)
        stack.append(element)

    def refuse(*_: object) -> None:
        raise ScenarioError([Finding(file, parser.CurrentLineNumber, "entities are not used here", "write them out")])

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: stack.pop()
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        words = expat.ErrorString(error.code)
        finding = Finding(file, error.lineno, f"is not XML: {words}", "give the file that NCCL_TOPO_DUMP_FILE wrote")
        raise ScenarioError([finding]) from None
    if findings:
        raise ScenarioError(findings)
    return top.inside[0]


def graphs(root: Element, file: str) -> tuple[Graph, ...]:
    """Return the graphs of a dump. Raises ScenarioError with every line that is wrong."""
    findings: list[Finding] = []
    found = []
    for graph in root.of("graph"):
        channels = tuple(
            tuple(("" if e.name == "gpu" else "net") + e.values.get("dev", "?") for e in channel.of("gpu", "net"))
            for channel in graph.of("channel")
        )
        number = graph.values.get("pattern", "")
        if not number.isdigit() or int(number) not in PATTERNS:
            findings.append(Finding(file, graph.line, f"pattern {number!r}", f"one of {', '.join(map(str, PATTERNS))}"))
            continue
        said = graph.values.get("nchannels", "")
        if said.isdigit() and int(said) != len(channels):
            problem = f"nchannels is {said}, but there are {len(channels)} <channel>"
            findings.append(Finding(file, graph.line, problem, "give the whole file"))
        speeds = [_number(graph, name, file, findings) for name in ("speedintra", "speedinter")]
        kinds = graph.values.get("typeintra", "?"), graph.values.get("typeinter", "?")
        found.append(Graph(PATTERNS[int(number)], speeds[0], speeds[1], *kinds, channels))
    if not found and not findings:
        findings.append(Finding(file, root.line, "there is no <graph> in it", "give the file of NCCL_GRAPH_DUMP_FILE"))
    if findings:
        raise ScenarioError(findings)
    return tuple(found)


def _number(element: Element, name: str, file: str, findings: list[Finding]) -> float:
    text = element.values.get(name, "0")
    try:
        return float(text)
    except ValueError:
        findings.append(Finding(file, element.line, f"{name} is {text!r}", "a number"))
        return 0.0


class _Builder:
    """Walks the tree of a topology and adds what it meets to a machine."""

    def __init__(self, file: str, machine: Machine) -> None:
        self.file = file
        self.machine = machine
        self.findings: list[Finding] = []
        self.by_bus: dict[str, str] = {}
        self.nvlinks: list[tuple[str, Element]] = []
        self.guessed: set[str] = set()
        self.devices: dict[str, None] = {}
        self.unclassed: list[Element] = []

    def walk(self, element: Element, parent: str) -> None:
        for pci in element.of("pci"):
            self._pci(pci, parent)
        for nic in element.of("nic"):
            for net in nic.of("net"):
                name = self.machine.add("nic", net.values.get("name", ""))
                self.machine.wires.append(f"{name} to {parent} by pcie{self.machine.pcie_generation}-x16")

    def _pci(self, pci: Element, parent: str) -> None:
        bus = pci.values.get("busid", "").lower()
        if not bus:
            self.findings.append(Finding(self.file, pci.line, "a <pci> without busid", 'write busid="0000:07:00.0"'))
            return
        if bus in self.by_bus:
            self.findings.append(Finding(self.file, pci.line, f"busid {bus} is there twice", "one <pci> a device"))
        if pci.values.get("vendor") == "0x1002" or any("gcn" in gpu.values for gpu in pci.of("gpu")):
            remedy = "name a node of `sim catalog node`, or write a topology file as those in topologies/"
            self.findings.append(Finding(self.file, pci.line, "an AMD GPU: RCCL's topology is not read", remedy))
        kind = self._kind(pci)
        label = bus
        if nets := [net for nic in pci.of("nic") for net in nic.of("net")]:
            label = nets[0].values.get("name", bus)
        name = self.machine.add(kind, label)
        self.by_bus[bus] = name
        if kind == "gpu" and (device := pci.values.get("device", "")):
            self.devices[device.lower()] = None
        gpus = pci.of("gpu")
        for another in gpus[1:]:
            self.findings.append(
                Finding(self.file, another.line, "a second <gpu> in a <pci>", "one <pci> for each GPU")
            )
        link = self._link(pci)
        if parent.startswith("cpu") and any(gpu.of("c2c") for gpu in gpus):
            link = "c2c"
        inner = pci.of("pci")
        self.machine.wires.append(f"{name} to {parent} by {link}")
        for gpu in gpus:
            self.nvlinks += [(name, nvlink) for nvlink in gpu.of("nvlink")]
        if inner or kind == "pcie-switch":
            self.walk(pci, name)

    def _kind(self, pci: Element) -> str:
        code = pci.values.get("class", "").lower()
        if pci.of("gpu") or code.startswith("0x03"):
            return "gpu"
        if pci.of("nic") or code.startswith("0x02"):
            return "nic"
        if pci.of("pci") or code.startswith("0x06"):
            return "pcie-switch"
        if not code and pci in self.unclassed:
            # NCCL asks the machine; here the first power of two of them are taken for GPUs.
            return "gpu" if self.unclassed.index(pci) < 1 << (len(self.unclassed).bit_length() - 1) else "nic"
        problem = f"class {code!r} is neither a GPU, a NIC nor a bridge" if code else "a <pci> without class"
        self.findings.append(Finding(self.file, pci.line, problem, "0x030200, 0x020700 (or 0x020000), or 0x060400"))
        return "pcie-switch"

    def _link(self, pci: Element) -> str:
        words = pci.values.get("link_speed", "").split()
        width = pci.values.get("link_width", "") or "0"
        if width in _UNKNOWN_WIDTHS:
            width = "0"
        generation = self.machine.pcie_generation
        if words and words[0].lower() != "unknown":
            try:
                generation = _GENERATION[float(words[0])]
            except (ValueError, KeyError):
                remedy = 'write link_speed="16.0 GT/s PCIe"'
                self.findings.append(Finding(self.file, pci.line, f"link_speed {words[0]!r}", remedy))
        else:
            self.guessed.add("the speed of PCIe")
        if width not in ("0", "4", "8", "16", "1", "2", "32"):
            self.findings.append(Finding(self.file, pci.line, f"link_width {width!r}", "4, 8 or 16"))
            width = "16"
        if width == "0":
            self.guessed.add("the width of PCIe")
        lanes = {"0": 16, "32": 16, "1": 4, "2": 4}.get(width) or int(width)
        return f"pcie{min(max(generation, 3), 6)}-x{lanes}"


def gpu_of(root: Element) -> tuple[str, str]:
    """Return the catalogue's name of the GPU, by the PCI device of the file, and what was guessed (else nothing)."""
    speeds = [0.0]
    classes = False
    first: Element | None = None
    for cpu in root.of("cpu"):
        stack = list(cpu.inside)
        while stack:
            element = stack.pop(0)
            device = element.values.get("device", "").lower()
            first = first or next(iter(element.of("gpu")), None)
            if element.values.get("class", "").startswith("0x03"):
                classes = True
                if device in GPU_OF:
                    return GPU_OF[device], ""
                speed = element.values.get("link_speed", "0").split(" ")[0]
                speeds.append(float(speed) if re.fullmatch(r"[\d.]{1,5}", speed) else 0.0)
            stack += element.inside
    sm = first.values.get("sm", "") if first else ""
    if first and sm.isdigit() and int(sm) in _GPU_OF_SM:
        guess = _GPU_OF_SM[int(sm)][bool(first.of("nvlink"))]
        if first.of("c2c"):
            guess = _WITH_C2C.get(int(sm), guess)
        return guess, f"the file does not say which GPU: {guess} taken, by its compute capability"
    if not classes:
        return "a10g", "the file does not say which GPU, nor what a GPU is: A10G taken, as in g5"
    generation = _GENERATION.get(max(speeds), 4)
    guess = {3: "v100-sxm2-32gb", 5: "h100-sxm-80gb", 6: "b200-sxm-180gb"}.get(generation, "a100-sxm-80gb")
    return guess, f"the file does not say which GPU: {guess} taken, by its PCIe"


def to_machine(root: Element, file: str, gpu: str, major: int, has_nvlink: bool) -> Machine:
    """Return the machine of a topology. ``gpu`` is a name of the catalogue, ``has_nvlink`` whether it has NVLink
    (then a file without them stands for one where all GPUs have them). Raises ScenarioError with every wrong line."""
    machine = Machine(f"read from {file.rsplit('/', 1)[-1]}", gpu, "")
    machine.pcie_generation = PCIE_GENERATION.get(major, 4)
    builder = _Builder(file, machine)
    cpus = _one_host(root.of("cpu"), machine)
    if not cpus:
        raise ScenarioError(
            [Finding(file, root.line, "there is no <cpu> in it", "give what NCCL_TOPO_DUMP_FILE wrote")]
        )
    for cpu in cpus:
        builder.unclassed += [p for p in cpu.of("pci") if not p.values.get("class") and not p.inside]
    for cpu in cpus:
        machine.cpu_vendor = machine.cpu_vendor or _VENDORS.get(cpu.values.get("vendor", ""), "")
        if cpu.values.get("arch") in ("arm64", "aarch64"):
            machine.cpu_vendor = "arm"
        builder.walk(cpu, machine.add("cpu", f"numa {cpu.values.get('numaid', '?')}"))
        machine.num_cores += _cores(cpu.values.get("affinity", ""))
    machine.num_cores //= 1 if machine.cpu_vendor == "arm" else 2
    machine.cpu_vendor = machine.cpu_vendor or "intel"
    if not machine.counts.get("gpu"):
        builder.findings.append(
            Finding(file, root.line, "there is no GPU in it", 'a <pci class="0x030200" ...> for each')
        )
    pairs = _pairs(builder, machine, file, major)
    if builder.findings:
        raise ScenarioError(builder.findings)
    if builder.unclassed:
        builder.guessed.add("which devices are GPUs and which are NICs")
    if not builder.nvlinks and has_nvlink and major == 7 and machine.counts["gpu"] == 8:
        wire_nvlinks(machine, CUBE_MESH, major)
        machine.notes.append("the file has no NVLinks (NCCL asks the machine): the hybrid cube mesh of a DGX-1 taken")
    elif not builder.nvlinks and has_nvlink and machine.counts["gpu"] > 1:
        kind, count = NVLINK.get(major, ("nvlink4", 18))
        switch = machine.add("nvswitch")
        machine.wires.append(f"gpu[0-{machine.counts['gpu'] - 1}] to {switch} by {count} x {kind}")
        machine.multicast = major >= 9
        machine.notes.append("the file has no NVLinks (NCCL asks the machine): all of each GPU to a switch, as in HGX")
    elif pairs:
        wire_nvlinks(machine, pairs, major)
    if builder.guessed:
        machine.notes.append(f"not in the file, taken as usual: {', '.join(sorted(builder.guessed))}")
    if len(cpus) > 2:
        machine.notes.append("each NUMA node is taken for a socket of its own")
    join_sockets(machine)
    return machine


def _one_host(cpus: list[Element], machine: Machine) -> list[Element]:
    """Return the processors of the first host, and note how many there are: NCCL dumps all hosts of a clique that
    NVLinks join in one file and says whose a processor is (``host_hash``, ncclTopoFuseXml in graph/xml.cc)."""
    hosts = dict.fromkeys(cpu.values.get("host_hash", "") for cpu in cpus)
    if len(hosts) > 1:
        machine.nvlink_domain_nodes = len(hosts)
        many = f"{len(hosts)} hosts that NVLinks join are in it"
        machine.notes.append(f"{many}: the first is the node, in a domain of {len(hosts)}")
    return [cpu for cpu in cpus if cpu.values.get("host_hash", "") == next(iter(hosts))]


def _pairs(builder: _Builder, machine: Machine, file: str, major: int) -> dict[tuple[int, int], int]:
    """Return NVLinks between GPUs; those to switches are wired at once."""
    pairs: dict[tuple[int, int], int] = {}
    to_switch: dict[str, int] = {}
    for name, link in builder.nvlinks:
        count, target = link.values.get("count", "1"), link.values.get("target", "").lower()
        if not count.isdigit():
            builder.findings.append(Finding(file, link.line, f"count {count!r} of an <nvlink>", "a number"))
        elif link.values.get("tclass", "").lower().startswith("0x0680") or target.startswith("ffff"):
            to_switch[name] = to_switch.get(name, 0) + int(count)
        elif target not in builder.by_bus or not builder.by_bus[target].startswith("gpu"):
            remedy = "the busid of a GPU, or tclass 0x068000 for an NVSwitch"
            builder.findings.append(Finding(file, link.line, f"an <nvlink> to {target or 'nowhere'}", remedy))
        elif builder.by_bus[target] == name:
            machine.notes.append(f"{name}: an NVLink to itself, left out")
        else:
            a, b = sorted(int(n[3:]) for n in (name, builder.by_bus[target]))
            pairs[a, b] = max(pairs.get((a, b), 0), int(count))
    if to_switch:
        switch = machine.add("nvswitch")
        kind, _ = NVLINK.get(major, ("nvlink4", 18))
        machine.wires += [f"{name} to {switch} by {count} x {kind}" for name, count in to_switch.items()]
        machine.multicast = major >= 9
    return pairs


def _cores(mask: str) -> int:
    """Return how many threads an affinity mask names: ``00000000,000fffff`` is 20."""
    try:
        return int(mask.replace(",", ""), 16).bit_count() if mask else 0
    except ValueError:
        return 0
