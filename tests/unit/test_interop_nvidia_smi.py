"""Matrices of ``nvidia-smi topo -m`` as machines printed them, and broken ones."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from sim.catalog import load
from sim.cluster.routing import path_kind, search
from sim.cluster.topology import build_node
from sim.errors import ScenarioError
from sim.interop import nvidia_smi
from sim.interop.machine import topology_text

FOLDER = Path(__file__).parent / "topologies"
FILES = sorted(FOLDER.glob("*.txt"), key=lambda path: path.name)
SAME = {"NODE": "PHB"}
"""NCCL makes no difference between a host bridge and two of one processor."""


@pytest.mark.parametrize(
    ("name", "gpus", "nics", "links", "sockets"),
    [
        ("3090-two-sockets", 8, 0, 0, 2),
        ("4090-switches", 8, 0, 0, 2),
        ("a100-pcie-pair", 2, 0, 0, 2),
        ("b300-ansi", 8, 9, 18, 2),
        ("dgx-1", 8, 4, 2, 2),
        ("dgx-2", 16, 10, 6, 2),
        ("dgx-a100", 8, 12, 12, 4),
        ("h100-dell-mp", 8, 12, 0, 2),
        ("h100-no-affinity", 4, 0, 18, 2),
        ("h100-reversed", 8, 9, 18, 2),
        ("h100-vm", 8, 1, 18, 2),
        ("rtx-pro-6000-vm", 4, 0, 0, 1),
    ],
)
def test_real_matrices(name: str, gpus: int, nics: int, links: int, sockets: int) -> None:
    matrix = nvidia_smi.read_matrix((FOLDER / f"{name}.txt").read_text(), name)
    assert (len(matrix.gpus), len(matrix.nics)) == (gpus, nics)
    assert max((int(w[2:]) for w in matrix.cells.values() if w.startswith("NV")), default=0) == links
    assert nvidia_smi.to_machine(matrix, name, "", 0).counts["cpu"] == sockets


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_machine_has_the_paths_of_the_matrix(path: Path) -> None:
    """Every cell that speaks of PCIe is the type of the path in the tree that was built; NV# are as many links."""
    matrix = nvidia_smi.read_matrix(path.read_text(), path.name)
    found = nvidia_smi.to_machine(matrix, path.stem, "", 0)
    facts = load.node_from_text(topology_text(found), path.stem)
    node = build_node(facts, {kind: load.link(kind) for kind in dict.fromkeys(w[2] for w in facts.wires)}, True)
    name_of = {device.name: i for i, device in enumerate(node.devices)}
    gpu = {name: name_of[f"gpu{i}"] for i, name in enumerate(matrix.gpus)}
    device = gpu | {name: name_of[f"nic{i}"] for i, name in enumerate(matrix.nics)}
    on_their_own = [
        nic
        for nic in matrix.nics
        if all(matrix.cells[nic, other] in ("SYS", "PIX") for other in matrix.names if other != nic)
        and all(matrix.cells[nic, g] == "SYS" for g in matrix.gpus)
    ]
    checked = 0
    for a, b in permutations(matrix.names, 2):
        word = matrix.cells[a, b]
        if a in on_their_own or b in on_their_own:
            continue  # near to no GPU: hung on a socket all the same, and the file says so
        if word.startswith("NV"):
            fast = search(node, device[a], scale_up=True)[device[b]]
            one = load.link(next(wire.split()[-1] for wire in found.wires if "nvlink" in wire)).bytes_per_s
            assert min(node.wires[i].library_bytes_per_s for i in fast) == pytest.approx(int(word[2:]) * one)
        else:
            assert path_kind(node, search(node, device[a], scale_up=False)[device[b]]) == SAME.get(word, word), (a, b)
        checked += 1
    assert checked >= len(matrix.gpus) * (len(matrix.gpus) - 1)


