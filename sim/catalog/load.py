"""The catalogue's door: facts by name, and a user's own node or network file by its path.

One small file a GPU, link, node, network and model, so that a run reads only what it names. A fact is written

    memory: {value: 80 GiB, kind: datasheet, source: h100, note: ...}

where ``source`` may be a key of the file's own ``sources``. In a user's own file a bare value will do: its kind is
then ``user`` and its source the file. Nodes and networks live in ``topologies/``; a node's ``wires`` are sentences:

    gpu[0-7] to nvswitch0 by 18 x nvlink4        every GPU has 18 links to the switch
    gpu[0-7] to pcie-switch[0-3] by pcie4-x16    dealt out in order: GPUs 0 and 1 to switch 0, ...
    every gpu[0-7] to nvswitch[0-5] by nvlink3   each to each
    among gpu[0-7] by xgmi-mi300x                every pair

Unknown names raise KeyError; a wrong file of a user raises ScenarioError with every finding and its line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import yaml

from sim import units
from sim.catalog.schema import Fact, FactKind, GpuFacts, LinkFacts, NetworkFacts, NodeFacts
from sim.errors import Finding, ScenarioError

T = TypeVar("T")
Kind = Literal["gpu", "node", "network", "link", "model"]
DEVICE_KINDS = ("gpu", "nvswitch", "pcie-switch", "cpu", "nic")
CPU_VENDORS = ("intel", "amd", "arm", "power")
FABRICS = ("infiniband", "roce", "efa", "slingshot", "omni-path", "ethernet")

FACT_KINDS = get_args(FactKind)
_HERE = Path(__file__).resolve().parent
_MAX_FILE_BYTES = 2**20
_MAX_DEPTH = 16
_MAX_DEVICES = 4096
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def topologies() -> Path:
    """Return the folder of nodes and networks: inside the package where installed, beside it in a checkout."""
    inside = _HERE.parent / "topologies"
    return inside if inside.is_dir() else _HERE.parent.parent / "topologies"


def _folder(kind: Kind) -> tuple[Path, str]:
    if kind == "node":
        return topologies(), ".yaml"
    if kind == "network":
        return topologies() / "networks", ".yaml"
    return _HERE / {"gpu": "gpus", "link": "links", "model": "models"}[kind], ".json" if kind == "model" else ".yaml"


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Return the names known of a kind, sorted."""
    folder, suffix = _folder(kind)
    return tuple(sorted(path.stem if suffix == ".json" else path.name[:-5] for path in folder.glob(f"*{suffix}")))


# --- one function a kind -------------------------------------------------------------------------


@cache
def gpu(name: str) -> GpuFacts:
    """Return a GPU's facts. Raises KeyError for an unknown name."""
    reader = _known("gpu", name)
    facts = _gpu(reader, name)
    reader.finish()
    return facts


@cache
def link(kind: str) -> LinkFacts:
    """Return the facts of one kind of wire. Raises KeyError for an unknown one."""
    reader = _known("link", kind)
    facts = LinkFacts(
        name=kind,
        kind=reader.plain("kind", str),
        bytes_per_s=reader.fact("bandwidth", units.parse_rate, "bytes_per_s"),
        latency_s=reader.fact("latency", units.parse_duration, "latency_s"),
        copy_bytes_per_s=reader.fact("copy_bandwidth", units.parse_rate, "copy_bytes_per_s", 0.0),
        facts=reader.facts,
    )
    reader.finish()
    return facts


def node(name_or_path: str) -> NodeFacts:
    """Return a node's facts, by name or from the file at a path (relative to the working directory).

    Raises KeyError for an unknown name, ScenarioError for a file that is wrong.
    """
    if _is_path(name_or_path):
        return _node(_users(name_or_path), Path(name_or_path).stem)
    return _known_node(name_or_path)


def node_from_text(text: str, name: str) -> NodeFacts:
    """Return the facts of a topology file that is not on a disk. Raises ScenarioError as ``node`` does."""
    return _node(_Reader(name, text, yaml.load(text, Loader=_LOADER), users=True), name)


@cache
def _known_node(name: str) -> NodeFacts:
    reader = _known("node", name)
    alias = reader.alias()
    return _known_node(alias) if alias else _node(reader, name)


def network(name_or_path: str) -> NetworkFacts:
    """Return a network's facts, by name or from the file at a path. Raises as ``node`` does."""
    if _is_path(name_or_path):
        return _network(_users(name_or_path), Path(name_or_path).stem)
    return _known_network(name_or_path)


