"""Aligned lines for a terminal: columns that fit the width, and nothing after the last character of a line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | tuple[str, str]
"""Text, or (text, style)."""
_ASCII = str.maketrans({"·": "-", "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "=", "▍": "-", "▎": "-", "▏": "-"})
MIN_LAST = 24
"""A last column narrower than this is set below its row instead."""


def show(console: Console, lines: Iterable[Text]) -> None:
    """Print lines as they are: what does not fit runs on, it is never cut or wrapped in a column's middle.

    A terminal that cannot show more than ASCII gets it.
    """
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    for line in lines:
        text = line
        if ascii_only:
            text = Text(line.plain.translate(_ASCII).encode("ascii", "replace").decode(), spans=line.spans)
        text.rstrip()
        console.print(text, soft_wrap=True)


def grid(rows: Sequence[Sequence[Cell]], justify: str, width: int, indent: int = 2) -> Iterator[Text]:
    """Yield rows with their columns aligned, two blanks apart, or one where two do not fit into ``width``.

    ``justify`` has a letter for each column: l, r.
    """
    widths = [max((len(_text(row[column])) for row in rows), default=0) for column in range(len(justify))]
    gap = 2 if indent + sum(widths) + 2 * (len(widths) - 1) <= width else 1
    for row in rows:
        line = Text(" " * indent)
        for column, cell in enumerate(row):
            if column:
                line.append(" " * gap)
            text = _text(cell)
            padding = " " * (widths[column] - len(text))
            line.append(padding if justify[column] == "r" else "")
            line.append(text, style=_style(cell) or None)
            line.append("" if justify[column] == "r" else padding)
        yield line


def paragraphs(rows: Sequence[Sequence[Cell]], width: int, indent: int = 2, most: int = 40) -> Iterator[Text]:
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
        line = Text(" " * indent)
        for column, cell in enumerate(row[:-1]):
            line.append(_text(cell).ljust(widths[column]), style=_style(cell) or None)
            line.append("  ")
        prose, style = _text(row[-1]), _style(row[-1])
        if below:
            yield line
            yield from (Text(part, style=style) for part in fold(prose, width, indent + 4))
            continue
        at = max(start, len(line.plain))
        first, *rest = textwrap.wrap(
            prose,
            max(MIN_LAST, width - start),
            initial_indent=" " * (at - start),
            break_on_hyphens=False,
            break_long_words=False,
        ) or [""]
        line.append(first.lstrip(), style=style or None)
        yield line
        yield from (Text(" " * start + part, style=style) for part in rest)


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


def title(words: str, rest: str = "") -> Text:
    """Return the line above a table."""
    return Text.assemble((words, "bold cyan"), (f"  {rest}" if rest else "", "dim"))


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _style(cell: Cell) -> str:
    return "" if isinstance(cell, str) else cell[1]