def test_a_gpu_that_is_named_is_not_guessed() -> None:
    matrix = nvidia_smi.read_matrix((FOLDER / "b300-ansi.txt").read_text(), "b300")
    guessed = nvidia_smi.to_machine(matrix, "b300", "", 0)
    named = nvidia_smi.to_machine(matrix, "b300", "b300-sxm-288gb", 10)
    assert guessed.gpu == "h100-sxm-80gb"
    assert guessed.notes[0].startswith("GPU guessed: 18 NVLinks")
    assert (named.gpu, named.notes) == ("b300-sxm-288gb", [])
    assert "gpu0 to nvswitch0 by 18 x nvlink5" in named.wires


PAIR = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV4\t0-7\nGPU1\tNV4\t X \t0-7\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["smi.txt: there is no matrix of `nvidia-smi topo -m` in it"]),
        (PAIR.replace("NV4", "PIXNODE", 1), ["smi.txt:2: GPU0: 'PIXNODE' is not a connection"]),
        (PAIR.replace("NV4", "SYS", 1), ["smi.txt:3: GPU0 to GPU1 is SYS, GPU1 to GPU0 is NV4"]),
        (PAIR.replace(" X ", "NV4"), ["smi.txt:2: GPU0 is 'NV4' to itself", "smi.txt:3: GPU1 is 'NV4' to itself"]),
        (PAIR.splitlines()[0] + "\nGPU0\t X \tNV4\t0-7\n", ["smi.txt:1: the row of GPU1 is missing"]),
        ("\tGPU0\tGPU1\nGPU0\tX\nGPU1\tPHB\tX\n", ["smi.txt:2: GPU0 has 1 of 2 columns"]),
        ("\tGPU0\tGPU1\nGPU0\tX\tOK\nGPU1\tGNS\tX\n", [
            "smi.txt:2: 'OK' is from `nvidia-smi topo -p2p`", "smi.txt:3: 'GNS' is from `nvidia-smi topo -p2p`",
        ]),
        (PAIR + "GPU2\tNV4\tNV4\t X \t0-7\n", []),
        (PAIR.replace("GPU1\tNV4", "GPU7\tNV4"), [
            "smi.txt:3: a row of GPU7, which the first line does not name",
        ]),
    ],
)  # fmt: skip
def test_broken_matrices(text: str, lines: list[str]) -> None:
    if not lines:
        assert nvidia_smi.read_matrix(text, "smi.txt").gpus == ("GPU0", "GPU1")
        return
    with pytest.raises(ScenarioError) as wrong:
        nvidia_smi.read_matrix(text, "smi.txt")
    said = [str(finding).split("\n")[0] for finding in wrong.value.findings]
    assert said == lines
    assert all(finding.remedy for finding in wrong.value.findings)


def test_columns_that_a_terminal_ran_together() -> None:
    """As sglang's check_env prints a matrix of 36 NICs: tabs became blanks, and every so many columns none is left."""
    head = "        GPU0    GPU1    NIC0    NIC1    NIC2    CPU Affinity    NUMA Affinity   GPU NUMA ID\n"
    rows = [
        "GPU0     X      NV18    PIX     NODENODE    0-55,112-167    0               N/A",
        "GPU1    NV18     X      NODEPIXSYS     0-55,112-167    0               N/A",
        "NIC0    PIX     NODE     X      NODESYS",
        "NIC1    NODE    PIX     NODE     X      SYS",
        "NIC2    NODE    SYS     SYS     SYS      X",
    ]
    matrix = nvidia_smi.read_matrix(head + "\n".join(rows), "smi.txt")
    assert matrix.cells["GPU0", "NIC1"] == matrix.cells["GPU0", "NIC2"] == "NODE"
    assert [matrix.cells["GPU1", f"NIC{i}"] for i in range(3)] == ["NODE", "PIX", "SYS"]
    assert matrix.numa == {"GPU0": "0", "GPU1": "0"}
    assert matrix.coherent == ()


def test_any_name_of_a_nic_and_gpus_that_do_not_begin_at_zero() -> None:
    names = ("GPU2", "GPU3", "mlx5_bond_0", "bnxt_re0", "irdma0", "rocep4s0f1", "hfi1_0")
    head = "\t" + "\t".join(names) + "\tCPU Affinity\tNUMA Affinity\n"
    rows = "".join(
        row + "\t" + "\t".join(" X " if row == name else "NODE" for name in names) + "\t0-31\t0\n" for row in names
    )
    matrix = nvidia_smi.read_matrix(head + rows, "smi.txt")
    assert (matrix.gpus, matrix.nics) == (names[:2], names[2:])


