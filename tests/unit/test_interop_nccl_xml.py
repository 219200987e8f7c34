"""NCCL's XML as clouds ship it and NCCL writes it, and broken files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.catalog import load
from sim.errors import ScenarioError
from sim.interop import nccl_xml
from sim.interop.machine import topology_text

FOLDER = Path(__file__).parent / "topologies"
HEAD = '<system version="1"><cpu numaid="0" arch="x86_64" vendor="AuthenticAMD">\n'
GPU = (
    '<pci busid="0000:0{n}:00.0" class="0x030200" device="0x20b2" '
    'link_speed="16.0 GT/s PCIe" link_width="16">{inside}</pci>\n'
)
TAIL = "</cpu></system>"


def read(text: str, gpu: str = "a100-sxm-80gb", major: int = 8, nvlink: bool = True) -> nccl_xml.Machine:
    return nccl_xml.to_machine(nccl_xml.parse(text, "topo.xml"), "topo.xml", gpu, major, nvlink)


@pytest.mark.parametrize(
    ("name", "gpu", "devices"),
    [
        # counted in the files by hand
        ("ncv4", "a100-pcie-80gb", {"gpu": 4, "cpu": 4, "nic": 1}),
        ("ndv2", "a100-sxm-80gb", {"gpu": 8, "cpu": 2, "nic": 1, "nvswitch": 1}),  # a V100: the file does not say
        ("ndv4", "a100-sxm-80gb", {"gpu": 8, "cpu": 4, "nic": 8, "pcie-switch": 4, "nvswitch": 1}),
        ("ndv5", "h100-sxm-80gb", {"gpu": 8, "cpu": 2, "nic": 8, "pcie-switch": 8, "nvswitch": 1}),
        ("g5.48xl", "a10g", {"gpu": 8, "cpu": 2, "nic": 1}),
        ("p4d-24xl", "a100-sxm-40gb", {"gpu": 8, "cpu": 2, "nic": 4, "pcie-switch": 4, "nvswitch": 1}),
        ("p4de-24xl", "a100-sxm-80gb", {"gpu": 8, "cpu": 2, "nic": 4, "pcie-switch": 4, "nvswitch": 1}),
    ],
)
def test_real_files(name: str, gpu: str, devices: dict[str, int]) -> None:
    root = nccl_xml.parse((FOLDER / f"{name}.xml").read_text(), name)
    found, _ = nccl_xml.gpu_of(root)
    assert found == gpu
    machine = nccl_xml.to_machine(root, name, gpu, load.gpu(gpu).compute_capability[0], "sxm" in gpu)
    assert machine.counts == devices
    facts = load.node_from_text(topology_text(machine), name)
    assert facts.num_gpus == devices["gpu"]


def test_two_gpus_and_a_nic_share_each_switch_of_p4d() -> None:
    machine = read((FOLDER / "p4d-24xl.xml").read_text())
    assert [wire for wire in machine.wires if "pcie-switch1" in wire] == [
        "pcie-switch1 to cpu0 by pcie3-x16",
        "gpu2 to pcie-switch1 by pcie3-x16",
        "gpu3 to pcie-switch1 by pcie3-x16",
        "nic1 to pcie-switch1 by pcie3-x16",
    ]


def test_v100_without_nvlinks_are_a_cube_mesh() -> None:
    machine = read((FOLDER / "ndv2.xml").read_text(), "v100-sxm2-32gb", 7)
    assert "nvswitch" not in machine.counts
    assert sum(int(wire.split()[-3]) for wire in machine.wires if "nvlink2" in wire) == 8 * 6 // 2


def test_nvlinks_to_switches_and_to_gpus() -> None:
    """A dump names every link: twelve to switches (two each), or four to a neighbour."""
    switches = "".join(f'<nvlink target="0000:c{i}:00.0" count="2" tclass="0x068000"/>' for i in range(6))
    gpus = [GPU.format(n=n, inside=f'<gpu dev="{n}" sm="80">{switches}</gpu>') for n in range(2)]
    machine = read(HEAD + "".join(gpus) + TAIL)
    assert [wire for wire in machine.wires if "nvswitch" in wire] == [
        f"gpu{n} to nvswitch0 by 12 x nvlink3" for n in range(2)
    ]
    pairs = [
        GPU.format(
            n=n, inside=f'<gpu dev="{n}"><nvlink target="0000:0{1 - n}:00.0" count="4" tclass="0x030200"/></gpu>'
        )
        for n in range(2)
    ]
    machine = read(HEAD + "".join(pairs) + TAIL)
    assert "gpu0 to gpu1 by 4 x nvlink3" in machine.wires
    assert machine.cpu_vendor == "amd"


def test_graphs_of_a_dump() -> None:
    found = nccl_xml.graphs(nccl_xml.parse((FOLDER / "ncv4-graph.xml").read_text(), "graph.xml"), "graph.xml")
    assert [(graph.pattern, len(graph.channels), graph.bw_intra) for graph in found] == [
        ("ring", 2, 12.0), ("balanced tree", 4, 12.0), ("tree", 4, 12.0),
    ]  # fmt: skip
    assert found[0].channels == (("0", "1", "2", "3"), ("0", "3", "2", "1"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (HEAD + GPU.format(n=1, inside=""), ["topo.xml:3: is not XML: no element found"]),
        ("<html/>", ["topo.xml:1: <html> at the top"]),
        ('<system version="1"/>', ["topo.xml:1: there is no <cpu> in it"]),
        (HEAD + TAIL, ["topo.xml:1: there is no GPU in it"]),
        (HEAD + GPU.format(n=1, inside="") * 2 + TAIL, ["topo.xml:3: busid 0000:01:00.0 is there twice"]),
        (
            HEAD
            + GPU.format(n=1, inside="").replace("16.0 GT", "17 GT")
            + GPU.format(n=2, inside="").replace('"16"', '"9"')
            + TAIL,
            ["topo.xml:2: link_speed '17'", "topo.xml:3: link_width '9'"],
        ),
        (
            HEAD + GPU.format(n=1, inside='<gpu dev="0"><nvlink target="0000:09:00.0" count="4"/></gpu>') + TAIL,
            ["topo.xml:2: an <nvlink> to 0000:09:00.0"],
        ),
        (HEAD + GPU.format(n=1, inside="").replace("0x0302", "0x0c03") + TAIL, [
            "topo.xml:1: there is no GPU in it",
            "topo.xml:2: class '0x0c0300' is neither a GPU, a NIC nor a bridge",
        ]),
        ('<!DOCTYPE x [<!ENTITY a "b">]><system/>', ["topo.xml:1: entities are not used here"]),
        (
            '<system version="1"><cpu numaid="0"><pci busid="0000:01:00.0" class="0x060400"><pci/>'
            '<pci busid="0000:02:00.0"/></pci></cpu></system>',
            [
                "topo.xml:1: a <pci> without busid",
                "topo.xml:1: a <pci> without class",
                "topo.xml:1: there is no GPU in it",
            ],
        ),
    ],
)  # fmt: skip
def test_broken_files(text: str, lines: list[str]) -> None:
    with pytest.raises(ScenarioError) as wrong:
        read(text)
    assert [str(finding).split("\n")[0] for finding in wrong.value.findings] == lines
    assert all(finding.remedy for finding in wrong.value.findings)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('<graphs version="1"/>', ["topo.xml:1: there is no <graph> in it"]),
        ('<graphs>\n<graph pattern="9"/></graphs>', ["topo.xml:2: pattern '9'"]),
        ('<graphs>\n<graph pattern="4" nchannels="2" speedintra="fast"/></graphs>', [
            "topo.xml:2: nchannels is 2, but there are 0 <channel>", "topo.xml:2: speedintra is 'fast'",
        ]),
    ],
)  # fmt: skip
def test_broken_graphs(text: str, lines: list[str]) -> None:
    with pytest.raises(ScenarioError) as wrong:
        nccl_xml.graphs(nccl_xml.parse(text, "topo.xml"), "topo.xml")
    assert [str(finding).split("\n")[0] for finding in wrong.value.findings] == lines


GRACE = """<system version="1">
  <cpu numaid="0" affinity="ffffffff" arch="arm64" vendor="GenuineArm">
    <pci busid="0008:01:00.0" class="0x030200" link_speed="Unknown" link_width="255">
      <gpu dev="0" sm="100"><nvlink target="fffffff:ffff:ff" count="18" tclass="0x068000"/><c2c bw="44712"/></gpu>
    </pci>
    <pci busid="0009:01:00.0" class="0x030200" link_speed="" link_width="63">
      <gpu dev="1" sm="100"><nvlink target="fffffff:ffff:ff" count="18" tclass="0x068000"/><c2c bw="44712"/></gpu>
    </pci>
  </cpu>
