"""The words of a shell script, as far as they can be known without running it.

Launch scripts put their arguments into variables and arrays and expand them in one command at the end. Assignments
are carried out in the order in which they stand, those of branches where the condition holds; a condition that cannot
be known (files, ``$(commands)``, positional arguments) counts as one that may hold. ``$(commands)`` and positional
arguments without a default stay as they are written. What ``#SBATCH`` asks for is what Slurm tells the script.
Sources: POSIX, Shell Command Language, 2.2, 2.3, 2.6, 2.9.4; bash(1), Arrays, CONDITIONAL EXPRESSIONS; sbatch(1),
OUTPUT ENVIRONMENT VARIABLES.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_ASSIGNMENT = re.compile(r"(?:(?:export|local|readonly|declare(?:\s+-\w+)*)\s+)*([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(
    r"\$\(\((?P<sum>[^()]*(?:\([^()]*\)[^()]*)*)\)\)|\$\{(?P<braced>\w+)(?:\[[@*]\])?(?::?-(?P<default>[^{}]*))?\}|\$(?P<plain>\w+)"
)
_WHOLE_ARRAY = re.compile(r'"\$\{(\w+)\[@\]\}"')
"""An array in quotes is each of its elements as one word, and those have quotes of their own where they need any."""
_MAX_EXPANSIONS = 64
_MAX_TEXT = 200_000
_OPERATIONS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def words_of(
    script: str, environment: Mapping[str, str] | None = None, sourced: Callable[[str], str | None] = lambda name: None
) -> list[str]:
    """Return the words of the command with the most options, or of the whole text where there is no such command.

    A text without any command (the arguments alone, from a file) is that whole text. Variables that the script does not
    set are those of ``environment``. ``sourced`` returns the text of a file that the script reads in, if there is one.
    """
    return read_script(script, environment, sourced)[0]


def read_script(
    script: str, environment: Mapping[str, str] | None = None, sourced: Callable[[str], str | None] = lambda name: None
) -> tuple[list[str], dict[str, str]]:
    """Return the words of :func:`words_of`, and the variables that the script has set at its end."""
    outside = dict(environment or {})
    variables = _slurm(script)
    best: list[str] = []
    branches = _Branches()
    for statement in _with_sourced(script, lambda name: sourced(_expand(name, {**outside, **variables}))):
        known = {**outside, **variables}
        text = branches.enter(statement.strip(), known)
        if text is None:
            continue
        text = _WHOLE_ARRAY.sub(r"${\1[@]}", text)
        found = _ASSIGNMENT.fullmatch(text)
        if found and not _is_command(found[3]):
            name, append, value = found.groups()
            value = _expand(_unwrapped(value), known)
            variables[name] = f"{variables.get(name, '')} {value}" if append else value
            continue
        words = _split(_expand(text, known))
        if _options(words) > _options(best):
            best = words
    collected = [word for value in variables.values() for word in _split(value)]
    return (best if _options(best) >= _options(collected) else [*best, *collected]), variables


_SBATCH = re.compile(r"^#SBATCH\s+(--?[\w-]+)(?:[= ]\s*)(\S+)", re.MULTILINE)
_SLURM_NAMES = {
    "--nodes": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    "-N": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    "--ntasks-per-node": ("SLURM_NTASKS_PER_NODE",),
    "--gpus-per-node": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
    "--gres": ("SLURM_GPUS_ON_NODE",),
}


def _slurm(script: str) -> dict[str, str]:
    """Return what Slurm tells a job of what its ``#SBATCH`` lines ask for."""
    found: dict[str, str] = {}
    for option, value in _SBATCH.findall(script):
        number = value.rpartition(":")[2]  # gpu:a100:8
        if number.isdigit():
            found |= dict.fromkeys(_SLURM_NAMES.get(option, ()), number)
    if "SLURM_NNODES" in found and "SLURM_NTASKS_PER_NODE" in found:
        found["SLURM_NTASKS"] = str(int(found["SLURM_NNODES"]) * int(found["SLURM_NTASKS_PER_NODE"]))
    return found


_SOURCE = re.compile(r"(?:source|\.)\s+(\S+)")
_MAX_SOURCED = 16


