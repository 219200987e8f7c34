"""Nodes: the wires of the ones that ship, and the words to a user whose own file is wrong."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.catalog import load
from sim.errors import ScenarioError

GOOD = """\
title: a desktop
gpu: rtx-4090
host_memory: 64 GiB
host_memory_bandwidth: 76.8 GB/s
cpu_cores: 16
devices: {gpu: 2, cpu: 1}
wires:
  - gpu[0-1] to cpu0 by pcie4-x8
"""


def reachable(node, start):
    neighbours = {name: [] for name, _ in node.devices}
    for a, b, _, _ in node.wires:
        neighbours[a].append(b)
        neighbours[b].append(a)
    seen, todo = {start}, [start]
    while todo:
        for other in neighbours[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def links_of(node, device):
    """How many links of each kind end in a device."""
    ends = Counter()
    for a, b, kind, count in node.wires:
        ends[kind] += count * (device in (a, b))
    return +ends


@pytest.mark.parametrize("name", load.names("node"))
def test_wires_join_devices_that_exist_and_reach_everything(name):
    node = load.node(name)
    devices = dict(node.devices)
    assert len(devices) == len(node.devices)
    assert node.num_gpus == sum(kind == "gpu" for kind in devices.values()) > 0
    for a, b, kind, count in node.wires:
        assert a in devices
        assert b in devices
        assert a != b
        assert count > 0
        assert load.link(kind).bytes_per_s > 0
    has_nic = any(kind == "nic" for kind in devices.values())
    for device, kind in node.devices:
        if kind == "gpu":
            reached = {devices[other] for other in reachable(node, device)}
            assert "cpu" in reached
            assert "nic" in reached or not has_nic
    assert load.gpu(node.gpu)
    network = load.network(node.default_network)
    # A nic of the file may stand for several ports that one GPU drives together (EFA).
    assert network.nics_per_node % sum(kind == "nic" for kind in devices.values()) == 0


@pytest.mark.parametrize("name", load.names("node"))
def test_all_gpus_of_a_node_have_the_same_links(name):
    node = load.node(name)
    fast = [
        sum(count for kind, count in links_of(node, f"gpu{i}").items() if load.link(kind).kind in ("nvlink", "xgmi"))
        for i in range(node.num_gpus)
    ]
    assert len(set(fast)) == 1


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("dgx-1", "nvlink2", 6), ("dgx-2", "nvlink2", 6), ("jean-zay-v100-32gb", "nvlink2", 6),
     ("dgx-a100", "nvlink3", 12), ("hgx-a100-4-80gb", "nvlink3", 12), ("hgx-a800", "nvlink3", 8),
     ("dgx-h100", "nvlink4", 18), ("p5", "nvlink4", 18), ("hgx-h800", "nvlink4", 8),
     ("gh200-quad", "nvlink4", 18), ("dgx-b200", "nvlink5", 18), ("gb200-nvl72", "nvlink5", 18),
     ("mi300x-8", "xgmi-mi300x", 7)],
)  # fmt: skip
def test_gpus_have_as_many_links_as_their_sheet_says(name, kind, count):
    node = load.node(name)
    assert all(links_of(node, f"gpu{i}")[kind] == count for i in range(node.num_gpus))


def test_dgx_1_is_the_hybrid_cube_mesh_that_nvidia_smi_shows():
    # nvidia-smi topo -m of a DGX-1 V100: 1 is NV1, 2 is NV2, 0 is SYS.
    matrix = ["01122000", "10210200", "12020010", "21200001", "20000112", "02001021", "00101202", "00012120"]
    links = {(a, b): count for a, b, kind, count in load.node("dgx-1").wires if kind == "nvlink2"}
    for i, row in enumerate(matrix):
        for j, cell in enumerate(row):
            a, b = f"gpu{i}", f"gpu{j}"
            assert links.get((a, b), links.get((b, a), 0)) == int(cell)


def test_a_gpu_of_dgx_a100_shares_its_pcie_switch_with_another_and_two_nics():
    wires = load.node("dgx-a100-80gb").wires
    on_switch = {a for a, b, _, _ in wires if b == "pcie-switch1"}
    assert on_switch == {"gpu2", "gpu3", "nic2", "nic3"}
    on_h100 = {a for a, b, _, _ in load.node("dgx-h100").wires if b == "pcie-switch5"}
    assert on_h100 == {"gpu5", "nic5"}


def test_an_alias_is_the_same_node():
    assert load.node("dgx-a100") is load.node("dgx-a100-80gb")
    assert load.network("ndr-400-rail") is load.network("ib-ndr-400-rail")


def test_multicast_from_hopper_on():
    assert load.node("dgx-h100").nvswitch_multicast
    assert not load.node("dgx-a100-80gb").nvswitch_multicast


# --- networks in words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "node", "fabric", "nics", "gbits"),
    [
        ("800 Gbit/s per node", "dgx-a100-80gb", "infiniband", 4, 200),  # four of the 200 Gbit/s NICs it usually has
        ("1600 Gbit/s RoCE per node", "dgx-a100-80gb", "roce", 8, 200),
        ("400 Gbit/s RoCE per GPU", "dgx-h100", "roce", 8, 400),
        ("50 GB/s per NIC", "dgx-h100", "infiniband", 8, 400),
        ("100 Gbit/s per node", "dgx-h100", "infiniband", 1, 100),
        ("600 Gbit/s per node", "dgx-h100", "infiniband", 2, 300),
        ("6400 Gbit/s per node", "dgx-h100", "infiniband", 8, 800),  # faster NICs than usual, as many as usual
        ("3200 Gbit/s EFA per node", "p5", "efa", 32, 100),
        ("25 Gbit/s Ethernet per node", "pcie-1x-l40s", "ethernet", 1, 25),
    ],
)
def test_a_network_in_words(text, node, fabric, nics, gbits):
    network = load.network_in_words(text, load.node(node))
    assert (network.fabric, network.nics_per_node) == (fabric, nics)
    assert network.line_bytes_per_s == pytest.approx(gbits * 1e9 / 8)
    assert 0.7 < network.nic_bytes_per_s / network.line_bytes_per_s <= 1


@pytest.mark.parametrize(
    "text", ["fast", "", "800 per node", "800 Gbps per node", "800 Gbit/s per rack", "8 Gbit/s Foo per node",
             "0 GB/s per GPU", "1.2.3 Gbit/s per node", "1e999 Gbit/s per node"],
)  # fmt: skip
def test_words_that_describe_no_network_say_what_to_write(text):
    with pytest.raises(ValueError, match=r"write|leave") as caught:
        load.network_in_words(text, load.node("dgx-h100"))
    assert repr(text) in str(caught.value) or "Gb" in str(caught.value)


# --- a user's own file ---------------------------------------------------------------------------


def test_a_users_node_needs_no_sources(tmp_path):
    file = tmp_path / "desk.yaml"
    file.write_text(GOOD)
    node = load.node(str(file))
    assert (node.name, node.num_gpus, node.wires) == (
        "desk",
        2,
        (("gpu0", "cpu0", "pcie4-x8", 1), ("gpu1", "cpu0", "pcie4-x8", 1)),
    )
    assert node.facts["host_memory_bytes"].kind == "user"


@pytest.mark.parametrize(
    ("old", "new", "line", "problem", "remedy"),
    [
        ("gpu: rtx-4090", "gpu: rtx-409", 2, "unknown gpu 'rtx-409'", "did you mean rtx-4090"),
        ("64 GiB", "64", 3, "host_memory: 64 is not a size", ""),
        ("cpu_cores: 16", "cpu_cores: many", 5, "cpu_cores: 'many' is not a whole number above 0", ""),
        ("cpu_cores: 16", "cores: 16", 5, "unknown key 'cores'", "did you mean cpu_cores"),
        ("gpu: 2, cpu: 1", "gpu: 2, cpu: 1, tpu: 4", 6, "unknown kind of device 'tpu'", "did you mean"),
        ("gpu: 2, cpu: 1", "gpu: -1, cpu: 1", 6, "devices.gpu: -1 is not a number of devices", ""),
        ("gpu: 2, cpu: 1", "gpu: 2", 6, "a node has at least one cpu", "add `cpu: 1`"),
        ("pcie4-x8", "pcie4-x9", 8, "unknown link 'pcie4-x9'", "did you mean pcie4-x8"),
        ("gpu[0-1] to", "gpu[0-2] to", 8, "there is no gpu2", "devices: 2 gpu, 1 cpu"),
        ("gpu[0-1] to cpu0", "gpu0 to cpu0", 7, "no wires lead from cpu0 to gpu1", "add a wire"),
        ("gpu[0-1] to cpu0", "gpu[0-1] -> cpu0", 8, "is not a wire", "write 'gpu[0-7] to nvswitch0"),
        ("gpu[0-1] to cpu0", "gpu[1-0] to cpu0", 8, "names no devices", "write"),
        ("gpu[0-1] to cpu0", "gpu0 to gpu0", 8, "gpu0 is wired to itself", ""),
        ("title: a desktop", "title: [1]", 1, "title is [1], not a text", ""),
        ("wires:\n  - gpu[0-1] to cpu0 by pcie4-x8\n", "", 0, "wires is missing", "add `wires:`"),
    ],
)
def test_a_wrong_file_gets_its_line_and_a_remedy(tmp_path, old, new, line, problem, remedy):
    assert old in GOOD
    file = tmp_path / "desk.yaml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ScenarioError) as caught:
        load.node(str(file))
    found = [f for f in caught.value.findings if problem in f.problem]
    assert found, caught.value.findings
    assert found[0].line == line
    assert remedy in found[0].remedy


def test_all_findings_come_at_once(tmp_path):
    file = tmp_path / "desk.yaml"
    file.write_text(GOOD.replace("64 GiB", "64").replace("rtx-4090", "x").replace("pcie4-x8", "y"))
    with pytest.raises(ScenarioError) as caught:
        load.node(str(file))
    assert [finding.line for finding in caught.value.findings] == [2, 3, 8]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"- 1", "holds a list"),
        (b"a: [", "is not YAML"),
        (b"a: \xff", "is not UTF-8"),
        (b"a: &x 1\nb: *x", "anchors and aliases"),
        (b"[" * 5000, "nested too deeply"),
        (b"x" * 2_000_000, "a topology takes a few lines"),
        (b"a: 1\n---\nb: 2\n", "is not YAML"),
        (b"a: \x00", "is not YAML"),
    ],
)
def test_what_is_no_topology_file_gets_one_line(tmp_path, content, problem):
    file = tmp_path / "desk.yaml"
    file.write_bytes(content)
    for read in (load.node, load.network):
        with pytest.raises(ScenarioError) as caught:
            read(str(file))
        assert len(caught.value.findings) == 1
        assert problem in caught.value.findings[0].problem


def test_a_path_that_is_no_file(tmp_path):
    for path, problem in ((tmp_path, "is a directory"), (tmp_path / "none.yaml", "does not exist")):
        with pytest.raises(ScenarioError, match=problem):
            load.node(str(path))


def test_a_users_network(tmp_path):
    file = tmp_path / "lab.yaml"
    file.write_text("fabric: roce\nnics_per_node: 2\nnic_bandwidth: 100 Gbit/s\nlatency: 2 us\ntopology: fat-tree\n")
    network = load.network(str(file))
    assert (network.nics_per_node, network.nic_bytes_per_s, network.topology) == (2, 12.5e9, "fat-tree")
    file.write_text("fabric: rocky\nnics_per_node: 0\nnic_bandwidth: 100 Gbps\nlatency: 2 us\n")
    with pytest.raises(ScenarioError) as caught:
        load.network(str(file))
    assert [finding.line for finding in caught.value.findings] == [1, 2, 3]


MUTANTS = st.sampled_from(
    ["1e999 GiB", "-1", "null", "[]", "{}", "gpu[0-9999]", "gpu[0-99999]", "{value: 1}", "? [a]\n: b", "2001-02-30",
     "!!int x",
     "0x", "\t", "'", "%", "1_0", "=", "<<", "~", "by", "to", ": ", "- ", "\n", "{kind: []}", "yes"],
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, len(GOOD)), length=st.integers(0, 30), put=st.one_of(MUTANTS, st.text(max_size=8)))
def test_no_mutation_of_a_node_file_ends_in_a_traceback(tmp_path, cut, length, put):
    file = tmp_path / "desk.yaml"
    file.write_text(GOOD[:cut] + put + GOOD[cut + length :], encoding="utf-8", errors="replace")
    try:
        assert load.node(str(file)).num_gpus > 0
    except ScenarioError as refused:
        assert refused.findings
