"""The section ``cluster``: nodes, GPUs, network, and whose collectives run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sim.catalog import load as catalog
from sim.catalog.schema import Fact, GpuFacts, NodeFacts
from sim.interop.values import Problem, read_mapping, show, suggest
from sim.scenario import fields
from sim.scenario.schema import NCCL_VERSION
from sim.scenario.sections.resolution import OWN_DEFAULT, Resolution, is_path, path_of, users_file

_ENTRIES: Mapping[str, Callable[[str], Any]] = {
    "node": catalog.node, "gpu": catalog.gpu, "network": catalog.network
}  # fmt: skip


def read_cluster(r: Resolution, given: object) -> None:
    """Fill the draft with the node, its GPU, how many there are, the network, and the library of the collectives."""
    values, wrong = read_mapping(given, fields.CLUSTER, ("cluster",), r.problems)
    d = r.draft
    _backend(r, values, wrong, given)
    node = _node(r, values["node"]) if "node" in values else None
    if node is not None:
        d.node = node
        _gpu(r, node, values.get("gpu"))
        if not wrong & {"num_nodes", "num_gpus"}:
            _size(r, node, values.get("num_nodes"), values.get("num_gpus"))
        if "network" not in wrong:
            _network(r, node, values.get("network"))
            if d.knows("network") and d.network is not None and d.knows("sharp") and d.sharp is not None:
                d.network = dataclasses.replace(d.network, sharp=d.sharp)
    elif isinstance(values.get("gpu"), Mapping):
        read_mapping(values["gpu"], fields.GPU, ("cluster", "gpu"), r.problems)


def _backend(r: Resolution, values: Mapping[str, Any], wrong: set[str], given: object) -> None:
    """Whose collectives run; what is left out is NCCL's."""
    d = r.draft
    if "backend" not in wrong:
        d.backend = values.get("backend", "nccl")
        if "backend" not in values:
            r.sources["cluster.backend"] = OWN_DEFAULT
    if "sharp" not in wrong:
        d.sharp = values.get("sharp")
    if not wrong & {"alpha", "beta"}:
        d.alpha, d.beta = values.get("alpha"), values.get("beta")
    if "nccl" not in wrong:
        d.nccl = values.get("nccl", NCCL_VERSION)
        if "nccl" in values and d.knows("backend") and d.backend != "nccl":
            problem = f"cluster.nccl is given, but backend is {d.backend}"
            r.problems.append(Problem(("cluster", "nccl"), problem, "write backend: nccl, or leave nccl out"))
    for key in ("backend", "nccl", "sharp", "alpha", "beta"):
        if key in values and isinstance(given, Mapping):
            r.written[key] = values[key] if key == "backend" else given[key]


def _node(r: Resolution, text: str) -> NodeFacts | None:
    path = path_of(r, text)
    if is_path(text):
        r.written["node"] = str(path.resolve())
        return users_file(r, lambda: catalog.node(str(path)), ("cluster", "node"))
    r.written["node"] = text.lower()
    unknown = Problem(("cluster", "node"), f"unknown node {show(text)}", "")
    found: NodeFacts | None = _known(r, "node", text.lower(), unknown)
    return found


def _known(r: Resolution, kind: str, name: str, otherwise: Problem) -> Any:
    """Return an entry of the catalogue, or None with the problem and the names that are near."""
    try:
        return _ENTRIES[kind](name)
    except (KeyError, OSError, ValueError):
        r.problems.append(otherwise._replace(remedy=suggest(name, catalog.names(kind))))
        return None


def _gpu(r: Resolution, node: NodeFacts, given: object) -> None:
    path = ("cluster", "gpu")
    unknown = Problem(("cluster", "node"), f"node {node.name} has unknown GPUs {show(node.gpu)}", "")
    usual: GpuFacts | None = _known(r, "gpu", node.gpu, unknown)
    if usual is None:
        return
    if given is None:
        r.sources["cluster.gpu"] = f"the GPU of node {node.name}"
        r.draft.gpu = usual
        return
    mapping = {"name": given} if isinstance(given, str) else given
    before = len(r.problems)
    values, _ = read_mapping(mapping, fields.GPU, path, r.problems)
    if len(r.problems) > before:
        return
    if "name" in values:
        unknown = Problem((*path, "name"), f"unknown GPU {show(values['name'])}", "")
        usual = _known(r, "gpu", values["name"].lower(), unknown)
        if usual is None:
            return
    r.written["gpu"] = dict(mapping) if isinstance(mapping, Mapping) else {}
    r.draft.gpu = overridden(usual, values, r.written["gpu"])


