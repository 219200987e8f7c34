"""``sim topology``: a machine by name or from a foreign file, its tree, what NCCL makes of it, bus bandwidths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sim.catalog import load
from sim.catalog.schema import NetworkFacts, NodeFacts
from sim.cluster.topology import Cluster, build_cluster
from sim.cost import collective
from sim.cost.calibrated import alone_s
from sim.cost.nccl.plan import plan_collective, plan_point_to_point
from sim.cost.nccl.rings import ring_graph
from sim.errors import Finding, ScenarioError
from sim.interop import machine, nccl_tests, nccl_xml, nvidia_smi
from sim.interop.values import near
from sim.report.layout import Cell, Line, Screen, fold, grid, title
from sim.scenario.schema import ClusterSpec
from sim.units import format_bytes, format_duration

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
SIZES = (2**16, 2**20, 2**24, 2**26, 2**28, 2**30)
MAX_FILE_BYTES = 2**24
MAX_MATRIX = 20
GB = 1e9


class Source(NamedTuple):
    """A node, the text of its topology file where it was read from a foreign file, and graphs of a dump."""

    node: NodeFacts | None
    text: str
    notes: tuple[str, ...]
    graphs: tuple[nccl_xml.Graph, ...] = ()


# --- reading -----------------------------------------------------------------------------------


def read(name_or_path: str, gpu: str = "") -> Source:
    """Return what a name of the catalogue, a topology file, ``nvidia-smi topo -m`` or NCCL's XML says.

    Raises ScenarioError with every finding.
    """
    if gpu and gpu not in load.names("gpu"):
        raise _unknown("--gpu", "GPU", gpu, load.names("gpu"), "sim catalog gpu")
    if name_or_path in load.names("node"):
        _no_gpu(name_or_path, gpu)
        return Source(load.node(name_or_path), "", ())
    path = Path(name_or_path)
    if not path.exists():
        if "/" not in name_or_path and "." not in name_or_path:
            raise _unknown(name_or_path, "node", name_or_path, load.names("node"), "sim catalog node")
        raise ScenarioError(
            [Finding(name_or_path, 0, "does not exist", "give a file, or a name of `sim catalog node`")]
        )
    text = _text(path)
    if not text.strip():
        what = "give the output of `nvidia-smi topo -m`, NCCL's XML, or a topology file"
        raise ScenarioError([Finding(name_or_path, 0, "is empty", what)])
    if nccl_xml.looks_like(text):
        return _from_xml(text, name_or_path, gpu)
    if nvidia_smi.looks_like(text) or "GPU0" in text:
        matrix = nvidia_smi.read_matrix(text, name_or_path)
        major = load.gpu(gpu).compute_capability[0] if gpu else 0
        if gpu:
            _may_be(gpu, any(word.startswith("NV") for word in matrix.cells.values()), name_or_path)
        found = nvidia_smi.to_machine(matrix, f"{path.stem}, read from nvidia-smi topo -m", gpu, major)
        return _source(found, name_or_path)
    if not any(line.startswith(("devices:", "wires:", "gpu:")) for line in text.splitlines()):
        what = "give the output of `nvidia-smi topo -m` from its line of GPU0 on, NCCL's XML, or a topology file"
        raise ScenarioError([Finding(name_or_path, 0, "describes no machine", what)])
    _no_gpu(name_or_path, gpu)
    written = name_or_path if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")) else f"./{name_or_path}"
    return Source(load.node(written), "", ())


def _may_be(gpu: str, linked: bool, file: str) -> None:
    """Refuse ``--gpu`` with a GPU that has no NVLink where the file has NVLinks."""
    if linked and not machine.has_nvlink(gpu, load.gpu(gpu).compute_capability):
        what = "name the GPU that the machine has (`nvidia-smi -L`), or leave --gpu out"
        raise ScenarioError([Finding(file, 0, f"has NVLinks between GPUs, and {gpu} has no NVLink", what)])


def _no_gpu(name: str, gpu: str) -> None:
    """Refuse ``--gpu`` beside what says its GPU itself."""
    if gpu:
        remedy = "leave it out; a topology file (--write FILE.yaml) says `gpu:`"
        raise ScenarioError([Finding("--gpu", 0, f"{name} says itself which GPU it has", remedy)])


def _text(path: Path) -> str:
    def refuse(problem: str, remedy: str = "") -> ScenarioError:
        return ScenarioError([Finding(str(path), 0, problem, remedy)])

    try:
        if path.is_dir():
            raise refuse("is a directory", "give a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise refuse(f"is {format_bytes(path.stat().st_size)}", "is it the right file?")
        raw = path.read_bytes()
        # PowerShell's > writes UTF-16, and many editors a mark of the byte order before UTF-8.
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise refuse("is not UTF-8 text", "save it as UTF-8") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or 'not a usable path'}") from None


def own_text(source: Source, name: str) -> str:
    """Return the topology file that a name of the catalogue, or a path, stands for."""
    assert source.node is not None
    path = Path(name)
    return _text(path if path.exists() else load.topologies() / f"{name}.yaml")


def _from_xml(text: str, file: str, gpu: str) -> Source:
    root = nccl_xml.parse(text, file)
    if root.name == "graphs":
        return Source(None, "", (), nccl_xml.graphs(root, file))
    notes = []
    if gpu:
        _may_be(gpu, "<nvlink" in text, file)
    else:
        gpu, guessed = nccl_xml.gpu_of(root)
        notes += [f"{guessed}; --gpu NAME says which"] if guessed else []
    major = load.gpu(gpu).compute_capability[0]
    found = nccl_xml.to_machine(root, file, gpu, major, "sxm" in gpu or gpu.startswith("gb"))
    found.notes[:0] = notes
    return _source(found, file)


def _source(found: machine.Machine, file: str) -> Source:
    text = machine.topology_text(found)
    return Source(load.node_from_text(text, Path(file).stem), text, tuple(found.notes))


def _unknown(where: str, what: str, word: str, known: tuple[str, ...], listing: str) -> ScenarioError:
    close = near(word, known)
    mean = f"did you mean {' or '.join(close)}?" if close else f"`{listing}` lists them; a file is given by its path"
    return ScenarioError([Finding(where, 0, f"there is no {what} {word!r}", mean)])


def machine_of(node: NodeFacts, num_nodes: int, network: str) -> Cluster:
    """Return a cluster of such nodes. ``network`` by name or in words; empty: the node's usual one."""
    return build_cluster(
        ClusterSpec(
            node=node,
            gpu=load.gpu(node.gpu),
            network=_network(node, num_nodes, network),
            num_nodes=num_nodes,
            num_gpus=num_nodes * node.num_gpus,
        )
    )


