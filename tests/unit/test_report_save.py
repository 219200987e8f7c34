"""``--out``: every file, whole, the same bytes each time; a folder that cannot be is one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from report_scenarios import answered

from sim.errors import ScenarioError
from sim.report.report import json_text, result
from sim.report.save import prepare, prepare_file, save, write_whole
from sim.scenario.load import load_scenario

FILES = {
    "scenario.resolved.yaml",
    "report.json",
    "report.md",
    "memory.png",
    "timeline.png",
    "trace.json.gz",
    "memory_snapshot.pickle",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "made" / "as_needed"
    save(answered("zero_3"), (), out)
    return out


def test_all_files_and_no_others(saved):
    assert {path.name for path in saved.iterdir()} == FILES


def test_report_json_is_what_json_prints(saved):
    text = (saved / "report.json").read_text(encoding="utf-8")
    assert text == json_text(result(answered("zero_3").report, ()))
    assert json.loads(text)["fits"] is True


def test_the_resolved_scenario_gives_the_same_scenario(saved):
    again = load_scenario(saved / "scenario.resolved.yaml")
    scenario = answered("zero_3").scenario
    assert again.training == scenario.training
    assert again.parallelism == scenario.parallelism
    assert again.cluster.gpu == scenario.cluster.gpu


@pytest.mark.parametrize(("name", "least_width", "least_height"), [("memory", 1400, 700), ("timeline", 1400, 250)])
def test_pictures_are_png_of_a_readable_size_without_a_date(saved, name, least_width, least_height):
    content = (saved / f"{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= least_width
    assert height >= least_height
    assert b"tIME" not in content
    assert b"Creation" not in content


def test_the_same_bytes_again_and_nothing_left_beside(saved, tmp_path):
    save(answered("zero_3"), (), tmp_path)
    save(answered("zero_3"), (), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes(), name


def test_what_does_not_fit_and_peaks_in_its_first_step_is_drawn_too(tmp_path):
    save(answered("too_large"), (), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "does not fit" in (tmp_path / "report.md").read_text(encoding="utf-8").lower()


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out, problem in (
        (tmp_path / "file", "is a file, not a folder"),
        (tmp_path / "file" / "x", "lies below a file"),
    ):
        with pytest.raises(ScenarioError) as error:
            prepare(out)
        assert str(error.value) == f"--out: {out} {problem}"


def test_a_folder_in_the_way_of_a_file_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(ScenarioError) as error:
        write_whole(tmp_path / "report.md", b"content")
    assert str(error.value) == f"--out: {tmp_path / 'report.md'} cannot be written: is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(ScenarioError, match=r"^--out: /proc/nothing cannot be written: [^\n]+$"):
        prepare(Path("/proc/nothing"))


def test_one_file_is_refused_before_the_work_by_the_name_of_its_option(tmp_path):
    prepare_file(tmp_path / "a" / "b" / "scenario.yaml", "--write")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(ScenarioError, match=r"--write: .*/a is a folder, not a file"):
        prepare_file(tmp_path / "a", "--write")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScenarioError, match=r"--results: .*/file is a file, not a folder"):
        prepare_file(tmp_path / "file" / "r.md", "--results")


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    null = Path("/dev/null")
    write_whole(null, b"x")
    assert null.is_char_device()
