"""sim plan: exit codes, what goes to which stream, what is written."""

from __future__ import annotations

import gc
import json
import sys

import pytest
from plan_world import ONE_NODE

from sim import cli

SMALL = ONE_NODE.replace("[2, 4, 8]", "4") + "axes: {tp: 2, pp: 1, micro_batch_size: 2, recompute: none}\n"


@pytest.fixture
def sim(monkeypatch, capsys, tmp_path):
    """Return a function that runs ``sim plan`` on a text: (exit code, standard output, standard error)."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def run(text: str, *words: str) -> tuple[int, str, str]:
        file = tmp_path / "x.yaml"
        file.write_text(text)
        monkeypatch.setattr(sys, "argv", ["sim", "plan", str(file), "--jobs", "1", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        gc.enable()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_json_is_all_there_is_on_standard_output(sim, tmp_path) -> None:
    code, out, err = sim(SMALL, "--json")
    content = json.loads(out)
    assert (code, err) == (0, "")
    assert content["recommended"]["keeps_goal"]
    assert content["searched"]["seconds"] > 0
    assert any((tmp_path / "home" / "sim" / "plans").glob("*.json"))


def test_out_has_all_files_and_the_same_answer_twice(sim, tmp_path) -> None:
    out = tmp_path / "out"
    assert sim(SMALL, "--out", str(out))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert sim(SMALL, "--out", str(out))[0] == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert any((out / "cache").glob("*.json"))


def test_what_keeps_no_deadline_is_an_answer_with_its_own_code(sim) -> None:
    code, out, _ = sim(SMALL.replace("{fastest: true}", "{fastest: true, deadline: 1 s}"))
    assert code == cli.EXIT_DOES_NOT_FIT
    assert "Nothing keeps the goal. Nearest: 4 GPUs of one dgx-h100" in out
    assert "too late" in out


def test_bad_input_is_two(sim) -> None:
    code, out, err = sim(SMALL.replace("fastest: true", "fastest: maybe"))
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert "goal.fastest: 'maybe' is neither true nor false" in err
    assert sim(SMALL, "--backend", "slurm")[0] == cli.EXIT_BAD_INPUT
