"""``sim calibrate``: which kernels it measures, what it reads, and what it says where it cannot measure."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from sim.calibrating import MOST_OF_A_FAMILY, calibrate, chosen, curves_of, kernel_times, program_path
from sim.errors import ScenarioError
from sim.pipeline import simulate
from sim.scenario.calibration import FAMILIES, read_calibration
from sim.scenario.load import load_scenario_text

TEXT = (
    "model: llama-2-7b\ncluster: {node: dgx-h100}\nframework: fsdp2\n"
    "training: {sequence_length: 2048, micro_batch_size: 1}\n"
)
HEAD = "".join(f"#  Rank {rank:2} Group  0 Pid 1 on host{rank // 8} device {rank % 8} [0x00] X\n" for rank in range(8))
ROWS = """# all_reduce_perf
     1048576        262144     float     sum      -1    40.0   26.21   45.87      0    40.0   26.21   45.87      0
    16777216       4194304     float     sum      -1   120.0  139.81  244.67      0   120.0  139.81  244.67      0
"""


@pytest.fixture(scope="module")
def scenario():
    return load_scenario_text(TEXT, "x.yaml")


def python_that(tmp_path, shell):
    """A stand-in for a Python with torch: a program that answers."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\ncat > {tmp_path}/request.json\n{shell}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def problem(call):
    with pytest.raises(ScenarioError) as caught:
        call()
    return str(caught.value)


def test_the_kernels_that_the_step_spends_most_on_are_chosen(scenario):
    simulation = simulate(scenario)
    rows, notes = chosen(simulation)
    spent = kernel_times(simulation)
    # of a llama block and its head: products forward, backward for the input, and for the weights
    assert all(row["dtype"] == "bf16" for row in rows["gemm"])
    assert {row["direction"] for row in rows["attention"]} == {"forward", "backward"}
    assert any(row["over_tokens"] for row in rows["gemm"])
    assert not any("time" in row for found in rows.values() for row in found)
    families = [row["family"] for row in rows["memory"]]
    assert max(families.count(family) for family in families) <= MOST_OF_A_FAMILY
    assert "optimizer" in families
    assert not notes
    assert all(time_s > 0 for time_s in spent.values())


def test_all_that_the_scenario_has_are_asked_for_and_the_answer_is_a_file_that_it_goes_by(scenario, tmp_path):
    answer = (
        '{"machine": {"processor": "P", "gpu_model": "NVIDIA H100", "compute_capability": "9.0", "num_sms": 132},'
        ' "host": {"forward": 1e-5, "backward": 8e-6, "driver": 3e-6},'
        ' "gemm": [{"m": 2048, "n": 4096, "k": 4096, "dtype": "bf16", "over_tokens": false, "time_s": 2e-4},'
        ' {"m": 1, "n": 4096, "k": 4096, "dtype": "bf16", "time_s": null, "why": "out of memory"}],'
        ' "copies": [{"direction": "host_to_device", "bytes": 1048576, "time_s": 3e-5}]}'
    )
    python = python_that(tmp_path, f"echo '{answer}'")
    found = calibrate(scenario, "cuda", [], python)
    request = yaml.safe_load((tmp_path / "request.json").read_text(encoding="utf-8"))
    assert request["device"] == "cuda"
    assert len(request["gemm"]) > 5
    assert any("out of memory" in note for note in found.notes)
    path = tmp_path / "calibration.yaml"
    path.write_text(found.text, encoding="utf-8")
    read = read_calibration(path, str(path))
    assert read.gpu == "h100-sxm-80gb"
    assert [row.time for row in read.gemm] == pytest.approx([2e-4])
    assert dict(read.provenance)["counts"] == "gemm 1, copies 1, host 3"
    own = simulate(load_scenario_text(TEXT + f"calibration: {path}\n", "x.yaml"))
    assert any(words.startswith("calibrated by calibration.yaml") for words in own.report.warnings)


def test_another_gpu_than_the_scenarios_is_refused(scenario, tmp_path):
    machine = '{"processor": "P", "gpu_model": "NVIDIA A10", "compute_capability": "8.6", "num_sms": 72}'
    python = python_that(tmp_path, f"""echo '{{"machine": {machine}, "host": {{}}}}'""")
    said = problem(lambda: calibrate(scenario, "cuda", [], python))
    assert "this machine has NVIDIA A10 (compute capability 8.6, 72 SMs)" in said
    assert "GPU is h100-sxm-80gb (9.0, 132 SMs)" in said


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("echo 'no torch: No module named torch' >&2; exit 1", "has no torch"),
        ("echo 'no GPU: torch.cuda.is_available() is False' >&2; exit 1", "torch finds no GPU on this machine"),
        ("echo 'RuntimeError: x' >&2; exit 1", "the measuring program ended with: RuntimeError: x"),
    ],
)
def test_where_it_cannot_measure_it_says_why(scenario, tmp_path, shell, said):
    assert said in problem(lambda: calibrate(scenario, "auto", [], python_that(tmp_path, shell)))


