"""Files of measured runs: what someone really measured, beside the scenario that it was.

A file is a ``source`` (who, where) and a list of ``runs``; the keys of a run are ``RUN_KEYS``. Everything wrong with
the form of the files is reported at once. Whether a run's scenario can be simulated is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import Finding, ScenarioError
from sim.interop.values import (
    Key,
    Problem,
    WrongValueError,
    boolean,
    integer,
    mapping_schema,
    number,
    read_mapping,
    show,
    text,
)
from sim.interop.values import Path as Keys
from sim.scenario.document import Document, UnreadableError, parse_yaml, read_text
from sim.validation.assumed import read_assumed

MAX_FILE_BYTES = 32_000_000
MAX_VALUES = 2_000_000
WHAT = "measured runs"

QUANTITIES = (
    "step_time_s",
    "tokens_per_s_per_gpu",
    "model_flops_per_s_per_gpu",
    "mfu",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_device_bytes",
    "fits",
)
"""What a run may have measured, in the order in which it is printed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run. ``measured`` has the known ones of ``QUANTITIES``, in their order."""

    id: str
    file: str
    line: int
    folder: str
    scenario: dict[str, Any]
    measured: dict[str, float | bool]
    cite: str
    assumed: tuple[str, ...]
    flops_formula: str
    notes: str
    pipeline_rank: int | None = None
    """Whose memory was measured, where it is not the fullest rank's."""
    at_peak: Mapping[str, int] | None = None
    """Allocated bytes at the peak by category, where the source has them."""
    snapshot: str = ""
    """A real memory snapshot, relative to the file's folder."""
    taken: tuple[tuple[tuple[str, ...], object], ...] = ()
    """Keys of ``scenario`` that are as ``assumed`` has them (``assumed.py``): values, or None for sim's default."""


@dataclass(frozen=True, slots=True)
class RunsFile:
    """The runs of one file; ``name`` is the file's name without its ending."""

    file: str
    name: str
    source: dict[str, Any]
    runs: tuple[Run, ...]


def read_runs(paths: Sequence[Path]) -> tuple[RunsFile, ...]:
    """Return the files of measured runs that the paths name; a directory stands for every YAML file below it.

    Raises ScenarioError with what is wrong in all of them.
    """
    findings: list[Finding] = []
    files = tuple(read for path in _files(paths, findings) if (read := _read(path, findings)) is not None)
    if findings:
        raise ScenarioError(findings)
    return files


def _files(paths: Sequence[Path], findings: list[Finding]) -> Iterator[Path]:
    """Yield each file once, in the order of the arguments, those of a directory by name."""
    seen: set[Path] = set()
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if entry.suffix in (".yaml", ".yml") and entry.is_file())
            if not found:
                findings.append(Finding(str(path), 0, "holds no YAML file", "name files of measured runs"))
        for file in found:
            if (resolved := file.resolve()) not in seen:
                seen.add(resolved)
                yield file


def _read(path: Path, findings: list[Finding]) -> RunsFile | None:
    shown = str(path)
    try:
        document = parse_yaml(
            read_text(path, shown, WHAT, MAX_FILE_BYTES), shown, findings, "a file of measured runs", MAX_VALUES
        )
    except UnreadableError as error:
        findings.append(error.finding)
        return None
    problems: list[Problem] = []
    values, wrong = read_mapping(document.data, FILE_KEYS, (), problems)
    runs = () if "runs" in wrong else tuple(_runs(values["runs"], document, str(path.parent), problems))
    findings.extend(document.finding(problem) for problem in problems)
    return RunsFile(shown, path.stem, values.get("source", {}), runs)


def _runs(given: Sequence[object], document: Document, folder: str, problems: list[Problem]) -> Iterator[Run]:
    lines: dict[str, int] = {}
    for index, row in enumerate(given):
        at: Keys = ("runs", str(index))
        line = document.lines.get(at, 0)
        if not isinstance(row, Mapping):
            problems.append(
                Problem(at, f"run {index + 1} is {show(row)}", "write a mapping with id, scenario, measured")
            )
            continue
        mine: list[Problem] = []
        values, wrong = read_mapping(row, RUN_KEYS, (), mine)
        name = values.get("id", f"{index + 1}")
        if "id" in values and lines.setdefault(name, line) != line:
            mine.append(Problem(("id",), f"another run has this id, in line {lines[name]}", "give each run its own"))
        measured: dict[str, Any] = {}
        if "measured" not in wrong:
            measured, bad = read_mapping(values["measured"], MEASURED_KEYS, ("measured",), mine)
            if not bad and "exact" not in values and not any(quantity in measured for quantity in QUANTITIES):
                mine.append(Problem(("measured",), "nothing is measured", f"write one of: {', '.join(QUANTITIES)}"))
        problems.extend(Problem((*at, *p.path), f"run {name}: {p.problem}", p.remedy) for p in mine)
        if mine:
            continue
        assumed = tuple(values.get("assumed", ()))
        scenario, taken = read_assumed(values["scenario"], assumed)
        yield Run(
            id=name,
            file=document.file,
            line=line,
            folder=folder,
            scenario=scenario,
            measured={quantity: measured[quantity] for quantity in QUANTITIES if quantity in measured},
            cite=values.get("cite", ""),
            assumed=assumed,
            flops_formula=values.get("flops_formula", ""),
            notes=values.get("notes", ""),
            pipeline_rank=measured.get("pipeline_rank"),
            at_peak=measured.get("at_peak"),
            snapshot=measured.get("snapshot", ""),
            taken=taken,
        )


