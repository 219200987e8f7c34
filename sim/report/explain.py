"""``sim explain``: every value of a resolved scenario, every fact and coefficient behind it, and where each is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sim.catalog import load
from sim.catalog.schema import Fact
from sim.cost import efficiency
from sim.cost.residuals import whole_runs
from sim.cost.spread import slowest_in, spread_of
from sim.errors import Finding
from sim.report.catalog import fact_rows
from sim.report.layout import Cell, Line, Screen, fold, paragraphs, title
from sim.scenario.document import Document
from sim.scenario.schema import Scenario

_SECTIONS = (
    "name", "framework", "model", "cluster", "parallelism", "training", "deepspeed", "ddp", "fsdp2", "fsdp1",
    "megatron", "allocator",
)  # fmt: skip


def given_document(file: Path, overrides: Sequence[str]) -> Document:
    """Return the scenario file as it is written, with ``--set`` laid over it: for the lines of what it gives."""
    from sim.scenario.document import parse_yaml, read_text
    from sim.scenario.load import apply_overrides

    findings: list[Finding] = []
    document = parse_yaml(read_text(file, str(file)), str(file), findings)
    apply_overrides(document, overrides, findings)
    return document


def explanation(scenario: Scenario, document: Document) -> dict[str, Any]:
    """Return the explanation as plain data: ``values``, ``facts`` by device, ``cost`` by family, ``warnings``."""
    return {
        "scenario": scenario.name,
        "values": list(_values(scenario, document)),
        "facts": {
            device: {"name": name, "facts": [_fact(key, fact) for key, fact in facts.items()]}
            for device, name, facts in _devices(scenario)
        },
        "cost": list(_cost(scenario)),
        "calibration": _calibration(scenario),
        "time": list(_time(scenario.cluster.backend)),
        "memory": list(_memory(scenario)),
        "warnings": list(scenario.warnings),
    }


def print_explanation(screen: Screen, content: Mapping[str, Any], *, quiet: bool) -> None:
    """Print what ``explanation`` returned; ``quiet`` leaves the facts' sources out."""
    screen.show(_lines(content, min(screen.width, 140), quiet))


def _time(library: str) -> Iterator[dict[str, Any]]:
    """Yield what the band beside the time rests on beside the fits' own residuals (sim/report/certainty.py); of
    collectives that of the ``library`` that runs them."""
    own = library.replace("-", "_")
    for name, fact in _measured("residuals.yaml").items():
        if name.startswith(("nccl", "gloo", "alpha_beta")) and not name.startswith(own):
            continue
        yield {"key": name.replace("_", " "), "value": fact["value"], "from": f"{fact['kind']}: {fact['source']}"}
    whole = whole_runs()
    words = f"measured: log(measured / predicted) of {whole.source}; sim/catalog/measured/whole_runs.yaml"
    yield {"key": "whole runs beyond the parts: shorter, longer", "value": [whole.below, whole.above], "from": words}


def _memory(scenario: Scenario) -> Iterator[dict[str, Any]]:
    """Yield what the band beside the memory estimate rests on (sim/memory/confidence.py)."""
    from sim.memory import confidence as c

    low, high = scenario.cluster.gpu.cuda_context_band_bytes or (scenario.cluster.gpu.cuda_context_bytes,) * 2
    yield {"key": "coverage of the band", "value": c.COVERAGE, "from": "sim/memory/confidence.py"}
    yield {
        "key": "allocated: scale of its residuals", "value": c.ALLOCATED_SCALE,
        "from": "121 published runs of 4 sources, each weighing the same: half within 1.9 %, 90 % within 6 %",
    }  # fmt: skip
    yield {
        "key": "fragmentation: share of itself", "value": c.FRAGMENTATION_SHARE,
        "from": "13 published runs with reserved bytes: 11 within 1.6 % of them, two 12 and 17 % too low",
    }  # fmt: skip
    yield {"key": "CUDA context", "value": [low, high], "from": "the catalogue's band for the GPU, in bytes"}
    yield {"key": "libraries", "value": list(c.LIBRARY_BAND), "from": "ai-dynamo/aiconfigurator, systems/h100_sxm.yaml"}


# --- values --------------------------------------------------------------------------------------


def _values(scenario: Scenario, document: Document) -> Iterator[dict[str, Any]]:
    """Yield each value with its origin: given (a line of the file, or --set), or why it is what it is."""
    from sim.scenario.dump import plain

    data = plain(scenario)
    for path, value in _leaves({section: data[section] for section in _SECTIONS if section in data}, ()):
        key = ".".join(path)
        source = scenario.sources.get(key) or _deepspeed_source(scenario, path)
        origin, line = _given(document, path)
        if origin and (source is None or not line):
            yield {"key": key, "value": value, "kind": "given", "line": line, "from": origin}
        else:
            yield {"key": key, "value": value, "kind": "default", "line": 0, "from": source or "sim's default"}


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*path, str(key)))
    else:
        yield path, value