def _size(r: Resolution, node: NodeFacts, num_nodes: int | None, num_gpus: int | None) -> None:
    """Work out nodes and GPUs: whole nodes, a part of one, or an equal part of each where both are given."""
    d, per_node = r.draft, node.num_gpus
    d.gives_nodes = num_nodes is not None
    if num_gpus is None:
        if num_nodes is None:
            num_nodes = 1
            r.sources["cluster.num_nodes"] = "one node, as neither num_nodes nor num_gpus is given"
        num_gpus = num_nodes * per_node
        r.sources["cluster.num_gpus"] = f"{num_nodes} x {per_node} GPUs of {node.name}"
    elif num_nodes is None:
        num_nodes = _nodes_for(r, node, num_gpus)
        if num_nodes is None:
            return
        r.sources["cluster.num_nodes"] = f"{num_gpus} GPUs on nodes of {per_node}"
    elif num_gpus % num_nodes or num_gpus > num_nodes * per_node:
        fits = num_nodes * per_node
        r.problems.append(
            Problem(
                ("cluster", "num_gpus"),
                f"cluster.num_gpus = {num_gpus} on num_nodes = {num_nodes} nodes of {per_node} GPUs",
                f"write num_gpus: {fits}, or leave one of the two out",
            )
        )
        return
    d.num_nodes, d.num_gpus = num_nodes, num_gpus


def _nodes_for(r: Resolution, node: NodeFacts, num_gpus: int) -> int | None:
    per_node = node.num_gpus
    if num_gpus <= per_node:
        return 1
    if num_gpus % per_node == 0:
        return num_gpus // per_node
    fewest = -(-num_gpus // per_node)
    down, up = num_gpus // per_node * per_node, fewest * per_node
    evenly = f"; for {num_gpus // fewest} of each write num_nodes: {fewest} too" if num_gpus % fewest == 0 else ""
    r.problems.append(
        Problem(
            ("cluster", "num_gpus"),
            f"cluster.num_gpus = {num_gpus} is neither a part of one node nor whole nodes of {per_node}",
            f"write num_gpus: {down} or {up}{evenly}",
        )
    )
    return None


def _network(r: Resolution, node: NodeFacts, text: str | None) -> None:
    d = r.draft
    if text is None:
        if not d.knows("num_nodes"):
            return
        if d.num_nodes == 1 or not node.default_network:
            d.network = None
            if d.num_nodes == 1:
                r.sources["cluster.network"] = "none: there is one node"
            return
        name = node.default_network
        unknown = Problem(("cluster", "node"), f"node {node.name} names unknown network {show(name)}", "")
        if (usual := _known(r, "network", name, unknown)) is not None:
            d.network = usual
            r.written["network"] = name
            r.sources["cluster.network"] = f"node {node.name}'s default network"
        return
    path = ("cluster", "network")
    r.written["network"] = text
    if ("/s " in text or " per " in text) and not text.endswith((".yaml", ".yml")):
        try:
            d.network = catalog.network_in_words(text, node)
        except (ValueError, OverflowError) as error:
            problem, _, remedy = str(error).partition("; ")
            r.problems.append(Problem(path, f"cluster.network: {problem}", remedy))
    elif is_path(text):
        r.written["network"] = str(path_of(r, text).resolve())
        read = users_file(r, lambda: catalog.network(str(path_of(r, text))), path)
        if read is not None:
            d.network = read
    else:
        try:
            d.network = catalog.network(text.lower())
        except (KeyError, OSError, ValueError):
            remedy = suggest(text, catalog.names("network"), most=8)
            words = "" if remedy.startswith("did") else "; or write words: '400 Gbit/s RoCE per GPU'"
            r.problems.append(Problem(path, f"unknown network {show(text)}", remedy + words))


def overridden(gpu: GpuFacts, values: Mapping[str, Any], texts: Mapping[str, Any]) -> GpuFacts:
    """Return a GPU with facts replaced. ``memory`` is what cudaMemGetInfo calls total, so it replaces both sizes."""
    names = {
        "memory": ("memory_bytes", "total_memory_bytes"),
        "memory_bandwidth": ("memory_bytes_per_s",),
        "power_limit": ("power_w",),
        "boost_clock": ("boost_clock_hz",),
        "l2": ("l2_bytes",),
        "num_sms": ("num_sms",),
        "cuda_context": ("cuda_context_bytes",),
        "spread": ("spread",),
    }
    changed: dict[str, Any] = {}
    facts = dict(gpu.facts)
    for key, ours in names.items():
        if key in values:
            for name in ours:
                changed[name] = values[key]
                facts[name] = Fact(str(texts.get(key)), "user", f"cluster.gpu.{key} of the scenario")
    if peaks := values.get("peak_flops"):
        changed["peak_flops"] = {**gpu.peak_flops, **peaks}
        given = texts.get("peak_flops")
        for name in peaks:
            text = str(given.get(name)) if isinstance(given, Mapping) else ""
            facts[f"peak_flops.{name}"] = Fact(text, "user", "cluster.gpu.peak_flops of the scenario")
    return dataclasses.replace(gpu, facts=facts, **changed) if changed else gpu
