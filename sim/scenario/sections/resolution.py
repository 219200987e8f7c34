"""What the readers of a scenario's sections share: the document, the draft, what is wrong, whence each default is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, TypeVar

from sim.errors import Finding, ScenarioError
from sim.interop.values import Problem, dotted
from sim.scenario.document import Document, UnreadableError, parse_json, read_text
from sim.scenario.draft import Draft

T = TypeVar("T")

OWN_DEFAULT = "sim's default"
"""Source of a value that is left out and that no framework has a default for."""
EIGHT_BIT = ("fp8", "mxfp8", "nvfp4")
"""Precisions whose products are of 8 or 4 bits; all else stays in bf16, so a ds_config beside them says bf16."""


class Resolution:
    """What the readers of the sections share: the document, and what was found in it so far.

    ``findings``  wrong, with their line (of any file that the document names)
    ``problems``  wrong, with their key; the document knows its line
    ``sources``   key -> where a value that the document does not give comes from
    ``written``   how the section ``cluster`` names what the catalogue or a file has
    ``ds_name``   what messages call DeepSpeed's settings: their file, or the section
    """

    def __init__(self, doc: Document, folder: FilePath, findings: list[Finding]) -> None:
        self.doc = doc
        self.folder = folder
        self.findings = findings
        self.problems: list[Problem] = []
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []
        self.written: dict[str, Any] = {}
        self.draft = Draft()
        self.ds_name = "deepspeed"


def path_of(r: Resolution, text: str) -> FilePath:
    """Return a path named in the document: relative ones are relative to its folder."""
    path = FilePath(text).expanduser() if text.startswith("~/") else FilePath(text)
    return path if path.is_absolute() else r.folder / path


def read_json(r: Resolution, path: FilePath, what: str, at: tuple[str, ...]) -> Document | None:
    """Return the document of a JSON file that the scenario names under the key ``at``, or None with a finding.

    ``what`` it holds, in words for messages.
    """
    try:
        return parse_json(read_text(path, shown(path), what), shown(path), what)
    except UnreadableError as error:
        add_finding(r, error.finding, at)
        return None


def add_finding(r: Resolution, finding: Finding, at: tuple[str, ...]) -> None:
    """Add what is wrong in another file; where that is the file itself, say who names it."""
    if finding.line:
        r.findings.append(finding)
    else:
        r.problems.append(Problem(at, f"{finding.file}: {finding.problem}", finding.remedy))


def users_file(r: Resolution, read: Callable[[], T], at: tuple[str, ...]) -> T | None:
    """Return what a reader of the catalogue makes of a user's own file, named under the key ``at``, or None with a
    finding."""
    try:
        return read()
    except ScenarioError as error:
        for finding in error.findings:
            add_finding(r, dataclasses.replace(finding, file=shown(FilePath(finding.file))), at)
    except (KeyError, OSError, ValueError) as error:
        r.problems.append(Problem(at, f"{dotted(at)}: {str(error)[:200]}", "check the file"))
    return None


def is_path(text: str) -> bool:
    """Whether a text names a file and not an entry of the catalogue."""
    return "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def exists(path: FilePath) -> bool:
    """Whether there is such a file or folder; a name that no file can have is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def shown(path: FilePath) -> str:
    """Return a path as messages show it: relative to the current directory where that is shorter."""
    try:
        return str(path.relative_to(FilePath.cwd()))
    except ValueError:
        return str(path)


def plain(value: object) -> str:
    """Return a value as YAML would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