def _given(document: Document, path: tuple[str, ...]) -> tuple[str, int]:
    """Return what gives a value, and in which line: "file:3", "--set", "ds_config.json (file:3)"; "" if nothing does.

    Where the document has a name or a path in the place of a section, that gives all its values.
    """
    for end in range(len(path), 0, -1):
        part = path[:end]
        value = _at(document, part)
        line = document.lines.get(part, 0)
        if end < len(path) and isinstance(value, Mapping):
            return "", 0  # the section is written out, without this key
        if part in document.origin:
            return document.origin[part], 0
        if line:
            where = f"{document.file}:{line}"
            return (f"{value} ({where})" if end < len(path) and str(value).endswith(".json") else where), line
        if value is not None and end == len(path):
            return document.file, 0
    return "", 0


def _at(document: Document, path: tuple[str, ...]) -> Any:
    value: Any = document.data
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _deepspeed_source(scenario: Scenario, path: tuple[str, ...]) -> str | None:
    """DeepSpeed's keys stand in sections of its config, but their sources under their last word."""
    if path[0] != "deepspeed":
        return None
    if len(path) == 2 or path[-1] == "enabled":
        return _DEEPSPEED_TOP.get(path[-1])
    sources, last = scenario.sources, path[-1]
    known = [f"deepspeed.{name}" for name in (last, last.removeprefix("stage3_"), path[-2])]
    return next((sources[key] for key in known if key in sources), None)


_DEEPSPEED_TOP = {
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size / (dp x micro_batch_size)",
    "train_batch_size": "training.global_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "enabled": "training.precision",
}


# --- facts and coefficients ------------------------------------------------------------------------


def _devices(scenario: Scenario) -> Iterator[tuple[str, str, Mapping[str, Fact]]]:
    cluster = scenario.cluster
    yield "gpu", cluster.gpu.name, cluster.gpu.facts
    yield "node", cluster.node.name, cluster.node.facts
    if cluster.network is not None:
        yield "network", cluster.network.name, cluster.network.facts
    for kind in dict.fromkeys(kind for _, _, kind, _ in cluster.node.wires):
        yield f"link {kind}", kind, load.link(kind).facts


def _fact(name: str, fact: Fact) -> dict[str, Any]:
    return {"name": name, "value": fact.text, "kind": fact.kind, "source": fact.source, "note": fact.note}


def _cost(scenario: Scenario) -> Iterator[dict[str, Any]]:
    """Yield, for each family of kernels, which measured file its coefficients are from and how well they fit it."""
    gpu = scenario.cluster.gpu
    source = efficiency.source_of(gpu)
    own = "measured on this GPU" if source.same else f"stands for {gpu.name}: {source.why}"
    if source.power != 1.0:
        own += f"; clock {min(source.power, source.limited):.2f} of it, as its power allows"
    own_backend = scenario.cluster.backend
    for family in ("gemm", "attention", *(("nccl",) if own_backend == "nccl" else ())):
        file = f"{family}_{source.name.replace('-', '_')}.yaml"
        if not (efficiency.MEASURED / file).exists():
            yield {"family": family, "file": "", "machine": source.name, "words": own, "source": "", "fits": []}
            continue
        data = _measured(file)
        words = "; ".join(str(data[key]) for key in ("source", "measured_with", "date", "script") if key in data)
        yield {
            "family": family,
            "file": f"sim/catalog/measured/{file}",
            "machine": source.name,
            "words": own,
            "source": words,
            "fits": list(_fits(data)),
        }
    if own_backend == "gloo":
        data = _measured("gloo.yaml")
        yield {
            "family": "gloo",
            "file": "sim/catalog/measured/gloo.yaml",
            "machine": data["machine"],
            "words": "seconds of a process for a collective, a message, a byte",
            "source": data["source"],
            "fits": [
                {"of": f"{name} ({fact['what']})", "value": fact["value"], "kind": fact["kind"]}
                for name, fact in data["coefficients"].items()
            ],
        }
    memory = efficiency.memory_coefficients(gpu)
    yield {
        "family": "memory-bound",
        "file": "sim/catalog/measured/memory_bound.yaml",
        "machine": gpu.name,
        "words": "share of the memory bandwidth by family",
        "source": "",
        "fits": [
            {"of": family, "value": fraction, "kind": "assumed" if family in memory.assumed else "measured"}
            for family, fraction in memory.fractions.items()
        ],
    }
    yield _spread(scenario)
    yield {
        "family": "host",
        "file": "sim/catalog/measured/host.yaml",
        "machine": "",
        "words": "times of the thread that issues, and CPU Adam",
        "source": "",
        "fits": [
            {"of": name, "value": fact["value"], "kind": fact["kind"], "source": fact["source"]}
            for name, fact in _measured("host.yaml").items()
        ],
    }