@cache
def _known_network(name: str) -> NetworkFacts:
    reader = _known("network", name)
    alias = reader.alias()
    return _known_network(alias) if alias else _network(reader, name)


def model_config(name: str) -> dict[str, Any]:
    """Return the Hugging Face ``config.json`` of a model. Raises KeyError for an unknown name."""
    return cast("dict[str, Any]", json.loads(_read_known("model", name)))


@cache
def model_parameters() -> Mapping[str, tuple[int, Fact]]:
    """Return the exact number of trained parameters of each model that the catalogue knows, with its provenance."""
    listed = yaml.load((_HERE / "models" / "parameters.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
    return {name: (row["value"], Fact(f"{row['value']:,}", row["kind"], row["source"])) for name, row in listed.items()}


_FABRIC_WORDS = {
    "infiniband": "infiniband",
    "ib": "infiniband",
    "roce": "roce",
    "efa": "efa",
    "slingshot": "slingshot",
    "omni-path": "omni-path",
    "ethernet": "ethernet",
}
_TEMPLATES = {
    "infiniband": "ib-ndr-400-rail",
    "roce": "roce-400-rail",
    "efa": "efa-p5",
    "slingshot": "slingshot-11",
    "omni-path": "omni-path-100",
    "ethernet": "ethernet-100g",
}
_WORDS = re.compile(
    r"^(?P<rate>[0-9.eE+]+\s*\S+/s)(?:\s+(?P<fabric>[A-Za-z-]+))?\s+per\s+(?P<whom>node|gpu|nic)$", re.I
)


def network_in_words(text: str, node: NodeFacts) -> NetworkFacts:
    """Return the network that a phrase describes: "800 Gbit/s per node", "400 Gbit/s RoCE per GPU".

    The rate is of the ports. Where the phrase names no fabric, it is that of the node's usual network. A total per
    node is spread over as few NICs, no faster than the node's usual ones, as carry it; a total beyond what that many
    GPUs have NICs for, over faster ones, as many as usual. Everything else (payload of a line, latency, GPUDirect) is
    that of the catalogue's network of this fabric. Raises ValueError that says what to write.
    """
    found = _WORDS.match(text.strip())
    fabric = _FABRIC_WORDS.get((found["fabric"] or "").lower(), "") if found else ""
    if found is None or (found["fabric"] and not fabric):
        raise ValueError(
            f"{text!r} does not describe a network; write '800 Gbit/s per node', '400 Gbit/s RoCE per GPU' or a name"
        )
    line = units.parse_rate(found["rate"])
    if not 0 < line < float("inf"):
        raise ValueError(
            f"{text!r} is no bandwidth; write '800 Gbit/s per node', or leave it out for the usual network"
        )
    usual = network(node.default_network) if node.default_network in names("network") else None
    like = network(_TEMPLATES[fabric]) if fabric else (usual or network("ib-ndr-400-rail"))
    if usual is not None and usual.fabric == like.fabric:
        like = usual
    usual_nics = usual.nics_per_node if usual else max(1, sum(kind == "nic" for _, kind in node.devices))
    if found["whom"].lower() == "gpu":
        num_nics, line_of_nic = node.num_gpus, line
    elif found["whom"].lower() == "nic":
        num_nics, line_of_nic = usual_nics, line
    else:
        needed = math.ceil(line / usual.line_bytes_per_s) if usual and usual.line_bytes_per_s else usual_nics
        num_nics = needed if needed <= max(node.num_gpus, usual_nics) else usual_nics
        line_of_nic = line / num_nics
    said = Fact(text, "user", "the scenario")
    payload = like.nic_bytes_per_s / like.line_bytes_per_s if like.line_bytes_per_s else 1.0
    facts = dict(like.facts)
    facts["nics_per_node"] = Fact(str(num_nics), "derived", f"{text!r} on {node.name}")
    facts["line_bytes_per_s"] = said
    facts["nic_bytes_per_s"] = Fact(
        units.format_rate(line_of_nic * payload), "derived", f"{payload:.3f} of the line, as in {like.name}"
    )
    return NetworkFacts(
        name=text.strip(),
        fabric=like.fabric,
        nic_bytes_per_s=line_of_nic * payload,
        nics_per_node=num_nics,
        latency_s=like.latency_s,
        topology=like.topology,
        oversubscription=like.oversubscription,
        gpudirect=like.gpudirect,
        nodes_per_leaf=like.nodes_per_leaf,
        facts=facts,
        line_bytes_per_s=line_of_nic,
        connection_bytes_per_s=like.connection_bytes_per_s,
        channels_per_peer=like.channels_per_peer,
        sharp=like.sharp,
    )


# --- files to plain mappings ---------------------------------------------------------------------


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def _read_known(kind: Kind, name: str) -> str:
    folder, suffix = _folder(kind)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or not (folder / f"{name}{suffix}").is_file():
        raise KeyError(name)
    return (folder / f"{name}{suffix}").read_text(encoding="utf-8")


def _known(kind: Kind, name: str) -> _Reader:
    folder, suffix = _folder(kind)
    text = _read_known(kind, name)
    return _Reader(str(folder / f"{name}{suffix}"), text, yaml.load(text, Loader=_LOADER), users=False)


def _users(path: str) -> _Reader:
    """Return the reader of a user's file, or raise ScenarioError with one clear line."""

    def refuse(problem: str, remedy: str = "", line: int = 0) -> ScenarioError:
        return ScenarioError([Finding(path, line, problem, remedy)])

    file = Path(path)
    try:
        if file.is_dir():
            raise refuse("is a directory", "give the path of a YAML file")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise refuse(
                f"is {units.format_bytes(file.stat().st_size)}; a topology takes a few lines", "is it the right file?"
            )
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise refuse("does not exist", "give the path of a YAML file or a name that `sim catalog` lists") from None
    except UnicodeDecodeError:
        raise refuse("is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise refuse(f"cannot be read: {reason}") from None
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise refuse("anchors and aliases are not used here", "write the value out", _line_of(event))
            depth += isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
            depth -= isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
            if depth > _MAX_DEPTH:
                raise refuse("is nested too deeply", "", _line_of(event))
        data = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable"
        raise refuse(f"is not YAML: {problem}", "", mark.line + 1 if mark else 0) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise refuse(f"is not YAML: {error}") from None
    if data is None:
        raise refuse("is empty", "see topologies/ for what a node or network file says")
    if not isinstance(data, dict):
        raise refuse(f"holds a {type(data).__name__}, not keys and values", "see topologies/ for examples", 1)
    return _Reader(path, text, data, users=True)


def _line_of(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Reader:
    """Takes facts out of one file's mapping, noting provenance and findings as it goes."""

    def __init__(self, file: str, text: str, data: dict[Any, Any], users: bool) -> None:
        self.file = file
        self.facts: dict[str, Fact] = {}
        self._text = text
        self._data = data
        self._users = users
        self._sources: Mapping[str, str] = {}
        self._problems: list[tuple[tuple[str | int, ...], str, str]] = []
        self._seen = {"sources"}
        sources = data.get("sources", {})
        if isinstance(sources, dict):
            self._sources = {str(key): str(value) for key, value in sources.items()}
        else:
            self.problem(("sources",), "sources is not a mapping of short names to citations", "sources: {sheet: ...}")

    def problem(self, path: tuple[str | int, ...], text: str, remedy: str = "") -> None:
        self._problems.append((path, text, remedy))

    def alias(self) -> str:
        return str(self._data.get("alias_of", ""))

    def has(self, key: str) -> bool:
        self._seen.add(key)
        return key in self._data

    def raw(self, key: str) -> Any:
        self._seen.add(key)
        return self._data.get(key)

    def plain(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a value that is a name, not a fact."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.problem((), f"{key} is missing", f"add `{key}:`")
        elif not isinstance(value, kind):
            self.problem((key,), f"{key} is {value!r}, not {_ARTICLES.get(kind, kind.__name__)}")
        else:
            return value
        return kind()

    def fact(self, key: str, parse: Callable[[Any], T], name: str = "", default: T | None = None) -> T:
        """Return the parsed value of a fact and note where it comes from under ``name``."""
        if not self.has(key):
            if default is None:
                self.problem((), f"{key} is missing", f"add `{key}:` with its unit")
                return cast(T, 0)
            return default
        return self.parse(self.raw(key), (key,), parse, name or key)

    def parse(self, written: Any, path: tuple[str | int, ...], parse: Callable[[Any], T], name: str) -> T:
        where = ".".join(map(str, path))
        row: dict[Any, Any]
        if isinstance(written, dict):
            row = written
            for key in row:
                if key not in ("value", "kind", "source", "note", "band"):
                    self.problem((*path, key), f"unknown key {where}.{key}", "a fact has value, kind, source, note")
            if self._users:
                row = {"kind": "user", "source": self.file, **row}
        else:
            row = {"value": written, "kind": "user", "source": self.file} if self._users else {}
        value = row.get("value")
        kind, source = row.get("kind"), str(row.get("source", ""))
        if kind not in FACT_KINDS:
            self.problem(path, f"{where}: kind {kind!r} is none of {', '.join(FACT_KINDS)}")
        if not source:
            self.problem(path, f"{where} has no source")
        self.facts[name] = Fact(
            text="true" if value is True else "false" if value is False else str(value),
            kind=cast(FactKind, kind),
            source=self._sources.get(source, source),
            note=str(row.get("note", "")),
        )
        try:
            return parse(value)
        except (ValueError, OverflowError) as error:
            self.problem(path, f"{where}: {error}")
            return cast(T, 0)

    def finish(self) -> None:
        """Raise what was found. A fault in the catalogue's own files is ours and raises AssertionError."""
        if self._users:
            for key in self._data:
                if key not in self._seen:
                    self.problem((key,), f"unknown key {key!r}", _nearest(str(key), sorted(self._seen)))
        if not self._problems:
            return
        if not self._users:
            raise AssertionError(f"{self.file}: {'; '.join(text for _, text, _ in self._problems)}")
        root = yaml.compose(self._text, Loader=_LOADER)
        raise ScenarioError([Finding(self.file, _line(root, path), text, fix) for path, text, fix in self._problems])


_ARTICLES: dict[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "a mapping"}


def _line(root: Any, path: tuple[str | int, ...]) -> int:
    """Return the line (1-based) of what stands at ``path``; 0 for the file itself."""
    line = 0
    here = root
    for step in path:
        if isinstance(here, yaml.MappingNode):
            for key, value in here.value:
                if key.value == str(step):
                    line, here = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(here, yaml.SequenceNode) and isinstance(step, int) and step < len(here.value):
            here = here.value[step]
            line = here.start_mark.line + 1
        else:
            return line
    return line


def _nearest(word: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


# --- parsers of single values --------------------------------------------------------------------


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1.0 <= value < 1e6:
        raise ValueError(f"{value!r} is not a factor of 1 or more")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _positive(parse: Callable[[Any], T]) -> Callable[[Any], T]:
    def parsed(value: Any) -> T:
        number = parse(value)
        if not cast(float, number) > 0 or number == float("inf"):
            raise ValueError(f"{value!r} is not above 0")
        return number

    return parsed


# --- mappings to facts ---------------------------------------------------------------------------


def _gpu(reader: _Reader, name: str) -> GpuFacts:
    major, _, minor = reader.plain("compute_capability", str).partition(".")
    peaks = reader.plain("peak_flops", dict)
    context = cast("dict[str, Any]", reader.raw("cuda_context"))
    low, high = context["band"]
    return GpuFacts(
        name=name,
        vendor=cast(Any, reader.plain("vendor", str)),
        architecture=reader.plain("architecture", str),
        compute_capability=(int(major), int(minor)),
        memory_bytes=reader.fact("memory", units.parse_size, "memory_bytes"),
        total_memory_bytes=reader.fact("total_memory", units.parse_size, "total_memory_bytes"),
        memory_bytes_per_s=reader.fact("memory_bandwidth", units.parse_rate, "memory_bytes_per_s"),
        l2_bytes=reader.fact("l2_cache", units.parse_size, "l2_bytes"),
        num_sms=reader.fact("num_sms", _count),
        boost_clock_hz=reader.fact("boost_clock", units.parse_frequency, "boost_clock_hz"),
        power_w=reader.fact("power", units.parse_power, "power_w"),
        peak_flops={
            precision: reader.parse(row, ("peak_flops", precision), units.parse_flops, f"peak_flops.{precision}")
            for precision, row in peaks.items()
        },
        cuda_context_bytes=reader.fact("cuda_context", units.parse_size, "cuda_context_bytes"),
        facts=reader.facts,
        cuda_context_band_bytes=(units.parse_size(low), units.parse_size(high)),
        peer_to_peer=reader.fact("peer_to_peer", _flag, "peer_to_peer", True),
    )


def _network(reader: _Reader, name: str) -> NetworkFacts:
    fabric = reader.plain("fabric", str)
    if fabric not in FABRICS and reader.has("fabric"):
        reader.problem(("fabric",), f"unknown fabric {fabric!r}", _nearest(fabric, FABRICS))
    topology = reader.plain("topology", str, "rail-optimised")
    if topology not in ("rail-optimised", "fat-tree"):
        reader.problem(("topology",), f"unknown topology {topology!r}", "rail-optimised or fat-tree")
    nic = reader.fact("nic_bandwidth", _positive(units.parse_rate), "nic_bytes_per_s")
    facts = NetworkFacts(
        name=name,
        fabric=cast(Any, fabric),
        nic_bytes_per_s=nic,
        nics_per_node=reader.fact("nics_per_node", _count),
        latency_s=reader.fact("latency", units.parse_duration, "latency_s"),
        topology=cast(Any, topology),
        oversubscription=reader.fact("oversubscription", _factor, "oversubscription", 1.0),
        gpudirect=reader.fact("gpudirect", _flag, "gpudirect", True),
        nodes_per_leaf=reader.fact("nodes_per_leaf", _count, "nodes_per_leaf", 32),
        facts=reader.facts,
        line_bytes_per_s=reader.fact("line_rate", _positive(units.parse_rate), "line_bytes_per_s", nic),
        connection_bytes_per_s=reader.fact(
            "connection_bandwidth", _positive(units.parse_rate), "connection_bytes_per_s", 0.0
        ),
        channels_per_peer=reader.fact("channels_per_peer", _count, "channels_per_peer", 0),
        sharp=reader.fact("sharp", _flag, "sharp", False),
    )
    reader.finish()
    return facts


def _node(reader: _Reader, name: str) -> NodeFacts:
    gpu_name = reader.plain("gpu", str)
    if gpu_name and gpu_name not in names("gpu"):
        reader.problem(("gpu",), f"unknown gpu {gpu_name!r}", _nearest(gpu_name, names("gpu")))
    network_name = reader.plain("network", str, "")
    if reader.has("network") and network_name not in names("network"):
        reader.problem(("network",), f"unknown network {network_name!r}", _nearest(network_name, names("network")))
    vendor = reader.plain("cpu_vendor", str, "intel")
    if vendor not in CPU_VENDORS:
        reader.problem(("cpu_vendor",), f"unknown cpu_vendor {vendor!r}", _nearest(vendor, CPU_VENDORS))
    devices = _devices(reader)
    wires = _wires(reader, devices)
    _connected(reader, devices, wires)
    if reader.has("wiring"):
        reader.fact("wiring", _text)
    facts = NodeFacts(
        name=name,
        title=reader.plain("title", str, name),
        gpu=gpu_name,
        num_gpus=sum(kind == "gpu" for _, kind in devices),
        devices=devices,
        wires=wires,
        host_memory_bytes=reader.fact("host_memory", _positive(units.parse_size), "host_memory_bytes"),
        host_memory_bytes_per_s=reader.fact(
            "host_memory_bandwidth", _positive(units.parse_rate), "host_memory_bytes_per_s"
        ),
        num_cpu_cores=reader.fact("cpu_cores", _count, "num_cpu_cores"),
        default_network=network_name,
        power_w=reader.fact("power", units.parse_power, "power_w", 0.0),
        nvswitch_multicast=reader.fact("nvswitch_multicast", _flag, "nvswitch_multicast", False),
        facts=reader.facts,
        cpu_vendor=cast(Any, vendor),
        cpu=reader.fact("cpu", _text, "cpu", ""),
        nvlink_domain_nodes=reader.fact("nvlink_domain_nodes", _count, "nvlink_domain_nodes", 1),
    )
    reader.finish()
    return facts


def _devices(reader: _Reader) -> tuple[tuple[str, str], ...]:
    """Return (name, kind) of every device: ``{gpu: 8}`` makes gpu0 to gpu7, in the order of DEVICE_KINDS."""
    counts = reader.plain("devices", dict)
    for kind, count in counts.items():
        if kind not in DEVICE_KINDS:
            reader.problem(("devices", kind), f"unknown kind of device {kind!r}", _nearest(str(kind), DEVICE_KINDS))
        elif isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MAX_DEVICES:
            reader.problem(("devices", kind), f"devices.{kind}: {count!r} is not a number of devices")
            counts = {**counts, kind: 0}
    for kind in ("gpu", "cpu"):
        if reader.has("devices") and not counts.get(kind):
            reader.problem(("devices",), f"a node has at least one {kind}", f"add `{kind}: 1` under devices")
    return tuple((f"{kind}{i}", kind) for kind in DEVICE_KINDS for i in range(counts.get(kind, 0)))


_WIRE = re.compile(
    r"^(?P<every>every\s+)?(?P<a>\S+)\s+to\s+(?P<b>\S+)\s+by\s+(?:(?P<count>\d{1,4})\s*x\s+)?(?P<link>\S+)$"
)
_AMONG = re.compile(r"^among\s+(?P<a>\S+)\s+by\s+(?:(?P<count>\d{1,4})\s*x\s+)?(?P<link>\S+)$")
_DEVICE = re.compile(r"^(?P<kind>[a-z-]*[a-z])(?:(?P<one>\d{1,4})|\[(?P<many>[0-9,-]{1,99})\])$")
_HOW = "write 'gpu[0-7] to nvswitch0 by 18 x nvlink4' or 'among gpu[0-7] by xgmi-mi300x'"


def _wires(reader: _Reader, devices: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str, str, int], ...]:
    exists = dict(devices)
    wires: list[tuple[str, str, str, int]] = []
    for i, sentence in enumerate(reader.plain("wires", list)):
        where = ("wires", i)
        found = (_WIRE.match(sentence) or _AMONG.match(sentence)) if isinstance(sentence, str) else None
        if found is None:
            reader.problem(where, f"{sentence!r} is not a wire", _HOW)
            continue
        count, kind = int(found["count"] or 1), found["link"]
        if kind not in names("link"):
            reader.problem(where, f"unknown link {kind!r}", _nearest(kind, names("link")))
        if count == 0:
            reader.problem(where, "0 links are no wire", "leave the line out")
        try:
            pairs = list(_pairs(found))
        except ValueError as error:
            reader.problem(where, str(error), _HOW)
            continue
        for a, b in pairs:
            missing = [device for device in (a, b) if device not in exists]
            if missing:
                reader.problem(where, f"there is no {missing[0]}", f"devices: {_counted(devices)}")
                break
            if a == b:
                reader.problem(where, f"{a} is wired to itself")
                break
            wires.append((a, b, kind, count))
    return tuple(wires)


def _pairs(found: re.Match[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of devices that one sentence wires. Raises ValueError where it cannot be dealt out."""
    left = _expand(found["a"])
    if "b" not in found.re.groupindex:
        yield from ((a, b) for i, a in enumerate(left) for b in left[i + 1 :])
        return
    right = _expand(found["b"])
    if found["every"]:
        yield from ((a, b) for a in left for b in right)
        return
    n, m = len(left), len(right)
    if n % m and m % n:
        raise ValueError(f"{n} devices cannot be dealt out evenly to {m}")
    many = max(n, m)
    yield from ((left[i * n // many], right[i * m // many]) for i in range(many))


def _expand(text: str) -> list[str]:
    """Return the devices of ``gpu3``, ``gpu[0-7]`` or ``gpu[0,2,4-5]``. Raises ValueError."""
    found = _DEVICE.match(text)
    if found is None:
        raise ValueError(f"{text!r} names no device")
    if found["one"] is not None:
        return [f"{found['kind']}{int(found['one'])}"]
    numbers: list[int] = []
    for part in found["many"].split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{text!r} names no devices")
        low, high = int(first), int(last if dash else first)
        if not low <= high < _MAX_DEVICES:
            raise ValueError(f"{text!r} names no devices")
        numbers.extend(range(low, high + 1))
    return [f"{found['kind']}{number}" for number in numbers]


def _counted(devices: tuple[tuple[str, str], ...]) -> str:
    counts = {kind: sum(k == kind for _, k in devices) for kind in DEVICE_KINDS}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _connected(
    reader: _Reader, devices: tuple[tuple[str, str], ...], wires: tuple[tuple[str, str, str, int], ...]
) -> None:
    """Find devices that nothing reaches from cpu0."""
    if not wires:
        return
    neighbours: dict[str, list[str]] = {name: [] for name, _ in devices}
    for a, b, _, _ in wires:
        neighbours[a].append(b)
        neighbours[b].append(a)
    reached, todo = {"cpu0"}, ["cpu0"]
    while todo:
        for other in neighbours.get(todo.pop(), ()):
            if other not in reached:
                reached.add(other)
                todo.append(other)
    alone = [name for name, _ in devices if name not in reached]
    if alone:
        reader.problem(("wires",), f"no wires lead from cpu0 to {', '.join(alone[:4])}", "add a wire")