def _network(node: NodeFacts, num_nodes: int, name: str) -> NetworkFacts | None:
    if not name:
        if node.default_network:
            return load.network(node.default_network)
        if num_nodes > 1:
            remedy = "write --network NAME (`sim catalog network`) or --network '400 Gbit/s per GPU'"
            raise ScenarioError([Finding("--nodes", 0, f"{node.name} does not say its network", remedy)])
        return None
    if name in load.names("network"):
        return load.network(name)
    try:
        return load.network_in_words(name, node)
    except (ValueError, KeyError) as error:
        raise ScenarioError([Finding("--network", 0, str(error).strip('"'))]) from None


# --- content -----------------------------------------------------------------------------------


def topology(source: Source, num_nodes: int, network: str, tests: Sequence[str]) -> dict[str, Any]:
    """Return everything that is printed. ``tests`` are files of nccl-tests output."""
    if source.node is None:
        return {"graphs": [_graph(graph) for graph in source.graphs]}
    cluster = machine_of(source.node, num_nodes, network)
    content: dict[str, Any] = {
        "name": source.node.name,
        "title": source.node.title,
        "gpu": source.node.gpu,
        "num_nodes": num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "network": cluster.spec.network.name if cluster.spec.network else "",
        "notes": list(source.notes),
        "tree": _tree(cluster),
        "paths": _paths(cluster),
        "nics": _nics(cluster),
        "nccl": _found(cluster),
    }
    measured = [(file, test) for file in tests for test in nccl_tests.read_tests(_text(Path(file)), file)]
    for file, test in measured:
        name, same = nccl_tests.gpu_of(test, source.node.gpu, load.names("gpu"))
        note = f"{file}: ran on {name}, not on {source.node.gpu}"
        remarks = [*([] if same else [note]), *(f"{file}: {remark}" for remark in test.remarks)]
        content["notes"] += [remark for remark in remarks if remark not in content["notes"]]
    rows = [row for file, test in measured for row in _beside(source.node, network, cluster, test, file)]
    content["bus"] = rows or _expected(cluster)
    return content


