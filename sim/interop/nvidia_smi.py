"""``nvidia-smi topo -m`` as it is found in the wild: with tabs or blanks, ANSI codes, other output around it.

The matrix says for every two devices the nearest thing that both hang on. A tree that says the same is built from it:

    PIX            one PCIe switch
    PXB            several PCIe switches, below one host bridge
    PHB, NODE      the same processor (NUMA node)
    SYS            different ones
    NV#            # NVLinks: says nothing of PCIe, which then follows from the NICs and the affinities

A NUMA node is taken for a socket: with several NUMA nodes a socket the links between them are better than here.
Columns that a terminal ran together (``NODENODE``) are told apart where that gives as many as there are devices. A GPU
with a NUMA node of its own (``GPU NUMA ID``) hangs on a Grace by NVLink-C2C: no other has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sim.errors import Finding, ScenarioError
from sim.interop.machine import PCIE_GENERATION, Machine, guess_gpu, join_sockets, wire_nvlinks

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\x1b\(B|\[(?:4|0|24)m")
_DEVICE = re.compile(r"^(GPU\d+|NIC\d+|[a-z][a-z0-9]*_[a-z0-9_]+|ib\w*\d|en\w+|roce\w*)$")
_NIC = re.compile(r"^[a-z][a-z0-9_.-]*\d[a-z0-9_.-]*$")
"""Names of NICs as the first line has them after the first GPU: mlx5_bond_0, bnxt_re0, irdma0, rocep4s0f1, ..."""
_QUOTED = re.compile(r"^\s*(?:>\s?)+")
_WORD = re.compile(r"^(X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC|C2C)$")
_WORDS = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC|C2C")
GRACE = ("gh200", "gb200", "gb300")
"""GPUs that hang on a Grace."""
_P2P = {"OK", "CNS", "GNS", "TNS", "NS", "DR", "U"}
_NEAR = {"PIX": 1, "PXB": 2, "PHB": 3, "NODE": 3, "SYS": 4, "SOC": 4}


@dataclass(frozen=True, slots=True)
class Matrix:
    """``names`` of the devices, ``cells[a, b]`` what stands between two, ``numa`` and ``cpus`` of each GPU.

    ``coherent``: GPUs whose memory is a NUMA node of its own.
    """

    names: tuple[str, ...]
    cells: Mapping[tuple[str, str], str]
    numa: Mapping[str, str]
    cpus: Mapping[str, str]
    nic_names: Mapping[str, str]
    coherent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name.startswith("GPU"))

    @property
    def nics(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if not name.startswith("GPU"))


def looks_like(text: str) -> bool:
    """Whether some text holds the header of a matrix."""
    return any(_header(line) for line in text.splitlines())


def _fields(line: str) -> list[str]:
    return _ANSI.sub("", _QUOTED.sub("", line)).split()


def _header(line: str) -> tuple[str, ...]:
    """Return the devices of a header line, or nothing."""
    words = _fields(line)
    names: list[str] = []
    for word in words:
        if not (_DEVICE.match(word) or (names and _NIC.match(word))):
            break
        names.append(word)
    rest = words[len(names) :]
    if names and re.fullmatch(r"GPU\d+", names[0]) and (not rest or rest[0] in ("CPU", "NUMA", "GPU")):
        return tuple(names)
    return ()


def read_matrix(text: str, file: str) -> Matrix:
    """Return the matrix in some text. Raises ScenarioError with every line that is wrong."""
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if _header(line)), None)
    if at is None or "ROCm" in text:
        raise ScenarioError([_no_matrix(text, file)])
    names = _header(lines[at])
    findings: list[Finding] = []
    cells: dict[tuple[str, str], str] = {}
    where: dict[str, int] = {}
    numa: dict[str, str] = {}
    cpus: dict[str, str] = {}
    coherent: list[str] = []
    numbered = "GPU NUMA ID" in " ".join(_fields(lines[at]))
    if len(set(names)) < len(names):
        findings.append(Finding(file, at + 1, "a device is named twice in the first line", "paste the matrix again"))
    for number, line in enumerate(lines[at + 1 :], at + 2):
        words = _fields(line)
        if not words or words[0].startswith("MIG"):
            continue
        row = words[0]
        if row in ("Legend:", "NIC") or row in where:
            break
        if row not in names:
            if len(where) < len(names) and _DEVICE.match(row) and len(words) > 2:
                problem = f"a row of {row}, which the first line does not name"
                findings.append(Finding(file, number, problem, "paste the whole matrix"))
            continue
        where[row] = number
        words = [row, *_told_apart(words[1:], len(names))]
        if wrong := _wrong_row(row, words[1 : 1 + len(names)], names):
            findings.append(Finding(file, number, *wrong))
            continue
        found = ["SYS" if word == "SOC" else word for word in words[1 : 1 + len(names)]]
        cells.update({(row, name): word for name, word in zip(names, found, strict=True)})
        _affinity(row, words[1 + len(names) :], numa, cpus)
        coherent += [row] * (numbered and row.startswith("GPU") and len(words) > 3 + len(names) and words[-1].isdigit())
    if not findings and (missing := [name for name in names if name not in where]):
        rows = f"the row of {missing[0]} is" if len(missing) == 1 else f"the rows of {', '.join(missing)} are"
        findings.append(Finding(file, at + 1, f"{rows} missing", "paste the whole matrix"))
    findings += _both_ways(names, cells, where, file)
    if findings:
        raise ScenarioError(findings)
    nic_names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)\s*$", text, re.MULTILINE))
    return Matrix(names, cells, numa, cpus, nic_names, tuple(coherent), _around(lines, at))


def _no_matrix(text: str, file: str) -> Finding:
    if "ROCm" in text:
        what = "name a node of `sim catalog node`, or write a topology file as those in topologies/"
        return Finding(file, 0, "is of AMD's rocm-smi, which is not read", what)
    what = "paste the output of `nvidia-smi topo -m` with its first line, the one of GPU0, GPU1, ..."
    return Finding(file, 0, "there is no matrix of `nvidia-smi topo -m` in it", what)


def _both_ways(
    names: tuple[str, ...], cells: Mapping[tuple[str, str], str], where: Mapping[str, int], file: str
) -> list[Finding]:  # fmt: skip
    """Return where the matrix does not read the same both ways."""
    what = "the matrix reads the same both ways"
    return [
        Finding(file, where[b], f"{a} to {b} is {word}, {b} to {a} is {cells[b, a]}", what)
        for (a, b), word in cells.items()
        if names.index(a) < names.index(b) and cells.get((b, a), word) != word
    ]


def _around(lines: list[str], at: int) -> tuple[str, ...]:
    """Return notes on what stands below the header, which is line ``at``, beside the matrix."""
    notes = []
    if any(_fields(line)[:1] and _fields(line)[0].startswith("MIG") for line in lines):
        notes.append("MIG slices are in it: the GPUs are taken as wholes")
    if others := [i for i, line in enumerate(lines[at + 1 :], at + 2) if _header(line)]:
        notes.append(f"a second matrix begins in line {others[0]}: left out")
    return tuple(notes)


def _told_apart(found: list[str], many: int) -> list[str]:
    """Return the words of a row, those split that hold several connections, if that gives ``many`` of them."""
    apart: list[str] = []
    for at, word in enumerate(found):
        if len(apart) >= many:
            return apart + found[at:] if len(apart) == many else found
        several = _WORDS.findall(word)
        apart += several if "".join(several) == word else [word]
    return apart if len(apart) == many else found


def _wrong_row(row: str, found: list[str], names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return what is wrong with a row of the matrix, and what to write."""
    bad = [word for word in found if not _WORD.match(word)]
    if bad and all(word in _P2P or word == "X" for word in found):
        return f"{bad[0]!r} is from `nvidia-smi topo -p2p`", "paste the output of `nvidia-smi topo -m`"
    if len(found) < len(names) and not bad:
        return f"{row} has {len(found)} of {len(names)} columns", "paste the line whole, with its tabs"
    if bad:
        known = "X, NV#, PIX, PXB, PHB, NODE or SYS"
        return f"{row}: {bad[0]!r} is not a connection", f"write {known}; is a tab missing?"
    if (itself := found[names.index(row)]) != "X":
        return f"{row} is {itself!r} to itself", "paste the line whole; X stands there"
    return None


