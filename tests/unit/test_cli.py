"""The command line: exit codes, what goes to which stream, and who is told what."""

from __future__ import annotations

import gc
import json
import os
import pty
import subprocess
import sys

import pytest
from report_scenarios import write

from sim import cli


@pytest.fixture
def sim(monkeypatch, capsys):
    """Return a function that runs a command line in this process: (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sim", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        gc.enable()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def process(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sim`` as a process of its own."""
    command = [sys.executable, "-m", "sim", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# --- run -----------------------------------------------------------------------------------------


def test_what_fits_exits_with_0_and_warns_on_standard_error(sim, tmp_path):
    code, out, err = sim("run", write(tmp_path, "zero_3"))
    assert code == 0
    assert "\nfits " in out
    assert "Assumed" not in out
    assert err.lstrip().startswith("Assumed, extrapolated or not modelled\n  - ")


def test_what_does_not_fit_exits_with_3_and_tells_what_would(sim, tmp_path):
    code, out, _ = sim("run", write(tmp_path, "too_large"), "--quiet")
    assert code == 3
    assert "does not fit" in out
    assert "--set " in out


def test_without_advice_nothing_else_is_tried(sim, tmp_path):
    code, out, _ = sim("run", write(tmp_path, "too_large"), "--no-advice", "--json")
    assert code == 3
    assert json.loads(out)["remedies"] == []


def test_bad_input_exits_with_2_says_every_problem_and_prints_no_result(sim, tmp_path):
    path = write(tmp_path, "zero_3")
    path.write_text(path.read_text().replace("hidden_size: 512", "hidden_sise: 512").replace("bf16", "bf61"))
    code, out, err = sim("run", path, "--json")
    assert code == 2
    assert out == ""
    assert "hidden_sise" in err
    assert "bf61" in err
    assert "Traceback" not in err


def test_our_defect_exits_with_70_and_says_what_to_report(sim, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a law is broken")

    monkeypatch.setattr("sim.pipeline.simulate", broken)
    code, out, err = sim("run", write(tmp_path, "zero_3"))
    assert code == 70
    assert out == ""
    assert "AssertionError: a law is broken" in err
    assert "This is a defect of sim, not of your input." in err


def test_json_prints_only_json_and_quiet_no_warnings(sim, tmp_path):
    path = write(tmp_path, "ddp")
    code, out, err = sim("run", path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["scenario"] == "ddp"
    code, out, err = sim("run", path, "--quiet")
    assert (code, err) == (0, "")
    assert "Communication in a step" in out


def test_set_lays_values_over_the_file(sim, tmp_path):
    path = write(tmp_path, "zero_3")
    _, out, _ = sim("run", path, "--json", "--set", "cluster.num_nodes=1", "--set", "training.recompute=none")
    content = json.loads(out)
    assert content["world_size"] == 8
    # nothing is computed again but by flash attention's backward: five matmuls where four are useful
    assert 1.0 <= content["step"]["hfu"] / content["step"]["mfu"] < 1.1


def test_out_holds_what_json_prints(sim, tmp_path):
    path = write(tmp_path, "ddp")
    code, out, _ = sim("run", path, "--json", "--out", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "report.json").read_text(encoding="utf-8") == out


def test_a_folder_that_cannot_be_is_refused_before_the_work(sim, tmp_path, monkeypatch):
    monkeypatch.setattr("sim.pipeline.simulate", lambda *_, **__: pytest.fail("worked in vain"))
    (tmp_path / "file").write_text("")
    code, out, err = sim("run", write(tmp_path, "ddp"), "--out", tmp_path / "file")
    assert (code, out) == (2, "")
    assert err == f"--out: {tmp_path / 'file'} is a file, not a folder\n"


# --- the other commands ------------------------------------------------------------------------------


def test_check_says_ok_and_simulates_nothing(sim, tmp_path, monkeypatch):
    monkeypatch.setattr("sim.pipeline.simulate", lambda *_, **__: pytest.fail("simulated"))
    path = write(tmp_path, "too_large")
    assert sim("check", path) == (0, f"{path}: ok\n", "")
    code, out, _ = sim("check", path, "--json")
    assert code == 0
    assert json.loads(out) == {"scenario": "too_large", "ok": True, "warnings": []}
    assert sim("check", tmp_path / "none.yaml")[0] == 2


def test_explain_catalog_and_schema_print_text_or_json(sim, tmp_path):
    path = write(tmp_path, "zero_3")
    code, out, err = sim("explain", path)
    assert (code, err) == (0, "")
    assert "what remains of 16 GPUs" in out
    assert json.loads(sim("explain", path, "--json")[1])["scenario"] == "zero_3"
    assert "h100-sxm-80gb" in sim("catalog")[1]
    assert json.loads(sim("catalog", "gpu", "h100-sxm-80gb", "--json")[1])["name"] == "h100-sxm-80gb"
    for kind in ("scenario", "plan", "topology", "runs"):
        assert json.loads(sim("schema", kind)[1])["title"] == f"sim {kind}"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("catalog", "gpu", "h10"), "did you mean h100-pcie-80gb or h100-sxm-80gb?"),
        (("catalog", "gpux"), "did you mean gpu?"),
        (("schema", "scenari"), "write one of: scenario, plan, topology, runs"),
    ],
)
def test_an_unknown_name_is_one_line_and_exit_2(sim, words, problem):
    code, out, err = sim(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert problem in err


@pytest.mark.parametrize("words", [(), ("bogus",), ("run",), ("run", "x.yaml", "--bogus")])
def test_a_wrong_command_line_exits_with_2(sim, words):
    code, _, err = sim(*words)
    assert code == 2
    assert "Traceback" not in err


def test_help_fits_80_columns(sim):
    for words in ((), ("run",), ("check",), ("explain",), ("catalog",), ("schema",)):
        code, out, _ = sim(*words, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        assert "..." not in out.replace("[OPTIONS] COMMAND [ARGS]...", "").replace("KEY.PATH=VALUE", "")


def test_the_version(sim):
    code, out, _ = sim("--version")
    assert code == 0
    assert out.startswith("sim 0.")


# --- as a process ------------------------------------------------------------------------------------


def test_python_m_sim_gives_the_same_bytes_under_any_hash_seed(tmp_path):
    path = write(tmp_path, "zero_3")
    seeds = [process("run", path, "--json", env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "01"]
    assert seeds[0].returncode == 0
    assert seeds[0].stdout == seeds[1].stdout


def test_a_reader_that_leaves_early_changes_neither_exit_code_nor_mood(tmp_path):
    path = write(tmp_path, "too_large")
    for words in (("catalog",), ("run", path, "--no-advice"), ("run", path, "--no-advice", "--json")):
        read, written = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "sim", *map(str, words)]
        done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
        os.close(written)
        assert done.returncode == (0 if words == ("catalog",) else 3)
        assert "Traceback" not in done.stderr
        assert "Broken" not in done.stderr


def test_a_terminal_that_knows_only_ascii_gets_ascii(tmp_path):
    path = write(tmp_path, "ddp")
    done = process("run", path, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "ddp - dp 8 - bf16" in done.stdout


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_for_people_only(tmp_path, quiet):
    path = write(tmp_path, "zero_3")
    words = ["run", str(path), "--json", *(["--quiet"] if quiet else [])]
    code = f"""
import sys, time
import sim.cli, sim.pipeline
simulate = sim.pipeline.simulate
sim.pipeline.simulate = lambda *given, **named: (time.sleep(1.5), simulate(*given, **named))[1]
sim.cli.PROGRESS_AFTER_S = 0.0
sys.argv = ["sim", *{words!r}]
sim.cli.main()
"""
    screen, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=terminal,
        check=False,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    seen = b""
    try:
        while part := os.read(screen, 4096):
            seen += part
    except OSError:  # the terminal's end, on Linux
        pass
    os.close(screen)
    assert done.returncode == 0
    assert json.loads(done.stdout)["fits"] is True
    assert (b"simulating zero_3" in seen) is not quiet


def test_a_calibration_that_is_wrong_is_named_by_its_option(sim, tmp_path):
    empty = tmp_path / "calibration.yaml"
    empty.write_text("")
    code, out, err = sim("run", write(tmp_path, "zero_3"), "--calibration", empty)
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert err.startswith(f"--calibration: {empty}: is empty\n")