def _graph(graph: nccl_xml.Graph) -> dict[str, Any]:
    return {
        "pattern": graph.pattern,
        "num_channels": len(graph.channels),
        "bytes_per_s_inside": graph.bw_intra * GB,
        "bytes_per_s_between": graph.bw_inter * GB,
        "path_inside": graph.type_intra,
        "path_between": graph.type_inter,
        "channels": [list(channel) for channel in graph.channels],
    }


def _tree(cluster: Cluster) -> list[str]:
    """Return the tree of PCIe below each socket, then what the GPUs have among themselves."""
    node = cluster.node
    names = [device.name for device in node.devices]
    lines: list[str] = []

    def below(device: int, parent: int, indent: str) -> None:
        wires = [
            wire for i in node.out[device] if (wire := node.wires[i]).kind in ("pcie", "c2c") and wire.target != parent
        ]
        wires.sort(key=lambda wire: (node.devices[wire.target].kind != "pcie-switch", wire.target))
        for number, wire in enumerate(wires):
            last = number == len(wires) - 1
            rate = f"  {wire.kind} {wire.bytes_per_s / GB:.3g} GB/s" if wire.bytes_per_s < 1e15 else ""
            lines.append(f"{indent}{'└─ ' if last else '├─ '}{names[wire.target]}{rate}")
            if node.devices[wire.target].kind == "pcie-switch":
                below(wire.target, device, indent + ("   " if last else "│  "))

    for socket in node.memory:
        others = [
            f"{names[node.wires[i].target]} {node.wires[i].bytes_per_s / GB:.3g} GB/s"
            for i in node.out[socket]
            if node.wires[i].kind == "cpu"
        ]
        lines.append(names[socket] + (f"  to {', '.join(others)}" if others else ""))
        below(socket, -1, "")
    for index, device in enumerate(node.devices):
        if device.kind == "nvswitch":
            wires = [node.wires[i] for i in node.out[index]]
            ends = machine.spans([node.gpus.index(wire.target) for wire in wires if wire.target in node.gpus])
            rates = sorted({f"{wire.bytes_per_s / GB:.4g}" for wire in wires})
            lines.append(f"{device.name}  gpu {ends}, {' or '.join(rates)} GB/s each")
    straight = (
        wire
        for wire in node.wires[::2]
        if wire.kind in ("nvlink", "xgmi") and {wire.source, wire.target} <= set(node.gpus)
    )
    lines += [
        f"{names[wire.source]} - {names[wire.target]}  {wire.kind} {wire.bytes_per_s / GB:.3g} GB/s"
        for wire in straight
    ]
    return lines


def _paths(cluster: Cluster) -> list[list[str]]:
    """Return NCCL's path type between every two GPUs of a node."""
    many = range(cluster.gpus_per_node)
    return [["X" if a == b else cluster.local_route(a, b).kind for b in many] for a in many]