def _spread(scenario: Scenario) -> dict[str, Any]:
    """Return how much GPUs of one kind differ, and by how much all wait for the slowest of them."""
    slowest, spread = slowest_in(scenario), spread_of(scenario.cluster.gpu)
    own = scenario.cluster.gpu.facts.get("spread")
    facts = _measured("spread.yaml")
    return {
        "family": "spread",
        "file": "sim/catalog/measured/spread.yaml",
        "machine": "v100-sxm2",
        "words": f"all have the pace of the slowest of {slowest.num_gpus:,}, {slowest.deviations:.2f} deviations",
        "source": "standard deviations from GPU to GPU; V100's stand for all kinds (sim/cost/spread.py)",
        "fits": [
            {"of": name, "value": value, **({"kind": own.kind, "source": own.source} if own else
                                            {"kind": fact["kind"], "source": fact["source"]})}
            for (name, fact), value in zip(facts.items(), (spread.matmul, spread.memory), strict=True)
        ],
    }  # fmt: skip


def _calibration(scenario: Scenario) -> dict[str, Any] | None:
    """Return what the user's own measurements are and change: ratios of measured to modelled time, by family."""
    if scenario.calibration is None:
        return None
    from sim.cluster.topology import build_cluster
    from sim.cost.model import CostModel, CostSettings

    settings = CostSettings(code=scenario.training.code, calibration=scenario.calibration)
    own = CostModel(build_cluster(scenario.cluster), scenario.cluster.gpu, settings).calibrated
    assert own is not None
    curves = {
        f"{c.collective}, {c.ranks} ranks, {c.nodes} node{'s' * (c.nodes > 1)}": ratios for c, ratios in own.curves()
    }
    families = {" ".join(family): ratios for family, ratios in own.families().items()}
    return {
        "file": scenario.calibration.file,
        "provenance": dict(scenario.calibration.provenance),
        "ratios": [
            {"of": of, "count": len(ratios), "least": min(ratios), "median": median(ratios), "most": max(ratios)}
            for of, ratios in {**families, **curves}.items()
        ],
    }


def _measured(file: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content: dict[str, Any] = yaml.load((efficiency.MEASURED / file).read_text(encoding="utf-8"), loader)
    return content


def _fits(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the residuals that a file of fits states, dtype by dtype or kernel by kernel."""
    for of, fit in data.items():
        if not isinstance(fit, Mapping):
            continue
        for name, residuals in _residuals(fit, ()):
            yield {"of": " ".join((of, *name)), **residuals}


def _residuals(fit: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for key, value in fit.items():
        if isinstance(value, Mapping):
            if "median_abs" in value:
                words = key.removeprefix("residuals_").replace("_", " ")
                yield (*path, words), value
            else:
                yield from _residuals(value, path)


# --- for a person ----------------------------------------------------------------------------------


def _lines(content: Mapping[str, Any], width: int, quiet: bool) -> Iterator[Line]:
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for value in content["values"]:
        section, _, name = value["key"].rpartition(".")
        source = (value["from"], "bold" if value["kind"] == "given" else "dim")
        sections.setdefault(section or "scenario", []).append((name, value_words(value["value"]), source))
    for number, (section, rows) in enumerate(sections.items()):
        yield from [()] if number else []
        yield title(section)
        yield from paragraphs(rows, width)
    if quiet:
        return
    for device, entry in content["facts"].items():
        yield ()
        yield title(device if device.startswith("link ") else f"{device} {entry['name']}")
        yield from paragraphs(fact_rows(entry["facts"]), width)
    for family in content["cost"]:
        yield ()
        yield title(
            f"{family['family']} kernels" if family["family"] not in ("host", "spread") else family["family"],
            family["words"],
        )
        for words in filter(None, (family["file"], family["source"])):
            yield from (((line, "dim"),) for line in fold(words, width, 2))
        yield from paragraphs([_fit_row(fit) for fit in family["fits"]], width)
    if (own := content["calibration"]) is not None:
        yield ()
        yield title("calibration", own["file"])
        yield from paragraphs([(key, value) for key, value in own["provenance"].items()], width)
        yield from paragraphs(
            [
                (
                    r["of"],
                    f"measured / modelled {r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f}), {r['count']} points",
                )
                for r in own["ratios"]
            ],
            width,
        )
    yield ()
    yield title("certainty of time", "standard deviations (sim/report/certainty.py)")
    yield from paragraphs([(m["key"], value_words(m["value"]), (m["from"], "dim")) for m in content["time"]], width)
    yield ()
    yield title("certainty of memory", "sim/memory/confidence.py")
    yield from paragraphs([(m["key"], value_words(m["value"]), (m["from"], "dim")) for m in content["memory"]], width)
    if content["warnings"]:
        yield ()
        yield title("Assumed, extrapolated or not modelled")
        for words in content["warnings"]:
            yield from ((line,) for line in fold(f"- {words}", width, 2, hang=2))


def _fit_row(fit: Mapping[str, Any]) -> tuple[Cell, ...]:
    if "median_abs" in fit:
        words = (
            f"median error {fit['median_abs']:.1%}, mean {fit['mean_signed']:+.1%}, "
            f"nine in ten within {fit['p90_abs']:.1%}, {fit['count']:,} points"
        )
        return (fit["of"], words)
    value = fit["value"]
    words = f"{value:g}" if isinstance(value, float) else str(value)
    return (fit["of"], f"{words}, {fit['kind']}" + (f": {fit['source']}" if fit.get("source") else ""))


def value_words(value: Any) -> str:
    """Return a value as the scenario file would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and abs(value) >= 10**15:
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