def _affinity(row: str, rest: list[str], numa: dict[str, str], cpus: dict[str, str]) -> None:
    """Note CPU and NUMA affinity of a GPU: ``0-19,40-59  0  N/A``, of which any part may be missing."""
    if not row.startswith("GPU"):
        return
    rest = [word for word in rest if word != "N/A"]
    if rest and re.fullmatch(r"[0-9,-]+", rest[0]):
        if "-" in rest[0] or "," in rest[0] or len(rest) > 1:
            cpus[row] = rest[0]
            if len(rest) > 1:
                numa[row] = rest[1]
        else:
            numa[row] = rest[0]


def _groups(names: tuple[str, ...], joined: Mapping[tuple[str, str], bool]) -> list[list[str]]:
    """Return the names in groups: those that are joined, however indirectly, in the order of the first of each."""
    group = {name: name for name in names}
    for a in names:
        for b in names:
            if joined.get((a, b)) and group[a] != group[b]:
                old, new = group[b], group[a]
                group = {name: new if g == old else g for name, g in group.items()}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(group[name], []).append(name)
    return list(found.values())


def _same_socket(matrix: Matrix, a: str, b: str) -> bool:
    word = matrix.cells[a, b]
    if word in _NEAR:
        return _NEAR[word] < _NEAR["SYS"]
    if a in matrix.numa and b in matrix.numa:
        return matrix.numa[a] == matrix.numa[b]
    return a in matrix.cpus and matrix.cpus[a] == matrix.cpus.get(b)


