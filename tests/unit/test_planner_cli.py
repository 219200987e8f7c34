"""sim plan: exit codes, what goes to which stream, what is written."""

from __future__ import annotations

import gc
import json
import sys

import pytest
from plan_world import ONE_NODE

from sim import cli
from sim.planner.trial import is_outcome

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
    assert sim(SMALL, "--executor", "slurm")[0] == cli.EXIT_BAD_INPUT


def test_a_cluster_that_is_not_there_is_bad_input(sim) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'sim[cluster]'")
    code, out, err = sim(SMALL, "--executor", "dask", "--address", "nonsense")
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert err.startswith("--address: the cluster at nonsense cannot be reached: ")
    assert sim(SMALL, "--address", "tcp://host:8786")[2] == (
        "--address: --executor loky has no address\n    add --executor dask or ray\n"
    )


def test_without_ray_it_says_what_to_install(sim, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = sim(SMALL, "--executor", "ray")
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert err == "--executor: ray is not installed\n    pip install 'sim[ray]'\n"


def test_where_nothing_can_be_kept_the_search_goes_on(sim, tmp_path) -> None:
    (tmp_path / "full").write_text("a file where a folder should be")
    code, out, err = sim(SMALL, "--cache", str(tmp_path / "full" / "cache"))
    assert code == 0
    assert "Take 4 GPUs" in out or "Rent 4 GPUs" in out
    assert "cannot be written: not a directory; what was simulated is not found again" in err


def test_what_an_earlier_answer_left_is_gone(sim, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "front_9.yaml").write_text("of another plan")
    (out / "mine.txt").write_text("somebody's own")
    assert sim(SMALL, "--out", str(out))[0] == 0
    assert not (out / "front_9.yaml").exists()
    assert (out / "mine.txt").read_text() == "somebody's own"
    assert not list(out.rglob(".*"))


def test_a_broken_file_of_the_cache_is_simulated_again(sim, tmp_path) -> None:
    out = tmp_path / "out"
    assert sim(SMALL, "--out", str(out))[0] == 0
    whole = (out / "plan.json").read_bytes()
    files = list((out / "cache").glob("*.json"))
    known = json.loads(files[0].read_text())
    assert is_outcome(known)
    less = {key: value for key, value in known.items() if key != "exposed"}
    for broken in ({}, [1], None, {"version": 3}, {**known, "step_s": "1 s"}, {**known, "parts": {}}, less):
        assert not is_outcome(broken), broken
    for file in files:
        file.write_text('{"version": 3, "fi')
    assert sim(SMALL, "--out", str(out))[0] == 0
    assert (out / "plan.json").read_bytes() == whole
    assert all(is_outcome(json.loads(file.read_text())) for file in files)
