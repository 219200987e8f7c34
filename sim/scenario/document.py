"""From a file to plain values that know their lines.

YAML is read by libyaml's events and our own small walk: so nothing is constructed that the file names, aliases
cannot explode, nesting has an end, duplicate keys are found, and the traps of YAML 1.1 are closed (``no`` is a text,
``1:30`` is a text, ``1e12`` is a number), as in YAML 1.2's core schema.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import yaml

from sim.errors import Finding
from sim.interop.values import Path, Problem, dotted

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_VALUES = 20_000

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]{0,30}(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OUR_TAGS = {
    None,
    "!",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq", "int", "float", "bool", "null")),
}


_SCHEMAS = {"a plan": "plan"}
"""What a kind of file is called where that is not a scenario."""


class UnreadableError(Exception):
    """A file that cannot be read at all. Carries the one finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass(slots=True)
class Document:
    """Plain values of a file, and the line of each path in it. ``origin`` names what is not of the file itself."""

    file: str
    data: dict[str, Any]
    lines: dict[Path, int]
    origin: dict[Path, str] = field(default_factory=dict)

    def finding(self, problem: Problem) -> Finding:
        """Return the problem with its place: the longest prefix of its path that the document knows."""
        path = problem.path
        for end in range(len(path), -1, -1):
            if path[:end] in self.origin:
                return Finding(self.origin[path[:end]], 0, problem.problem, problem.remedy)
            if path[:end] in self.lines:
                return Finding(self.file, self.lines[path[:end]], problem.problem, problem.remedy)
        return Finding(self.file, 0, problem.problem, problem.remedy)


# --- bytes to text -------------------------------------------------------------------------------


