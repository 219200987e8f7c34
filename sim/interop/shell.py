"""The words of a shell script, as far as they can be known without running it.

Launch scripts put their arguments into variables and arrays and expand them in one command at the end. Assignments
are carried out in the order in which they stand, whatever branches surround them; ``$(commands)`` and positional
arguments without a default are not known and stay as they are written. Source: POSIX, Shell Command Language, 2.2,
2.3, 2.6; bash(1), Arrays.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping

_ASSIGNMENT = re.compile(r"(?:(?:export|local|readonly|declare(?:\s+-\w+)*)\s+)*([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(
    r"\$\(\((?P<sum>[^()]*(?:\([^()]*\)[^()]*)*)\)\)|\$\{(?P<braced>\w+)(?:\[[@*]\])?(?::?-(?P<default>[^{}]*))?\}|\$(?P<plain>\w+)"
)
_MAX_EXPANSIONS = 64
_MAX_TEXT = 200_000
_OPERATIONS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def words_of(script: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the words of the command with the most options, or of the whole text where there is no such command.

    A text without any command (the arguments alone, from a file) is that whole text. Variables that the script does not
    set are those of ``environment``.
    """
    outside = dict(environment or {})
    variables: dict[str, str] = {}
    best: list[str] = []
    for statement in _statements(script):
        found = _ASSIGNMENT.fullmatch(statement.strip())
        if found and not _is_command(found[3]):
            name, append, value = found.groups()
            value = _expand(_unwrapped(value), {**outside, **variables})
            variables[name] = f"{variables.get(name, '')} {value}" if append else value
            continue
        words = _split(_expand(statement, {**outside, **variables}))
        if _options(words) > _options(best):
            best = words
    collected = [word for value in variables.values() for word in _split(value)]
    return best if _options(best) >= _options(collected) else [*best, *collected]


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
    text = script.replace("\\\r\n", " ").replace("\\\n", " ")
    piece: list[str] = []
    quote, depth, i = "", 0, 0
    while i < len(text):
        char = text[i]
        if quote:
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