def test_a_gpu_with_a_numa_node_of_its_own_hangs_on_a_grace() -> None:
    """A tray of GB200: each GPU's memory is a NUMA node, two GPUs on each Grace, 72 cores without a second thread."""
    head = "\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    rows = "".join(
        f"GPU{i}\t"
        + "\t".join(" X " if i == j else "NV18" for j in range(4))
        + f"\t{'0-71' if i < 2 else '72-143'}\t{'0,2-17' if i < 2 else '1,18-33'}\t{2 + 8 * i}\n"
        for i in range(4)
    )
    found = nvidia_smi.to_machine(nvidia_smi.read_matrix(head + rows, "smi.txt"), "tray", "", 0)
    assert (found.gpu, found.cpu_vendor, found.num_cores, found.counts["cpu"]) == ("gb200-186gb", "arm", 144, 2)
    assert {"gpu0 to cpu0 by c2c", "gpu3 to cpu1 by c2c", "gpu0 to nvswitch0 by 18 x nvlink5"} <= set(found.wires)
    load.node_from_text(topology_text(found), "tray")


def test_a_nic_near_to_no_gpu_of_one_socket_is_on_the_other() -> None:
    text = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tNV12\tSYS\t32-63\t1\t\tN/A\nGPU1\tNV12\t X \tSYS\t32-63\t1\t\tN/A\nNIC0\tSYS\tSYS\t X \n"
    )
    found = nvidia_smi.to_machine(nvidia_smi.read_matrix(text, "smi.txt"), "pair", "", 0)
    assert "nic0 to cpu1 by pcie4-x16" in found.wires
    assert "gpu1 to cpu0 by pcie4-x16" in found.wires


def test_what_is_around_a_matrix_is_said() -> None:
    """MIG slices, a second matrix below the first, a quotation's marks."""
    lines = PAIR.splitlines()
    mig = "MIG 1g.10gb     Device  0: (UUID: MIG-1)"
    text = "\n".join(f"> {line}" for line in (lines[0], lines[1], mig, lines[2], *lines))
    matrix = nvidia_smi.read_matrix(text, "smi.txt")
    assert matrix.gpus == ("GPU0", "GPU1")
    assert matrix.notes == (
        "MIG slices are in it: the GPUs are taken as wholes", "a second matrix begins in line 5: left out",
    )  # fmt: skip
    assert nvidia_smi.to_machine(matrix, "pair", "", 0).notes[:2] == list(matrix.notes)


def test_all_rows_that_are_missing_are_named_at_once_and_amd_is_told_apart() -> None:
    for text, said in (
        ("\tGPU0\tGPU1\tGPU2\nGPU0\t X \tSYS\tSYS\n", "the rows of GPU1, GPU2 are missing"),
        ("=== ROCm System Management Interface ===\n  GPU0  GPU1\nGPU0  0  15\nGPU1  15  0\n", "is of AMD's rocm-smi"),
    ):
        with pytest.raises(ScenarioError, match=said):
            nvidia_smi.read_matrix(text, "smi.txt")


def test_nvlinks_alone_say_nothing_of_sockets() -> None:
    """Without affinities and NICs each GPU of 16 would stand on a socket of its own: two are taken."""
    names = [f"GPU{i}" for i in range(16)]
    rows = "".join(a + "".join("\t X " if a == b else "\tNV12" for b in names) + "\n" for a in names)
    found = nvidia_smi.to_machine(
        nvidia_smi.read_matrix("\t" + "\t".join(names) + "\n" + rows, "smi.txt"), "hgx", "a100-sxm-80gb", 8
    )
    assert found.counts["cpu"] == 2
    assert [wire for wire in found.wires if wire.startswith("gpu8 to cpu")] == ["gpu8 to cpu1 by pcie4-x16"]
    assert found.notes == ["PCIe and processors are not in it: half of the GPUs on each of two sockets taken"]