def to_machine(matrix: Matrix, title: str, gpu: str, major: int, cpu_vendor: str = "") -> Machine:
    """Return a machine whose paths are those of the matrix. ``gpu`` may be empty; ``major`` its compute capability."""
    widest = max((int(w[2:]) for w in matrix.cells.values() if w.startswith("NV")), default=0)
    grace = bool(matrix.coherent) or gpu.startswith(GRACE)
    machine = Machine(title, gpu, cpu_vendor or ("arm" if grace else "intel"), notes=list(matrix.notes))
    if not gpu and grace:
        machine.gpu, major = ("gb200-186gb", 10) if widest >= 18 else ("gh200-96gb", 9)
        machine.notes.append(f"GPU guessed: its memory is a NUMA node: {machine.gpu} taken; --gpu NAME says which")
        if widest >= 18:
            machine.notes.append(
                "NVLinks to other trays are not in it: nvlink_domain_nodes: 18 says that a rack has them"
            )
    elif not gpu:
        machine.gpu, why = guess_gpu(widest, len(matrix.gpus))
        machine.notes.append(f"GPU guessed: {why}; --gpu NAME says which")
        major = {"h100-sxm-80gb": 9, "v100-sxm3-32gb": 7, "v100-sxm2-32gb": 7, "v100-sxm2-16gb": 7}.get(machine.gpu, 8)
    machine.pcie_generation = PCIE_GENERATION.get(major, 4)
    pcie = f"pcie{machine.pcie_generation}-x16"
    device = {name: machine.add("gpu", name) for name in matrix.gpus}
    device |= {name: machine.add("nic", matrix.nic_names.get(name, name)) for name in matrix.nics}
    pairs = {(a, b): matrix.cells[a, b] for a in matrix.names for b in matrix.names if a != b}
    sockets = _sockets(matrix, pairs, machine)
    nodes = [socket for socket in sockets if any(name in matrix.gpus for name in socket)]
    if len(nodes) > 2:
        machine.notes.append("each NUMA node is taken for a socket of its own")
    if far := [socket for socket in sockets if socket not in nodes]:
        if len(nodes) == 1 and not grace:
            nodes.append([])
        for socket in far:
            nodes[-1].extend(socket)
            which = "last" if any(name in matrix.gpus for name in nodes[-1]) else "other"
            machine.notes.append(f"{', '.join(socket)}: near to no GPU; hung on the {which} socket")
    machine.num_cores = _num_threads(matrix) // (1 if grace else 2)
    near = {pair: _NEAR.get(word, 9) for pair, word in pairs.items()}
    for socket in nodes:
        cpu = machine.add("cpu")
        for branch in _groups(tuple(socket), {pair: distance <= 2 for pair, distance in near.items()}):
            if len(branch) == 1:
                link = "c2c" if grace and branch[0] in matrix.gpus else pcie
                machine.wires.append(f"{device[branch[0]]} to {cpu} by {link}")
                continue
            leaves = _groups(tuple(branch), {pair: distance == 1 for pair, distance in near.items()})
            top = machine.add("pcie-switch")
            machine.wires.append(f"{top} to {cpu} by {pcie}")
            for leaf in leaves:
                switch = top
                if len(leaves) > 1:
                    switch = machine.add("pcie-switch")
                    machine.wires.append(f"{switch} to {top} by {pcie}")
                machine.wires += [f"{device[name]} to {switch} by {pcie}" for name in leaf]
    join_sockets(machine)
    wire_nvlinks(machine, _linked(matrix, pairs), major)
    return machine


def _linked(matrix: Matrix, pairs: Mapping[tuple[str, str], str]) -> dict[tuple[int, int], int]:
    """Return how many NVLinks join two GPUs, by their numbers."""
    number = {name: i for i, name in enumerate(matrix.gpus)}
    return {
        (number[a], number[b]): int(word[2:])
        for (a, b), word in pairs.items()
        if word.startswith("NV") and number[a] < number[b]
    }


def _sockets(matrix: Matrix, pairs: Mapping[tuple[str, str], str], machine: Machine) -> list[list[str]]:
    """Return the devices of each socket. NVLinks alone say nothing of sockets: then there are two, and a note."""
    if len(matrix.gpus) > 2 and not any((matrix.numa, matrix.cpus, any(word in _NEAR for word in pairs.values()))):
        half = len(matrix.gpus) // 2
        machine.notes.append("PCIe and processors are not in it: half of the GPUs on each of two sockets taken")
        return [list(matrix.gpus[:half]), list(matrix.gpus[half:])]
    return _groups(matrix.names, {pair: _same_socket(matrix, *pair) for pair in pairs})


def _num_threads(matrix: Matrix) -> int:
    """Return how many hardware threads the affinities of the GPUs name."""
    threads: set[int] = set()
    for text in matrix.cpus.values():
        for part in text.split(","):
            low, _, high = part.partition("-")
            if low.isdigit():
                threads |= set(range(int(low), min(int(high or low), 65535) + 1))
    return len(threads)