def read_text(path: FilePath, shown: str, what: str = "a scenario", max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return the text of a file. Raises UnreadableError; a file that is too large is refused by its size, unread."""

    def refuse(problem: str, remedy: str, line: int = 0) -> UnreadableError:
        return UnreadableError(Finding(shown, line, problem, remedy))

    try:
        if path.is_dir():
            raise refuse("is a directory", f"name the file that holds {what}")
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise refuse(
                f"is {num_bytes / 1e6:.1f} MB large; sim reads at most {max_bytes / 1e6:g} MB",
                f"name the file that holds {what}",
            )
        if not path.is_file():
            raise refuse("is not a regular file", f"name the file that holds {what}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise refuse("no such file", _look_around(path)) from None
    except PermissionError:
        raise refuse("may not be read", f"allow it: chmod u+r {shown}") from None
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", None)
        reason = (
            "the name is too long" if code == errno.ENAMETOOLONG else getattr(error, "strerror", None) or str(error)
        )
        raise refuse(f"cannot be read: {reason}", "") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refuse(f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8 text", line) from None


def _look_around(path: FilePath) -> str:
    from sim.interop.values import either, near

    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml", ".json")][:500]
    except OSError:
        return f"there is no directory {path.parent} either"
    close = near(path.name, beside)
    return f"did you mean {either(close)}?" if close else "check the path; it is relative to the current directory"


# --- YAML ----------------------------------------------------------------------------------------


class _Node(NamedTuple):
    line: int
    value: Any
    """A scalar, a list of nodes, or a list of (key node, value node) for a mapping."""
    kind: str
    """scalar | list | mapping"""


def parse_yaml(
    text: str, file: str, findings: list[Finding], what: str = "a scenario", max_values: int = MAX_VALUES
) -> Document:
    """Return the mapping that a YAML text holds. Raises UnreadableError; duplicate keys are findings."""
    root = _tree(text, file, what)
    if root.kind == "scalar" and root.value is None:
        raise UnreadableError(
            Finding(file, 0, "is empty", f"see 'sim schema {_SCHEMAS.get(what, 'scenario')}' for what {what} holds")
        )
    if root.kind != "mapping":
        kind = "a list" if root.kind == "list" else f"the text {root.value!r:.40}"
        raise UnreadableError(
            Finding(file, root.line, f"holds {kind}; {what} is a mapping of keys to values", "begin with 'model: ...'")
        )
    lines: dict[Path, int] = {}
    budget = [max_values, max_values]
    data = _plain(root, (), lines, budget, file, findings)
    return Document(file, data, lines)


def parse_value(text: str) -> Any:
    """Return the value that a short YAML text stands for ("8", "[2, 3]", "{memory: 80 GiB}")."""
    if not text.strip():
        return None
    root = _tree(text, "--set", "a value")
    return _plain(root, (), {}, [MAX_VALUES, MAX_VALUES], "--set", [])


def _tree(text: str, file: str, what: str) -> _Node:  # noqa: PLR0912, PLR0915 - one branch for each event
    """Return the tree of one YAML document, refusing what is no such thing at the first sign."""

    def refuse(line: int, problem: str, remedy: str) -> UnreadableError:
        return UnreadableError(Finding(file, line, problem, remedy))

    open_: list[tuple[_Node, list[Any]]] = []
    anchors: dict[str, _Node] = {}
    root: _Node | None = None
    documents = 0
    loader: Any = None
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        while loader.check_event():
            event = loader.get_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise refuse(line, "holds more than one YAML document", "remove the line '---' and what follows it")
                continue
            if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                node, children = open_.pop()
                if node.kind == "mapping":
                    node.value.extend(zip(children[::2], children[1::2], strict=True))
                else:
                    node.value.extend(children)
                continue
            if isinstance(event, yaml.AliasEvent):
                found = anchors.get(event.anchor or "")
                if found is None:
                    raise refuse(line, f"alias *{event.anchor} has no anchor before it", f"write &{event.anchor} first")
                if any(found is node for node, _ in open_):
                    raise refuse(line, f"alias *{event.anchor} contains itself", "write the value out")
                new = found
            elif isinstance(event, yaml.ScalarEvent):
                _check_tag(event, refuse, line)
                plain = not event.style and event.tag not in ("!", "tag:yaml.org,2002:str")
                new = _Node(line, _scalar(event.value) if plain else event.value, "scalar")
            elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
                _check_tag(event, refuse, line)
                new = _Node(line, [], "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping")
            else:
                continue
            if open_:
                open_[-1][1].append(new)
            else:
                root = new
            if not isinstance(event, yaml.AliasEvent):
                if event.anchor:
                    anchors[event.anchor] = new
                if new.kind != "scalar":
                    open_.append((new, []))
                    if len(open_) > MAX_DEPTH:
                        raise refuse(line, f"is nested more than {MAX_DEPTH} deep", f"{what} needs four levels")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise refuse(mark.line + 1 if mark else 0, *_yaml_words(error, text)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 0
        raise refuse(line, "is not YAML: it holds a control character", "save it as plain text") from None
    except (yaml.YAMLError, UnicodeEncodeError):
        raise refuse(0, "is not YAML", "save it as plain text") from None
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        raise refuse(0, "is empty", f"see 'sim schema {_SCHEMAS.get(what, 'scenario')}' for what {what} holds")
    return root


def _check_tag(event: Any, refuse: Any, line: int) -> None:
    if event.tag not in _OUR_TAGS:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        raise refuse(line, f"tag {tag} is not read here", "write the value without a tag")


def _yaml_words(error: yaml.MarkedYAMLError, text: str) -> tuple[str, str]:  # noqa: PLR0911 - a table of causes
    """Return libyaml's complaint and a remedy for the usual causes."""
    problem = (error.problem or "unreadable").strip()
    if "cannot start any token" in problem and error.problem_mark is not None:
        lines = text.split("\n")
        at = (
            lines[error.problem_mark.line][error.problem_mark.column :][:1]
            if error.problem_mark.line < len(lines)
            else ""
        )
        if at == "\t":
            return "is not YAML: a tab where spaces belong", "indent with spaces"
        return f"is not YAML: a value cannot begin with {at!r}", "quote the value"
    if "mapping values are not allowed" in problem:
        at_line = error.problem_mark.line if error.problem_mark is not None else 0
        above = text.split("\n")[at_line - 1] if at_line else ""
        if re.match(r"\s*[\w.-]+:[^\s/:]", above):
            return f"is not YAML: line {at_line} has no space after its colon", "write 'key: value'"
        return "is not YAML: a second ': ' in one line", "quote the value, or begin a new line"
    if "could not find expected ':'" in problem:
        return "is not YAML: a key without ': '", "write 'key: value', with a space after the colon"
    if "end, but found" in problem or "expected <block end>" in problem or "block mapping" in (error.context or ""):
        return "is not YAML: the indentation does not fit the lines above", "indent keys of one level alike"
    if "flow" in (error.context or "") or "expected ',' or" in problem:
        return "is not YAML: a bracket is not closed", "close it, with commas between the values"
    if "quoted scalar" in (error.context or ""):
        return "is not YAML: a quotation mark is not closed", "close it"
    return f"is not YAML: {problem}", ""


def _scalar(text: str) -> Any:
    """Return what a plain scalar means in YAML 1.2's core schema; ``1_000`` is a number too."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if text[0] in "+-.0123456789":
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text) and not (text.lstrip("+-").startswith("0") and text.lstrip("+-")[1:2].isdigit()):
            return float(text)
    return text


def _plain(
    node: _Node, path: Path, lines: dict[Path, int], budget: list[int], file: str, findings: list[Finding]
) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise UnreadableError(Finding(file, 0, f"holds more than {budget[1]} values", "write fewer aliases and values"))
    if len(path) > MAX_DEPTH:
        raise UnreadableError(Finding(file, node.line, f"is nested more than {MAX_DEPTH} deep", "write fewer aliases"))
    if path not in lines:
        lines[path] = node.line
    if node.kind == "scalar":
        return node.value
    if node.kind == "list":
        return [_plain(child, (*path, str(i)), lines, budget, file, findings) for i, child in enumerate(node.value)]
    plain: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.kind != "scalar":
            findings.append(Finding(file, key_node.line, "a key is a list or a mapping", "write a word as the key"))
            continue
        key = _key(key_node.value)
        at = (*path, key)
        if key == "<<":
            findings.append(Finding(file, key_node.line, "merge keys (<<) are not read", "write the keys out"))
            continue
        if key in plain:
            findings.append(
                Finding(
                    file, key_node.line, f"{dotted(at)} is given twice, first in line {lines[at]}", "remove one of them"
                )
            )
            continue
        lines[at] = key_node.line
        plain[key] = _plain(value_node, at, lines, budget, file, findings)
    return plain


def _key(value: Any) -> str:
    """Return a key as a text, whatever YAML takes it for."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# --- JSON ----------------------------------------------------------------------------------------


def parse_json(text: str, file: str, what: str) -> Document:
    """Return the mapping that a JSON text holds. Raises UnreadableError. Lines are found where a key first stands."""
    if not text.strip():
        raise UnreadableError(Finding(file, 0, "is empty", f"name the file that holds {what}"))
    twice: list[str] = []

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(items)
        if len(plain) < len(items):
            keys = [key for key, _ in items]
            twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return plain

    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UnreadableError(Finding(file, error.lineno, *_json_words(text, error))) from None
    except (RecursionError, ValueError):
        raise UnreadableError(Finding(file, 0, "is not JSON", f"name the file that holds {what}")) from None
    if twice:
        line = _line_of(text, twice[0], last=True)
        raise UnreadableError(Finding(file, line, f"{twice[0]} is given twice", "remove one of them"))
    if not isinstance(data, dict):
        raise UnreadableError(Finding(file, 1, "holds no mapping of keys to values", "begin with {"))
    if _depth(data) > MAX_DEPTH:
        raise UnreadableError(
            Finding(file, 0, f"is nested more than {MAX_DEPTH} deep", f"name the file that holds {what}")
        )
    return Document(file, data, _JsonLines(text))


class _JsonLines(dict[Path, int]):
    """Lines of a JSON text, looked up only when something is wrong: each key of a path after the one before it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def __contains__(self, path: object) -> bool:
        return isinstance(path, tuple) and (not path or self._position(path) >= 0)

    def __getitem__(self, path: Path) -> int:
        return self._text.count("\n", 0, max(0, self._position(path))) + 1

    def _position(self, path: Path) -> int:
        position = 0
        for key in path:
            found = re.compile(re.escape(json.dumps(key)) + r"\s*:").search(self._text, position)
            if found is None:
                return -1
            position = found.end()
        return position


def _line_of(text: str, key: str, last: bool = False) -> int:
    quoted = json.dumps(key)
    position = text.rfind(quoted) if last else text.find(quoted)
    return text.count("\n", 0, max(0, position)) + 1


def _depth(value: Any, depth: int = 1) -> int:
    if depth > MAX_DEPTH + 1:
        return depth
    if isinstance(value, Mapping):
        return max((_depth(child, depth + 1) for child in value.values()), default=depth)
    if isinstance(value, list):
        return max((_depth(child, depth + 1) for child in value), default=depth)
    return depth


def _json_words(text: str, error: json.JSONDecodeError) -> tuple[str, str]:  # noqa: PLR0911 - a table of causes
    rest = text[error.pos : error.pos + 2]
    before = text[: error.pos].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "is not JSON: it has a comment", "JSON has no comments; remove it"
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return "is not JSON: a comma before the closing bracket", "remove the comma"
    if error.msg.startswith("Illegal trailing comma"):
        return "is not JSON: a comma before the closing bracket", "remove the comma"
    if rest.startswith("'"):
        return "is not JSON: a text in single quotation marks", 'write "..."'
    if rest[:1] in ("T", "F", "N"):
        return "is not JSON: True, False and None are Python's words", "write true, false or null"
    if not rest.strip():
        return "is not JSON: it ends too early", "close every bracket"
    words = error.msg[0].lower() + error.msg[1:]
    return f"is not JSON: {words}", "check the punctuation there and in the line before"