def _with_sourced(script: str, sourced: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the statements of a script, those of the files that it reads in where it does."""
    left = [_statements(script)]
    files = 0
    while left:
        statement = next(left[-1], None)
        if statement is None:
            left.pop()
            continue
        found = _SOURCE.fullmatch(statement.strip())
        text = sourced(found[1]) if found and files < _MAX_SOURCED else None
        if text is None:
            yield statement
        else:
            files += 1
            left.append(_statements(text))


@dataclass(slots=True)
class _Branch:
    """An ``if`` or ``case`` that is open. ``done``: a branch of it was taken for certain."""

    live: bool
    done: bool
    case: str | None = None
    """The word of a ``case``."""
    patterns: list[str] = field(default_factory=list)


class _Branches:
    """Which statements are carried out."""

    def __init__(self) -> None:
        self._open: list[_Branch] = []

    def enter(self, statement: str, variables: dict[str, str]) -> str | None:
        """Return what of a statement is a plain one and is carried out; None if nothing is."""
        first, _, rest = statement.partition(" ")
        if first == "if":
            self._open.append(_Branch(True, False))
            self._next(_holds(rest, variables))
            return None
        if first == "case":
            word = _emptied(_expand(rest.strip().removesuffix(" in").removesuffix("\tin").strip(), variables))
            self._open.append(_Branch(False, False, " ".join(_split(word))))
            return None
        if self._open:
            if first == "elif":
                self._next(_holds(rest, variables))
                return None
            if first == "else":
                self._next(True)
                statement = rest.strip()
            elif first in ("fi", "esac"):
                self._open.pop()
                return None
            elif self._open[-1].case is not None:
                statement = self._case(self._open[-1], statement)
        while statement.startswith(("then ", "do ", "{ ")):
            statement = statement.partition(" ")[2].strip()
        return statement if all(branch.live for branch in self._open) else None

    def _next(self, holds: bool | None) -> None:
        branch = self._open[-1]
        branch.live = not branch.done and holds is not False
        branch.done = branch.done or holds is True

    def _case(self, branch: _Branch, statement: str) -> str:
        """Turn to the branch of a pattern, if the statement begins with one; alternatives come one by one before it."""
        if re.fullmatch(r"\(?[^()\s=]+", statement) and statement != ";;":
            branch.patterns.append(statement.strip("(\"'"))
            return ""
        found = re.match(r"\(?\s*([^()\s]+)\s*\)(.*)", statement, re.DOTALL)
        if not found:
            return statement
        patterns = [*branch.patterns, found[1].strip("\"'")]
        branch.patterns.clear()
        unknown = "$" in (branch.case or "")
        self._next(None if unknown else any(fnmatchcase(branch.case or "", pattern) for pattern in patterns))
        return found[2].strip()


_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt,
    "-ge": operator.ge,
}  # fmt: skip
_TEXTS: dict[str, Callable[[str, str], bool]] = {"=": operator.eq, "==": operator.eq, "!=": operator.ne}


def _holds(condition: str, variables: dict[str, str]) -> bool | None:
    """Return whether a test holds; None where that cannot be known. A variable that nobody sets is empty."""
    words = _split(_emptied(_expand(condition, variables)))
    negated = words[:1] == ["!"]
    words = words[negated:]
    if words[:1] == ["test"]:
        inner = words[1:]
    elif words[:1] in (["["], ["[["]) and words[-1] in ("]", "]]"):  # else it goes on after && or ||
        inner = words[1:-1]
    else:
        return None
    found = None if any("$" in word or "`" in word for word in inner) else _compared(inner)
    return found if found is None else found != negated


def _compared(words: list[str]) -> bool | None:
    match words:
        case ["-z" | "-n" as kind, *value] if len(value) <= 1:
            return bool(value and value[0]) == (kind == "-n")
        case [left, op, right] if op in _TEXTS:
            return _TEXTS[op](left, right)
        case [left, op, right] if op in _NUMBERS and left.lstrip("-").isdigit() and right.lstrip("-").isdigit():
            return _NUMBERS[op](int(left), int(right))
    return None


def _emptied(text: str) -> str:
    return re.sub(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", "", text)


def _options(words: list[str]) -> int:
    return sum(word.startswith("--") for word in words)


def _is_command(value: str) -> bool:
    """``VAR=1 python train.py``: an assignment for one command alone, which counts as that command."""
    text = value.strip()
    return not text.startswith(("(", '"', "'")) and len(text.split()) > 1 and "--" in text


def _unwrapped(value: str) -> str:
    """Return what an array's parentheses or a text's quotes hold."""
    text = value.strip()
    if text.startswith("(") and text.endswith(")"):
        return text[1:-1]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def _split(text: str) -> list[str]:
    text = re.sub(r"\$\(\(.*?\)\)", lambda found: found[0].replace(" ", ""), text)  # a sum that is not known
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # a quote that does not end: take the words as they stand
        return text.split()


def _expand(text: str, variables: dict[str, str]) -> str:
    def replaced(found: re.Match[str]) -> str:
        if found["sum"] is not None:
            return _arithmetic(_expand_names(found["sum"], variables)) or found[0]
        name = found["braced"] or found["plain"]
        if name in variables:
            return variables[name]
        return found["default"] if found["default"] is not None else found[0]

    for _ in range(_MAX_EXPANSIONS):
        expanded = _VARIABLE.sub(replaced, text)
        if expanded == text or len(expanded) > _MAX_TEXT:
            break
        text = expanded
    return text


def _expand_names(text: str, variables: dict[str, str]) -> str:
    """In arithmetic a variable may stand without its dollar."""
    return re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda found: variables.get(found[1], found[0]), text)


def _arithmetic(text: str) -> str:
    """Return the value of a sum of whole numbers, or "" where it is none."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    try:
        return str(value(ast.parse(text.strip().replace("/", "//"), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return ""


def _statements(script: str) -> Iterator[str]:
    """Yield what stands between newlines, ``;`` and ``&`` outside of quotes and parentheses, comments left out."""
    text = script.replace("\r\n", "\n")
    piece: list[str] = []
    quote, depth, i = "", 0, 0
    while i < len(text):
        char = text[i]
        if char == "\\" and text[i + 1 : i + 2] == "\n":  # not at the end of a comment: that one ends with its line
            piece.append(" ")
            i += 1
        elif quote:
            piece.append(char)
            if char == "\\" and quote == '"' and i + 1 < len(text):
                i += 1
                piece.append(text[i])
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
            piece.append(char)
        elif char == "#" and (not piece or piece[-1].isspace() or piece[-1] == "("):
            while i + 1 < len(text) and text[i + 1] != "\n":
                i += 1
        elif char == "\n" and depth > 0:
            piece.append(" ")
        elif char in "\n;&|" and depth == 0:
            yield "".join(piece)
            piece = []
        else:
            depth += (char == "(") - (char == ")" and depth > 0)
            piece.append(char)
        i += 1
    yield "".join(piece)
