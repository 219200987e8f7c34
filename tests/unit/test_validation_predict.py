"""Measured beside predicted: every run, once simulated, never dropped."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log

import pytest

from sim.pipeline import simulate
from sim.scenario.load import load_scenario_mapping
from sim.validation import predict as module
from sim.validation.band import points_of
from sim.validation.predict import Failure, Prediction, predict, select, validate
from sim.validation.results import points, reason, results_markdown
from sim.validation.runs import Run, RunsFile
from sim.validation.summary import by_quantity, reasons, result, sources_alike, summarise, time_errors

SCENARIO = {
    "model": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    "cluster": {"node": "dgx-h100"},
    "framework": "ddp",
    "training": {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 8, "precision": "bf16"},
}
TRUTH = simulate(load_scenario_mapping(SCENARIO, "small")).report.to_dict()
STEP = TRUTH["step"]["time_s"]


def run(name, measured, scenario=SCENARIO, formula="", file="a.yaml"):
    return Run(name, file, 1, ".", scenario, measured, "", (), formula, "")


def file(*runs, name="a"):
    return RunsFile(f"{name}.yaml", name, {"title": name}, runs)


def test_errors_are_predicted_over_measured_minus_one_with_their_sign():
    rate = TRUTH["step"]["tokens_per_s_per_gpu"]
    found = validate([file(run("x", {"step_time_s": STEP / 2, "tokens_per_s_per_gpu": rate * 2, "fits": False}))], 1)
    assert [row.error for row in found.comparisons] == pytest.approx([1.0, -0.5, 1.0])
    assert [row.predicted for row in found.comparisons] == [STEP, rate, True]


def test_flops_are_compared_in_the_sources_formula():
    """8 N a token by our step time is 8 N tokens / (step * GPUs), whatever we count ourselves."""
    parameters = 2 * 1024 * 256 + 2 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256
    (row,) = validate([file(run("x", {"model_flops_per_s_per_gpu": 1e12}, formula="8 N"))], 1).comparisons
    assert row.predicted == pytest.approx(8 * parameters * 128 * 8 / (STEP * 8))


def test_an_unknown_formula_is_said_and_compared_as_it_is():
    found = validate([file(run("x", {"mfu": 0.4}, formula="ours alone"))], 1)
    assert found.comparisons[0].predicted == TRUTH["step"]["mfu"]
    assert any('"ours alone": 1 figures compared as if' in words for words in found.assumptions)


def test_what_cannot_be_simulated_stands_under_failed_with_every_reason():
    bad = {**SCENARIO, "framework": "ddq", "cluster": {"node": "dgx-h1000"}}
    found = validate([file(run("good", {"mfu": 0.4}), run("bad", {"mfu": 0.4}, bad))], 1)
    assert [row.run.id for row in found.comparisons] == ["good"]
    (failed,) = found.failed
    assert failed.run.id == "bad"
    assert len(failed.failure.reasons) == 2
    assert not failed.failure.defect
    assert result(found)["failed"][0]["why"] == "; ".join(failed.failure.reasons)


def test_our_defect_is_a_failure_of_that_run_alone(monkeypatch):
    def broken(_):
        raise KeyError("lost")

    monkeypatch.setattr(module, "simulate", broken)
    answer = predict(SCENARIO, "x", ".")
    assert answer == Failure(("a defect of sim: KeyError: 'lost'",), defect=True)


def test_like_scenarios_are_simulated_once(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "simulate", lambda scenario: asked.append(scenario.name) or simulate(scenario))
    found = validate([file(*(run(f"r{i}", {"mfu": 0.1 + i / 10}) for i in range(3)))], 1)
    assert asked == ["r0"]
    assert [row.run.id for row in found.comparisons] == ["r0", "r1", "r2"]


def test_processes_give_the_same_answer_in_the_same_order():
    def of(size):
        return {**SCENARIO, "training": {**SCENARIO["training"], "global_batch_size": 8 * size}}

    files = [file(*(run(f"r{i}", {"step_time_s": 1.0}, of(i)) for i in range(1, 10)))]
    assert len(files[0].runs) >= module.WORTH_A_POOL
    assert json.dumps(result(validate(files, 2))) == json.dumps(result(validate(files, 1)))


def test_runs_are_chosen_by_text_and_spread_evenly():
    files = [file(*(run(f"r{i}", {"mfu": 0.4}) for i in range(10))), file(run("other", {"mfu": 0.4}), name="b")]
    assert [r.id for f in select(files, "A:R") for r in f.runs] == [f"r{i}" for i in range(10)]
    assert [r.id for f in select(files, "", 3) for r in f.runs] == ["r0", "r3", "r7"]
    assert [r.id for f in select(files, "", 99) for r in f.runs][-1] == "other"


# --- summaries -----------------------------------------------------------------------------------


def test_a_summary_of_four_errors():
    summary = summarise([0.1, -0.3, 0.0, 0.2])
    assert summary.mean_error == pytest.approx(0.0)
    assert summary.mean_absolute_error == pytest.approx(0.15)
    assert summary.median_absolute_error == pytest.approx(0.15)
    assert summary.worst == -0.3


def comparison(source, quantity, measured, predicted):
    prediction = Prediction({"fits": True}, "gpu", 8, "ddp dp only", 10**9, module.Counts(1, 1, 1, 1), {"compute": 1.0})
    error = float(measured != predicted) if quantity == "fits" else predicted / measured - 1
    row = run(f"{source}{measured}", {quantity: measured}, file=source)
    return module.Comparison(row, source, quantity, measured, predicted, error, prediction)


def test_sources_weigh_alike_however_many_rows_they_have():
    rows = [comparison("a", "mfu", 1.0, 1.2)] * 3 + [comparison("b", "mfu", 1.0, 0.9)]
    assert by_quantity(rows)["mfu"].mean_error == pytest.approx((3 * 0.2 - 0.1) / 4)
    assert sources_alike(rows)["mfu"]["mean_error"] == pytest.approx((0.2 - 0.1) / 2)


def test_wrong_hopes_are_counted():
    rows = [
        comparison("a", "fits", False, True),
        comparison("a", "fits", True, False),
        comparison("a", "fits", True, True),
    ]
    summary = by_quantity(rows)["fits"]
    assert (summary.count, summary.mean_error, summary.optimistic) == (3, pytest.approx(2 / 3), 1)


def test_a_rate_is_a_time_upside_down():
    """Twice the measured rate is half the time."""
    assert [error for error, _ in time_errors([comparison("a", "mfu", 0.2, 0.4)])] == pytest.approx([-0.5])


def test_reasons_fall_together_whatever_their_figures():
    failed = [
        module.Failed(
            run("x", {"mfu": 1.0}), "a", Failure((f"parallelism.pp = {n} is not simulated yet",), defect=False)
        )
        for n in (2, 16)
    ]
    assert reasons(failed) == [("parallelism.pp = ... is not simulated yet", 2)]


def test_the_page_names_every_run_that_is_worst_and_each_reason():
    bad = {**SCENARIO, "framework": "ddq"}
    found = validate([file(run("slow", {"step_time_s": STEP * 3}), run("bad", {"mfu": 0.4}, bad))], 1)
    page = results_markdown(found, "sim validate a.yaml")
    assert "a:slow" in page
    assert "-66.7%" in page
    assert "framework: 'ddq'" in page
    assert page == results_markdown(found, "sim validate a.yaml")


def test_a_time_that_needs_more_than_the_peak_is_flagged():
    mfu = TRUTH["step"]["mfu"]
    rate = TRUTH["step"]["tokens_per_s_per_gpu"]
    for quantity, at_peak in (("step_time_s", STEP * mfu), ("tokens_per_s_per_gpu", rate / mfu)):
        slower, faster = (at_peak * 1.01, at_peak * 0.99)
        if quantity != "step_time_s":
            slower, faster = faster, slower
        found = validate([file(run("slow", {quantity: slower}), run("fast", {quantity: faster}))], 1)
        assert [module.above_peak(row) for row in found.comparisons] == [False, True]
        page = results_markdown(found, "sim validate a.yaml")
        assert page.count("faster than the GPU's peak allows") == 1
        assert any("fast: it needs more FLOP/s than the GPU has" in words for words in found.assumptions)


def test_reasons_are_read_off_the_breakdown():
    (row,) = validate([file(run("x", {"step_time_s": STEP * 2}))], 1).comparisons
    assert reason(row, -0.5).startswith("the host limits it")  # two layers of 256: nothing but launches

    def parts(exposed=(), **parts_s):
        base = dict.fromkeys(("compute", "exposed_communication", "bubble", "optimizer", "other"), 0.0)
        prediction = replace(row.prediction, parts_s={**base, **parts_s}, exposed_s=exposed, assumed=())
        return replace(row, prediction=prediction)

    tp = (("all_reduce", "tp", 3.0),)
    assert reason(parts(tp, compute=7.0, exposed_communication=3.0), -0.5) == "exposed all_reduce of tp (30%)"
    across = replace(
        parts(tp, compute=7.0, exposed_communication=3.0),
        run=run("x", {}, {**SCENARIO, "parallelism": {"tp": 8}, "cluster": {"node": "dgx-h100", "num_nodes": 2}}),
    )
    assert reason(across, -0.5) == "exposed all_reduce of tp across nodes (30%)"
    assert "bubble repeats" in reason(parts(compute=5.0, bubble=5.0), -0.5)
    assert reason(parts(compute=9.0, optimizer=1.0), -0.5).startswith("slower than its kernels explain (compute 90%)")
    assert reason(parts(compute=9.0, optimizer=1.0), 0.5).startswith("its kernels are faster than those assumed")


def test_the_page_counts_the_runs_in_the_band():
    low, high = TRUTH["step"]["band_s"]
    runs = [run(f"r{i}", {"step_time_s": t}) for i, t in enumerate((low * 0.99, low * 1.01, high * 0.99, high * 1.01))]
    page = results_markdown(validate([file(*runs)], 1), "sim validate a.yaml")
    assert "It holds 50% of 4 runs, each source weighing the same 50%; by the parts alone" in page
    assert "left out" in page.split("## The band of the time")[1].split("##")[0]


def test_the_json_has_the_times_that_the_band_is_derived_from():
    rate = TRUTH["step"]["tokens_per_s_per_gpu"]
    found = validate([file(run("a", {"step_time_s": 2 * STEP}), run("b", {"tokens_per_s_per_gpu": rate * 4}))], 1)
    points = points_of(result(found)["times"])
    assert [point.log_ratio for point in points] == [pytest.approx(log(2)), pytest.approx(-log(4))]
    assert {point.deviation for point in points} == {TRUTH["step"]["band_deviation"]}


def test_points_are_step_times_whatever_was_measured():
    rate = TRUTH["step"]["tokens_per_s_per_gpu"]
    found = validate([file(run("a", {"step_time_s": 2 * STEP}), run("b", {"tokens_per_s_per_gpu": rate * 4}))], 1)
    assert points(found)["a"] == [pytest.approx((2 * STEP, STEP)), pytest.approx((STEP / 4, STEP))]


def test_the_picture_is_the_same_bytes_each_time():
    from sim.report.plots import results_png

    drawn = [results_png({"a": [(1.0, 1.1), (2.0, 1.9)], "b": [(0.1, 0.2)]}) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")


def test_figures_of_a_run_that_contradict_each_other_are_told():
    """128 tokens a step on each of 8 GPUs: half the time at the same rate is half the tokens."""
    rate = TRUTH["step"]["tokens_per_s_per_gpu"]
    held = {"peak_allocated_bytes": 3e9, "peak_reserved_bytes": 2e9, "peak_device_bytes": 4e9}
    found = validate([file(run("x", {"step_time_s": STEP / 2, "tokens_per_s_per_gpu": rate, **held}),
                           run("y", {"step_time_s": STEP * 2, "tokens_per_s_per_gpu": rate / 2}))], 1)  # fmt: skip
    assert [words for words in found.assumptions if words.startswith(("a: x", "a: y"))] == [
        "a: x: step_time_s times tokens_per_s_per_gpu is 64 tokens of a GPU and step, the scenario has 128",
        "a: x: peak_allocated_bytes is above peak_reserved_bytes, which includes it",
    ]
