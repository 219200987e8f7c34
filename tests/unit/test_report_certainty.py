"""The band beside a step's time: what it is made of, and how it behaves."""

from __future__ import annotations

from math import exp, hypot, log, sqrt

import pytest

from sim.cost.calibrated import row_of
from sim.cost.model import CostModel, CostSettings
from sim.cost.residuals import NINE_IN_TEN, Residuals, WholeRuns, whole_runs
from sim.pipeline import simulate
from sim.report.certainty import COVERAGE
from sim.report.rows import time_band_words
from sim.scenario.calibration import HostTimes, calibration_text
from sim.scenario.load import load_scenario_text

TEXT = (
    "model: llama-2-7b\ncluster: {{node: {node}}}\nframework: fsdp2\n"
    "training: {{sequence_length: 2048, micro_batch_size: 1, precision: {precision}}}\n"
)


def of(node, precision="bf16", more="", **kwargs):
    return simulate(load_scenario_text(TEXT.format(node=node, precision=precision) + more, "x.yaml", **kwargs))


@pytest.fixture(scope="module")
def h100():
    return of("dgx-h100")


def width(simulation):
    band = simulation.report.time_confidence
    return band.high_s / band.low_s


def test_the_parts_are_around_the_time_by_one_factor_both_ways(h100):
    band, time_s = h100.report.time_confidence, h100.report.time_s
    assert band.parts_low_s < time_s < band.parts_high_s
    assert time_s / band.parts_low_s == pytest.approx(band.parts_high_s / time_s)


def test_whole_runs_add_to_the_parts_in_quadrature_and_are_longer_rather_than_shorter(h100):
    band, time_s = h100.report.time_confidence, h100.report.time_s
    parts, whole = NINE_IN_TEN * band.deviation, whole_runs()
    assert log(band.parts_high_s / time_s) == pytest.approx(parts)
    assert log(time_s / band.low_s) == pytest.approx(hypot(parts, whole.below))
    assert log(band.high_s / time_s) == pytest.approx(hypot(parts, whole.above))
    assert 0 <= whole.below < whole.above


def test_the_estimate_does_not_follow_the_runs(h100, monkeypatch):
    """The band widens with what whole runs were off by; the time and the parts stay."""
    from sim.report import certainty

    monkeypatch.setattr(certainty, "whole_runs", lambda: WholeRuns(1.0, 2.0, "made up"))
    band, wider = h100.report.time_confidence, of("dgx-h100").report
    assert wider.time_s == h100.report.time_s
    assert wider.time_confidence.parts == band.parts
    assert wider.time_confidence.low_s < band.low_s and wider.time_confidence.high_s > band.high_s


def test_the_families_add_up_to_the_step_without_its_bubble(h100):
    assert sum(part.time_s for part in h100.report.time_confidence.parts) == pytest.approx(h100.report.time_s)


def test_one_family_alone_has_the_width_of_its_two_deviations(h100):
    """What is shared adds up over the shapes, what is a shape's own in quadrature: with one shape both meet."""
    from sim.report.certainty import time_confidence
    from sim.report.metrics import kernels_of

    program = h100.world.programs[0]
    kernel = next(kernel for _, kernel in kernels_of(program).values() if type(kernel).__name__ == "Gemm")
    parts = {"compute": 2.0, "exposed_communication": 0.0, "bubble": 0.0, "optimizer": 0.0, "other": 0.0}
    band = time_confidence(parts, (), h100.world, 0, [{id(kernel): (10, kernel)}], h100.cost)
    known = Residuals(h100.cost).kernel(kernel)
    assert band.parts_high_s == pytest.approx(2 * exp(NINE_IN_TEN * sqrt(known.shared**2 + known.own**2)))
    with_bubble = time_confidence(parts | {"bubble": 2.0}, (), h100.world, 0, [{id(kernel): (10, kernel)}], h100.cost)
    assert with_bubble.high_s == pytest.approx(2 * band.high_s)
    assert with_bubble.parts_high_s == pytest.approx(2 * band.parts_high_s)  # the bubble waits for the same work


def test_what_drives_the_band_comes_first(h100):
    deviations = [part.deviation_s for part in h100.report.time_confidence.parts]
    assert deviations == sorted(deviations, reverse=True)
    assert h100.report.time_confidence.parts[0].name == "matmuls in bf16"


def test_a_gpu_that_another_generation_stands_for_is_less_sure(h100):
    assert width(of("pcie-8x-4090")) > width(h100)


def test_the_figures_are_in_the_json_and_in_words(h100):
    step = h100.report.to_dict()["step"]
    band = h100.report.time_confidence
    assert step["band_s"] == [band.low_s, band.high_s]
    assert step["band_coverage"] == COVERAGE
    assert step["band_by_parts_s"] == [band.parts_low_s, band.parts_high_s]
    assert step["band_whole_runs"]["above"] == whole_runs().above
    words = time_band_words(band)
    assert words.startswith("9 like runs of 10 would take between ") and words.endswith("most by matmuls in bf16")
    assert set(step["band_parts"]["matmuls in bf16"]) == {"time_s", "deviation_s", "source"}


def test_a_calibration_of_the_machine_makes_it_narrower(h100, tmp_path):
    from sim.calibrating import kernel_times
    from sim.ir.ledger import Attention, Gemm

    rows: dict[str, list[object]] = {"gemm": [], "attention": []}
    alone = CostModel(h100.cluster, h100.scenario.cluster.gpu, CostSettings(code=h100.scenario.training.code))
    for kernel in kernel_times(h100):
        if isinstance(kernel, Gemm | Attention):
            row = row_of(kernel, alone.kernel_s(kernel, 0))  # of one GPU, which waits for no other
            rows["gemm" if isinstance(kernel, Gemm) else "attention"].append(row)
    text = calibration_text({"date": "2026-11-21", "gpu": "h100-sxm-80gb"}, rows, HostTimes(), ())
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    own = of("dgx-h100", more="calibration: c.yaml\n", folder=tmp_path)
    assert own.report.time_s == pytest.approx(h100.report.time_s, rel=1e-4)  # it repeats the model of an average GPU
    assert width(own) < width(h100)
    assert own.report.time_confidence.whole == h100.report.time_confidence.whole  # that narrows the parts only


def test_every_residual_says_where_it_is_from(h100):
    assert all(part.source for part in h100.report.time_confidence.parts)


@pytest.mark.parametrize(
    ("library", "deviation", "source"),
    [
        ("gloo", 0.32, "gloo.yaml"),
        ("alpha-beta, alpha: 5 us, beta: 50 GB/s", 0.0, "the scenario's own"),
    ],
)
def test_collectives_of_another_library_are_not_as_sure_as_nccls(library, deviation, source):
    found = of(f"dgx-a100-80gb, backend: {library}")
    (part,) = [p for p in found.report.time_confidence.parts if p.name.startswith("collectives")]
    assert part.deviation_s == pytest.approx(deviation * part.time_s, rel=1e-6)
    assert source in part.source
    assert "NCCL" not in part.source