# --- the form ------------------------------------------------------------------------------------


def _mapping(doc: str, required: bool = False, schema: Mapping[str, Any] | None = None) -> Key:
    """A mapping that somebody else reads."""

    def read(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongValueError(f"{show(value)} is not a mapping", "write keys under it")
        return value

    return Key(read, dict(schema or {"type": "object"}), doc, required)


def _list(doc: str, items: Mapping[str, Any], required: bool = False) -> Key:
    def read(value: object) -> list[Any]:
        if not isinstance(value, list):
            raise WrongValueError(f"{show(value)} is not a list", "begin each entry with '- '")
        return value

    return Key(read, {"type": "array", "items": dict(items)}, doc, required)


def _words(doc: str) -> Key:
    """A list of texts; whatever stands in it is shown as it is."""
    spec = _list(doc, {"type": "string"})

    def read(value: object) -> list[str]:
        return [str(entry) for entry in spec.read(value)]

    return spec._replace(read=read)


def _positive(doc: str, most: float, example: str) -> Key:
    spec = number(0.0, most, example, doc)

    def read(value: object) -> float:
        if spec.read(value) == 0:
            raise WrongValueError("0 is no measurement", "leave out what is not known")
        return float(value)  # type: ignore[arg-type]

    return Key(read, {"type": "number", "exclusiveMinimum": 0, "maximum": most}, doc)


def _note(doc: str) -> Key:
    return text("a text", "a sentence", doc)


_CATEGORIES: dict[str, Key] = {
    name: integer(0, 10**14, 13476831232, f"Bytes of {words}.")
    for name, words in (
        ("parameters", "parameters"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer states and fp32 masters"),
        ("activations", "what backward needs, and inputs"),
        ("buffers", "buffers, workspaces, buckets"),
        ("temporary", "temporaries"),
    )
}


def _categories(value: object) -> dict[str, int]:
    problems: list[Problem] = []
    read, _ = read_mapping(value, _CATEGORIES, ("at_peak",), problems)
    if problems:
        raise WrongValueError(problems[0].problem, problems[0].remedy)
    return read


MEASURED_KEYS: dict[str, Key] = {
    "step_time_s": _positive("Seconds of one optimizer step.", 1e7, "4.31"),
    "tokens_per_s_per_gpu": _positive("Tokens of all ranks in a second, over the number of GPUs.", 1e12, "2115"),
    "model_flops_per_s_per_gpu": _positive("FLOP/s of one GPU, counted by flops_formula.", 1e18, "398e12"),
    "mfu": _positive("Model FLOPs utilisation, a fraction.", 2.0, "0.42"),
    "peak_allocated_bytes": _positive("torch.cuda.max_memory_allocated of the fullest rank.", 1e14, "71457518387"),
    "peak_reserved_bytes": _positive("torch.cuda.max_memory_reserved of the fullest rank.", 1e14, "88476326297"),
    "peak_device_bytes": _positive("What nvidia-smi shows for the fullest GPU.", 1e14, "67000000000"),
    "fits": boolean("false where it ran out of memory."),
    "pipeline_rank": integer(0, 4096, 3, "Whose memory it is, from 0; the fullest rank's if left out."),
    "at_peak": Key(_categories, mapping_schema(_CATEGORIES), "Allocated bytes at the peak by category, in bytes."),
    "snapshot": text("a path", "the path of a pickle of torch.cuda.memory._dump_snapshot",
                     "A real memory snapshot beside the file, for --plot."),
    "memory_note": _note("Which memory the source means; for people."),
}  # fmt: skip
RUN_KEYS: dict[str, Key] = {
    "id": text("a name", "a word that no other run of the file has", "One word.", required=True),
    "scenario": _mapping("The scenario that it was.", True, {"$ref": "#/$defs/scenario"}),
    "measured": _mapping("What is known.", True, mapping_schema(MEASURED_KEYS)),
    "cite": _note("Where in the source."),
    "assumed": _words("What the source does not say and the scenario had to guess."),
    "flops_formula": _note("How the source counts FLOPs, where a figure depends on it."),
    "notes": _note("For people."),
    "hardware_note": _note("For people."),
    "memory_note": _note("For people."),
    "exact": _mapping("What validation/real/measure.py counted to the byte; for people and other programs."),
}
_RUN_SCHEMA = mapping_schema(RUN_KEYS)
FILE_KEYS: dict[str, Key] = {
    "source": _mapping("Who measured, and where it is published: title, url, table, date, ...", True),
    "runs": _list("The runs.", _RUN_SCHEMA, True),
}


def runs_schema(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a file of measured runs, given that of a scenario."""
    inner = {key: value for key, value in scenario.items() if key not in ("$schema", "$id", "$defs")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sim runs",
        "description": "Measured runs, each beside the scenario that it was.",
        **mapping_schema(FILE_KEYS),
        "$defs": {**scenario.get("$defs", {}), "scenario": inner},
    }