</system>"""


def test_a_grace_with_links_that_linux_knows_nothing_of() -> None:
    """Compute capability 10.0 and NVLink-C2C: GB200; its NVLinks are the fifth, its cores have one thread each."""
    root = nccl_xml.parse(GRACE, "topo.xml")
    gpu, why = nccl_xml.gpu_of(root)
    assert (gpu, why) == (
        "gb200-186gb",
        "the file does not say which GPU: gb200-186gb taken, by its compute capability",
    )
    found = nccl_xml.to_machine(root, "topo.xml", gpu, 10, True)
    assert (found.cpu_vendor, found.num_cores, found.multicast) == ("arm", 32, True)
    assert found.wires == [
        "gpu0 to cpu0 by c2c", "gpu1 to cpu0 by c2c",
        "gpu0 to nvswitch0 by 18 x nvlink5", "gpu1 to nvswitch0 by 18 x nvlink5",
    ]  # fmt: skip
    assert found.notes == ["not in the file, taken as usual: the speed of PCIe, the width of PCIe"]


@pytest.mark.parametrize(
    ("sm", "inside", "gpu"),
    [("70", "", "v100-pcie-32gb"), ("80", "", "a100-pcie-80gb"), ("89", "", "l40s"), ("120", "", "rtx-pro-6000"),
     ("80", '<nvlink target="fffffff:ffff:ff" count="12"/>', "a100-sxm-80gb"), ("90", '<c2c bw="1"/>', "gh200-96gb")],
)  # fmt: skip
def test_a_gpu_is_guessed_by_its_compute_capability(sm: str, inside: str, gpu: str) -> None:
    text = HEAD + GPU.format(n=1, inside=f'<gpu dev="0" sm="{sm}">{inside}</gpu>').replace('device="0x20b2"', "") + TAIL
    assert nccl_xml.gpu_of(nccl_xml.parse(text, "topo.xml"))[0] == gpu


def test_one_device_is_one_gpu() -> None:
    text = HEAD + GPU.format(n=1, inside='<gpu dev="0"/><gpu dev="1"/>') + TAIL
    with pytest.raises(ScenarioError, match="a second <gpu> in a <pci>"):
        read(text)


def test_hosts_that_nvlinks_join_are_one_node_in_a_domain() -> None:
    """NCCL dumps all trays of a clique in one file; their devices may have the same busids."""
    cpu = GRACE.split("\n", 1)[1].replace("</system>", "").strip()
    hosts = "".join(cpu.replace("<cpu ", f'<cpu host_hash="0x{i}" ') for i in (7, 9))
    found = read(f'<system version="1">{hosts}</system>', "gb200-186gb", 10)
    alone = read(GRACE, "gb200-186gb", 10)
    assert (found.counts, found.wires) == (alone.counts, alone.wires)
    assert "nvlink_domain_nodes: 2\n" in topology_text(found)
    assert found.notes[0] == "2 hosts that NVLinks join are in it: the first is the node, in a domain of 2"
    assert load.node_from_text(topology_text(found), "tray").nvlink_domain_nodes == 2


def test_gpus_of_amd_are_refused() -> None:
    gpu = GPU.format(n=1, inside='<gpu dev="0" sm="94" gcn="gfx942"/>')
    with pytest.raises(ScenarioError, match=r"topo.xml:2: an AMD GPU: RCCL's topology is not read"):
        read(HEAD + gpu + TAIL)