def test_a_python_that_is_not_there(scenario, tmp_path):
    assert "does not start" in problem(lambda: calibrate(scenario, "cpu", [], str(tmp_path / "nothing")))


def test_nccl_tests_alone_are_enough(scenario, tmp_path):
    test = tmp_path / "all_reduce.txt"
    test.write_text(HEAD + ROWS, encoding="utf-8")
    python = python_that(tmp_path, "echo 'no GPU: x' >&2; exit 1")
    for found in (calibrate(scenario, "none", [test]), calibrate(scenario, "auto", [test], python)):
        path = tmp_path / "calibration.yaml"
        path.write_text(found.text, encoding="utf-8")
        (curve,) = read_calibration(path, str(path)).nccl
        assert (curve.collective, curve.ranks, curve.nodes) == ("all_reduce", 8, 1)
        assert [time for _, time in curve.rows] == pytest.approx([40e-6, 120e-6])
    assert "nothing is measured" in problem(lambda: calibrate(scenario, "none", []))


def test_curves_are_of_the_gpu_that_nccl_tests_name(scenario, tmp_path):
    """The file is then that GPU's; output of another GPU is refused. A name that says nothing is anybody's."""
    test = tmp_path / "all_reduce.txt"
    for name, refused, gpu in (
        ("NVIDIA H100 80GB HBM3", False, "h100-sxm-80gb"),
        ("NVIDIA Graphics Device", False, ""),
        ("NVIDIA A100-SXM4-80GB", True, ""),
    ):
        test.write_text(HEAD.replace(" X\n", f" {name}\n") + ROWS, encoding="utf-8")
        if refused:
            words = "it ran on NVIDIA A100-SXM4-80GB, and the scenario's GPU is h100-sxm-80gb"
            assert words in problem(lambda: calibrate(scenario, "none", [test]))
            continue
        path = tmp_path / "calibration.yaml"
        path.write_text(calibrate(scenario, "none", [test]).text, encoding="utf-8")
        assert read_calibration(path, str(path)).gpu == gpu


def test_tests_that_do_not_say_their_ranks_are_refused_by_line(tmp_path):
    test = tmp_path / "all_reduce.txt"
    test.write_text(ROWS, encoding="utf-8")
    assert f"{test}:2: it does not say how many ranks on which nodes it ran" in problem(
        lambda: curves_of([test], "h100-sxm-80gb")
    )
    assert "no such file" in problem(lambda: curves_of([tmp_path / "missing.txt"], "h100-sxm-80gb"))


def test_a_calibration_of_another_gpu_is_refused_by_the_scenario(tmp_path):
    (tmp_path / "c.yaml").write_text("calibration: 1\nprovenance: {date: x, gpu: a100-sxm-80gb}\n", encoding="utf-8")
    said = problem(lambda: load_scenario_text(TEXT + "calibration: c.yaml\n", "x.yaml", folder=tmp_path))
    assert said.startswith(
        "x.yaml:5: calibration: c.yaml was measured on a100-sxm-80gb, and the scenario's GPU is h100"
    )


def test_the_program_that_measures_knows_nothing_of_sim():
    text = program_path().read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if line.strip().startswith(("import sim", "from sim"))]
    assert Path(program_path()).name == "measure_gpu.py"


def test_every_family_has_a_kernel_that_stands_for_it():
    text = program_path().read_text(encoding="utf-8")
    memory = text[text.index("def memory(") : text.index("no kernel stands for")]
    assert [family for family in FAMILIES if f'"{family}"' not in memory] == []
    assert "amax" in FAMILIES, "Transformer Engine's current scaling spends its time there"


def test_looking_for_largest_values_is_measured_where_a_step_does():
    """Transformer Engine's per-tensor scaling reads every 16-bit operand once for its largest value."""
    low = TEXT.replace("fsdp2", "megatron").replace("size: 1", "size: 1, precision: fp8")
    found = chosen(simulate(load_scenario_text(low + "megatron: {fp8_recipe: tensorwise}\n", "x.yaml")))[0]
    assert "amax" in {row["family"] for row in found["memory"]}


@pytest.mark.real
def test_the_hosts_times_are_measured_on_any_machine_with_torch(scenario, tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text(calibrate(scenario, "cpu", []).text, encoding="utf-8")
    found = read_calibration(path, str(path))
    assert 1e-6 < found.host.forward < 1e-3  # microseconds a kernel, whatever the machine
    assert 1e-6 < found.host.backward < 1e-3
    assert not found.host.driver
    assert not found.gpu
    assert simulate(load_scenario_text(TEXT + f"calibration: {path}\n", "x.yaml")).report.time_s > 0
