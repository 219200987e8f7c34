"""What a person reads: within the width, nothing after a line's last character, numbers aligned."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import report_scenarios
from report_scenarios import answered
from rich.text import Text

from sim.report.layout import Screen, fold, grid, paragraphs, plain
from sim.report.markdown import to_markdown
from sim.report.rows import account, headline, moment, ranks_words
from sim.report.tables import bar, print_report, print_warnings

EVERY = pytest.mark.parametrize("name", report_scenarios.TEXTS)


@dataclass(frozen=True)
class Tried:
    words: str
    overrides: tuple[str, ...]
    fits: bool
    peak_device_bytes: int = 30 * 2**30
    time_s: float = 1.5

    def to_dict(self) -> dict[str, Any]:
        return {"change": self.words}


REMEDIES = (
    Tried("ZeRO-3, recompute and microbatches of 1", ("framework=deepspeed", "parallelism.zero=3"), True),
    Tried("twice the nodes (2)", ("cluster.num_nodes=2", "deepspeed.zero_optimization.reduce_bucket_size=5"), True),
)


def printed(name: str, width: int, colour: bool = False) -> str:
    simulation = answered(name)
    file = io.StringIO()
    remedies = () if simulation.report.fits else REMEDIES
    print_report(Screen(file, width, colour), simulation.scenario, simulation.report, remedies)
    return file.getvalue()


@EVERY
@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits_and_ends_with_its_last_character(name, width):
    for line in printed(name, width).splitlines():
        assert len(line) <= width, line
        assert line == line.rstrip()


@EVERY
def test_no_colours_where_nobody_sees_them_and_the_same_text_where_somebody_does(name, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    bare = printed(name, 100)
    coloured = printed(name, 100, colour=True)
    assert "\x1b" not in bare
    assert "\x1b[" in coloured
    assert Text.from_ansi(coloured).plain.rstrip("\n") == bare.rstrip("\n")


def test_the_account_stands_in_one_column():
    lines = printed("zero_3", 80).splitlines()
    start = lines.index("Memory of the fullest GPU at its peak")
    ends = {line.index("%") for line in lines[start:] if "%" in line}
    assert len(ends) == 1


def test_what_does_not_fit_says_so_and_what_would():
    text = printed("too_large", 80)
    assert "does not fit" in text
    assert "Out of memory" in text
    assert "--set framework=deepspeed --set parallelism.zero=3" in text
    assert text.index("What makes it fit") < text.index("Time of a step")


def test_the_totals_of_the_account_are_sums_of_what_stands_above_them():
    total = 0
    for row in account(answered("zero_3").report.fullest):
        if row.total:
            assert row.num_bytes == total, row.name
        else:
            total += row.num_bytes


def test_the_headline_counts_in_whole_words():
    words = headline(answered("zero_3").scenario, answered("zero_3").report)
    assert words.machine == "16 h100-sxm-80gb (2 x dgx-h100)"
    assert words.layout.startswith("deepspeed ZeRO-3 · dp 16 · bf16 · adamw · full recompute")
    assert words.job == "64 sequences of 512 tokens a step · 4 microbatches of 1 on each rank"


def test_markdown_has_every_section_and_table_rows_of_one_length():
    simulation = answered("too_large")
    text = to_markdown(simulation.scenario, simulation.report, REMEDIES)
    for heading in (
        "# ",
        "## Memory",
        "## Who holds most",
        "## What would make it fit",
        "## Time",
        "## What was assumed",
    ):
        assert f"\n{heading}" in f"\n{text}"
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.split("\n") if line.startswith("|")}) == 1
    assert "![memory over the step](memory.png)" in text


def test_warnings_are_paragraphs_with_a_hanging_indent():
    file = io.StringIO()
    print_warnings(Screen(file, 80), ["word " * 40, "short"])
    lines = file.getvalue().splitlines()
    assert lines[2].startswith("  - word")
    assert lines[3].startswith("    word")
    assert lines[-1] == "  - short"


def test_moments_read_as_words():
    assert moment("backward", "block.3") == "backward of block.3"
    assert moment("backward", "end") == "end of backward"
    assert moment("optimizer", "optimizer") == "optimizer"
    assert moment("optimizer", "norm") == "optimizer (norm)"


def test_ranks_in_few_words():
    assert ranks_words((3,)) == "3"
    assert ranks_words(tuple(range(8))) == "0-7"
    assert ranks_words((0, 8)) == "0 8"
    assert ranks_words((0, 8, 16, 24, 32)) == "0 8 16 and 2 more"


@pytest.mark.parametrize(("part", "cells"), [(0.0, 0), (0.5, 5), (1.0, 10), (1.7, 10), (0.55, 6)])
def test_a_bar_is_as_long_as_its_part(part, cells):
    assert len(bar(part, 10).rstrip()) == cells


def test_columns_give_up_a_blank_before_they_overflow():
    rows = [("a" * 10, "1"), ("b", "22")]
    assert [plain(line) for line in grid(rows, "lr", 16)] == [
        "  " + "a" * 10 + "   1",
        "  b" + " " * 11 + "22",
    ]
    assert [plain(line) for line in grid(rows, "lr", 15)] == ["  " + "a" * 10 + "  1", "  b" + " " * 10 + "22"]


def test_prose_wraps_in_its_column_and_below_it_where_that_is_narrow():
    rows = [("key", "value", "one two three four five six seven eight nine ten")]
    wide = [plain(line).rstrip() for line in paragraphs(rows, 50)]
    assert wide[0].startswith("  key  value  one two")
    assert all(line.startswith(" " * 14) for line in wide[1:])
    assert max(map(len, wide)) <= 50
    narrow = [plain(line).rstrip() for line in paragraphs(rows, 30)]
    assert narrow[1].startswith("      one two")


def test_an_option_is_never_broken():
    (line,) = fold("--set\0a.very.long.key=value", 10, 4)
    assert line == "    --set\0a.very.long.key=value"
