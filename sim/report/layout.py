"""Aligned lines for a terminal: columns that fit the width, and nothing after the last character of a line."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

Cell = str | tuple[str, str]
"""Text, or (text, style)."""
Line = tuple[Cell, ...]
"""Pieces of one line."""
_ASCII = str.maketrans({"·": "-", "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "=", "▍": "-", "▎": "-", "▏": "-"})
MIN_LAST = 24
"""A last column narrower than this is set below its row instead."""


class Screen:
    """Where lines go. Colours only where somebody sees them; rich, which takes a while to load, only for these."""

    def __init__(self, file: TextIO, width: int | None = None, colour: bool | None = None) -> None:
        self._file = file
        self.width = shutil.get_terminal_size((80, 24)).columns if width is None else width
        self._colour = file.isatty() or bool(os.environ.get("FORCE_COLOR")) if colour is None else colour

    def show(self, lines: Iterable[Line]) -> None:
        """Print lines as they are: what does not fit runs on, it is never cut or wrapped in a column's middle.

        A terminal that cannot show more than ASCII gets it.
        """
        ascii_only = not (self._file.encoding or "utf").lower().startswith("utf")
        tidy = (_ascii(line) if ascii_only else line for line in lines)
        if not self._colour:
            self.write("".join(f"{plain(line).rstrip()}\n" for line in tidy))
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=self._file, highlight=False, width=self.width, force_terminal=True)
        for line in tidy:
            text = Text.assemble(*line)
            text.rstrip()
            console.print(text, soft_wrap=True)

    def write(self, text: str) -> None:
        """Print text as it is. If its reader has had enough (sim ... | head), the rest goes nowhere."""
        try:
            self._file.write(text)
            self._file.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())


def plain(line: Line) -> str:
    """Return the text of a line."""
    return "".join(map(_text, line))


def _ascii(line: Line) -> Line:
    return tuple((_text(c).translate(_ASCII).encode("ascii", "replace").decode(), _style(c)) for c in line)


def grid(rows: Sequence[Sequence[Cell]], justify: str, width: int, indent: int = 2) -> Iterator[Line]:
    """Yield rows with their columns aligned, two blanks apart, or one where two do not fit into ``width``.

    ``justify`` has a letter for each column: l, r.
    """
    widths = [max((len(_text(row[column])) for row in rows), default=0) for column in range(len(justify))]
    gap = 2 if indent + sum(widths) + 2 * (len(widths) - 1) <= width else 1
    for row in rows:
        pieces: list[Cell] = [" " * indent]
        for column, cell in enumerate(row):
            text = _text(cell)
            placed = text.rjust(widths[column]) if justify[column] == "r" else text.ljust(widths[column])
            pieces += [" " * gap if column else "", (placed, _style(cell))]
        yield tuple(pieces)


def paragraphs(rows: Sequence[Sequence[Cell]], width: int, indent: int = 2, most: int = 40) -> Iterator[Line]:
    """Yield rows whose columns are aligned to the left and whose last one is prose, wrapped within its column.

    Other columns wider than ``most`` push the rest of their row to the right. Where too little is left for the prose,
    it stands below its row.
    """
    count = max((len(row) for row in rows), default=0)
    widths = [
        min(most, max((len(_text(row[column])) for row in rows if column < len(row) - 1), default=0))
        for column in range(count - 1)
    ]
    start = indent + sum(widths) + 2 * len(widths)
    below = width - start < MIN_LAST
    for row in rows:
        pieces: list[Cell] = [" " * indent]
        for column, cell in enumerate(row[:-1]):
            pieces += [(_text(cell).ljust(widths[column]), _style(cell)), "  "]
        prose, style = _text(row[-1]), _style(row[-1])
        if below:
            yield tuple(pieces)
            yield from (((part, style),) for part in fold(prose, width, indent + 4))
            continue
        at = max(start, len(plain(tuple(pieces))))
        first, *rest = textwrap.wrap(
            prose, max(MIN_LAST, width - start), initial_indent=" " * (at - start), break_on_hyphens=False,
            break_long_words=False,
        ) or [""]  # fmt: skip
        yield (*pieces, (first.lstrip(), style))
        yield from ((" " * start, (part, style)) for part in rest)


def fold(words: str, width: int, indent: int, hang: int = 0) -> list[str]:
    """Return prose wrapped to ``width``, every line indented, all but the first by ``hang`` more."""
    return textwrap.wrap(
        words,
        max(width, indent + hang + MIN_LAST),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )


def title(words: str, rest: str = "") -> Line:
    """Return the line above a table."""
    return (words, "bold cyan"), (f"  {rest}" if rest else "", "dim")


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _style(cell: Cell) -> str:
    return "" if isinstance(cell, str) else cell[1]
