"""Whatever happens to a file of a machine on its way, it is read or refused with a line: never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import ScenarioError
from sim.report import topology

FOLDER = Path(__file__).parents[1] / "unit" / "topologies"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir()) if path.suffix != ".md"}
WORDS = (
    "",
    "X",
    "NV18",
    "NV9999",
    "SYS",
    "PIX",
    "OK",
    "0-",
    "-",
    "9" * 9,
    '"',
    "<",
    ">",
    "/>",
    "\t",
    "\n",
    "GPU0",
    "0x0302",
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str]:
    """A file with some pieces cut out, written over or doubled."""
    name = draw(st.sampled_from(sorted(TEXTS)))
    text = TEXTS[name]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(text) - 1, 0)))
        length = draw(st.sampled_from((0, 1, 3, 20, 200)))
        word = draw(st.sampled_from(WORDS))
        text = text[:at] + word + text[at + length :]
    return name, text


@settings(deadline=None, max_examples=150)
@given(damaged())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, str]) -> None:
    name, text = case
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_text(text, encoding="utf-8")
    try:
        source = topology.read(str(path))
    except ScenarioError as error:
        assert error.findings
        assert all(finding.file and finding.problem for finding in error.findings)
        return
    if source.node is not None:
        content = topology.topology(source, 1, "", ())
        assert len(content["paths"]) == source.node.num_gpus