def _nics(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the NICs of the first node that GPUs use: whose they are and how far."""
    found: dict[int, list[int]] = {}
    if not cluster.num_nics:
        return []
    for gpu in range(cluster.gpus_per_node):
        found.setdefault(cluster.rail_of(gpu), []).append(gpu)
    return [
        {
            "nic": cluster.node.devices[cluster.node.nics[rail]].name,
            "gpus": gpus,
            "path": cluster.local_nic_route(gpus[0], rail, outward=True).kind,
            "bytes_per_s": cluster.nic_bytes_per_s,
        }
        for rail, gpus in sorted(found.items())
    ]


def _found(cluster: Cluster) -> dict[str, Any]:
    """Return the rings that NCCL finds over all GPUs."""
    if cluster.num_gpus < 2:
        return {}
    graph = ring_graph(cluster, tuple(range(cluster.num_gpus)))
    return {
        "channels": graph.compute_channels,
        "bytes_per_s": graph.channels * graph.channel_bw * GB,
        "rings": [list(order) for order in dict.fromkeys(graph.patterns[0].orders)],
    }


def _bus(cluster: Cluster, kind: str, group: tuple[int, ...], size: int) -> dict[str, Any]:
    if kind == "send":
        pairs = [(gpu, group[(i + 1) % len(group)]) for i, gpu in enumerate(group)]
        traffic = plan_point_to_point(cluster, pairs, size, len(group))
    else:
        traffic = plan_collective(cluster, [group], kind, size)
    time_s = alone_s(cluster, traffic)
    return {
        "collective": kind,
        "num_ranks": len(group),
        "num_nodes": len({cluster.node_of(gpu) for gpu in group}),
        "tensor_bytes": size,
        "algorithm": traffic.algorithm,
        "time_s": time_s,
        "bus_bytes_per_s": collective.bus_bytes_per_s(kind, len(group), size, time_s),
    }


def _expected(cluster: Cluster) -> list[dict[str, Any]]:
    if cluster.num_gpus < 2:
        return []
    group = tuple(range(cluster.num_gpus))
    return [_bus(cluster, kind, group, size) for kind in KINDS for size in SIZES]


def _beside(
    node: NodeFacts, network: str, cluster: Cluster, test: nccl_tests.NcclTest, file: str
) -> Iterator[dict[str, Any]]:
    """Yield the expected beside the measured, with its signed error."""
    num_nodes = test.num_nodes or cluster.num_nodes
    num_ranks = test.num_ranks or cluster.num_gpus
    each = num_ranks // num_nodes
    if num_ranks < 2 or each * num_nodes != num_ranks or each > node.num_gpus:
        problem = f"{num_ranks} ranks on {num_nodes} nodes do not fit nodes of {node.num_gpus} GPUs"
        raise ScenarioError([Finding(file, test.rows[0].line, problem, "give the topology of these nodes")])
    ran = cluster if num_nodes == cluster.num_nodes else machine_of(node, num_nodes, network)
    group = tuple(n * ran.gpus_per_node + gpu for n in range(num_nodes) for gpu in range(each))
    for row in test.rows:
        expected = _bus(ran, test.kind, group, row.tensor_bytes)
        yield {
            **expected,
            "file": file,
            "measured_time_s": row.time_s,
            "measured_bus_bytes_per_s": row.bus_bytes_per_s,
            "error": expected["time_s"] / row.time_s - 1,
        }


# --- printing ----------------------------------------------------------------------------------


def print_topology(screen: Screen, content: dict[str, Any]) -> None:
    """Print what ``topology`` returned."""
    screen.show(_lines(content, min(screen.width, 160)))


def _lines(content: dict[str, Any], width: int) -> Iterator[Line]:
    if "graphs" in content:
        yield from _graph_lines(content["graphs"], width)
        return
    many = f"{content['num_nodes']} x " if content["num_nodes"] > 1 else ""
    yield title(content["name"], f"{many}{content['title']}")
    for note in content["notes"]:
        yield from (((line, "yellow"),) for line in fold(f"note: {note}", width, 2, 2))
    yield from ((f"  {line}",) for line in content["tree"])
    paths = content["paths"]
    if 1 < len(paths) <= MAX_MATRIX:
        yield ()
        yield title("Paths between GPUs", "as NCCL calls them")
        head: list[Cell] = ["", *(f"gpu{i}" for i in range(len(paths)))]
        yield from grid([head, *([f"gpu{i}", *row] for i, row in enumerate(paths))], "l" + "l" * len(paths), width)
    if content["nics"]:
        yield ()
        yield title("NICs", content["network"])
        rows: list[list[Cell]] = [
            [nic["nic"], f"gpu {machine.spans(nic['gpus'])}", nic["path"], f"{nic['bytes_per_s'] / GB:.3g} GB/s"]
            for nic in content["nics"]
        ]
        yield from grid(rows, "llll", width)
    if found := content["nccl"]:
        yield ()
        yield title("NCCL", f"{found['channels']} channels, {found['bytes_per_s'] / GB:.4g} GB/s expected of its rings")
        for ring in found["rings"][:8]:
            words = " ".join(map(str, ring)) if len(ring) <= MAX_MATRIX else f"{ring[0]} {ring[1]} ... {ring[-1]}"
            yield (f"  ring  {words}",)
    yield ()
    yield from _bus_lines(content["bus"], width)


def _bus_lines(rows: list[dict[str, Any]], width: int) -> Iterator[Line]:
    if not rows:
        return
    compared = "error" in rows[0]
    words = "time expected and measured, out of place" if compared else "on idle wires"
    yield title("Bus bandwidth", words)
    head: list[Cell] = ["collective", "ranks", "size", "algorithm", "time", "bus GB/s"]
    head += ["measured", "bus GB/s", "error"] if compared else []
    table: list[list[Cell]] = [[(str(cell), "dim") for cell in head]]
    for row in rows:
        cells: list[Cell] = [
            row["collective"], str(row["num_ranks"]), format_bytes(row["tensor_bytes"]), row["algorithm"],
            format_duration(row["time_s"]), f"{row['bus_bytes_per_s'] / GB:.1f}",
        ]  # fmt: skip
        if compared:
            cells += [
                format_duration(row["measured_time_s"]),
                f"{row['measured_bus_bytes_per_s'] / GB:.1f}",
                (f"{row['error']:+.1%}", "yellow" if abs(row["error"]) > 0.15 else ""),
            ]
        table.append(cells)
    yield from grid(table, "lrrlrr" + "rrr" * compared, width)
    if compared:
        errors = [row["error"] for row in rows]
        mean = sum(map(abs, errors)) / len(errors)
        many = f"{len(errors)} row{'s' * (len(errors) > 1)}"
        yield (f"  mean error {mean:.1%}, signed {sum(errors) / len(errors):+.1%}, {many}",)


def _graph_lines(graphs: list[dict[str, Any]], width: int) -> Iterator[Line]:
    yield title("NCCL's graphs")
    rows: list[list[Cell]] = [[(word, "dim") for word in ("pattern", "channels", "inside", "between", "paths")]]
    rows += [
        [
            graph["pattern"], str(graph["num_channels"]), f"{graph['bytes_per_s_inside'] / GB:g} GB/s",
            f"{graph['bytes_per_s_between'] / GB:g} GB/s", f"{graph['path_inside']}, {graph['path_between']}",
        ]
        for graph in graphs
    ]  # fmt: skip
    yield from grid(rows, "lrrrl", width)
    for graph in graphs:
        for number, channel in enumerate(graph["channels"][:8]):
            yield (f"  {graph['pattern']} {number}  {' '.join(channel)}",)
