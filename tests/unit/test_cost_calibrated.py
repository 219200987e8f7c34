"""What a user's measurements change, and what they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.cost.calibrated import Calibrated, alone_s, distance, kernel_of, row_of, shape_of, slower
from sim.cost.host import host_coefficients
from sim.cost.model import CostModel, CostSettings
from sim.cost.spread import slowest_of
from sim.ir.program import Collective, Communicator, Copy
from sim.pipeline import simulate
from sim.scenario.calibration import (
    AttentionRow,
    Calibration,
    CopyRow,
    GemmRow,
    HostTimes,
    MemoryRow,
    NcclCurve,
)
from sim.scenario.load import load_scenario_text

TEXT = (
    "model: llama-2-7b\ncluster: {node: dgx-h100, num_nodes: 2}\nframework: deepspeed\nparallelism: {zero: 3}\n"
    "training: {sequence_length: 2048, micro_batch_size: 1}\n"
)
ROWS = (
    GemmRow(4096, 4096, 4096, "bf16", 1.0),
    GemmRow(4096, 4096, 4096, "bf16", 1.0, 1, True),
    GemmRow(16, 16, 64, "bf16", 1.0, 32),
)
ATTENTION = AttentionRow("flash-2", "forward", 1, 32, 8, 4096, 4096, 128, "bf16", 1.0)
NORM = MemoryRow("norm", 2**26, 1.0)


@pytest.fixture(scope="module")
def simulation():
    return simulate(load_scenario_text(TEXT, "x.yaml"))


def model(simulation, calibration=None):
    return CostModel(simulation.cluster, simulation.scenario.cluster.gpu, CostSettings(calibration=calibration))


def calibration(**rows):
    return Calibration("c.yaml", "h100-sxm-80gb", (("date", "2026-11-21"),), **rows)


def test_a_measured_shape_takes_the_measured_time(simulation):
    rows = [replace(row, time=3e-4 * (i + 1)) for i, row in enumerate((*ROWS, ATTENTION, NORM))]
    own = model(simulation, calibration(gemm=tuple(rows[:3]), attention=(rows[3],), memory=(rows[4],)))
    for row in rows:
        assert own.kernel_s(kernel_of(row), 0) == pytest.approx(row.time, rel=1e-12)


def test_the_measured_card_is_the_average_of_those_that_wait_for_the_slowest(simulation):
    """Of 16 the slowest is 1.766 deviations of 1.72 % slower."""
    row = replace(ROWS[0], time=3e-4)
    settings = CostSettings(slowest=slowest_of(16), calibration=calibration(gemm=(row,)))
    own = CostModel(simulation.cluster, simulation.scenario.cluster.gpu, settings)
    assert own.kernel_s(kernel_of(row), 0) == pytest.approx(3e-4 * (1 + 1.76599 * 0.0172), rel=1e-6)


def test_a_near_shape_takes_the_ratio_of_the_nearest_and_a_far_one_the_median(simulation):
    plain = model(simulation)
    rows = [GemmRow(1024 * 4**i, 4096, 4096, "bf16", 1.0) for i in range(5)]
    ratios = (1.1, 1.2, 1.3, 1.4, 1.5)
    rows = [
        replace(row, time=plain.kernel_s(kernel_of(row), 0) * ratio) for row, ratio in zip(rows, ratios, strict=True)
    ]
    own = model(simulation, calibration(gemm=tuple(rows)))

    def ratio(m, n, k, dtype="bf16"):
        kernel = kernel_of(GemmRow(m, n, k, dtype, 1.0))
        return own.kernel_s(kernel, 0) / plain.kernel_s(kernel, 0)

    assert ratio(4096 + 512, 4096, 4096) == pytest.approx(1.2)  # a sixth of a doubling from the second row
    assert ratio(4096, 4096 * 3, 4096) == pytest.approx(1.2)  # 1.6 doublings
    assert ratio(4096, 64, 64) == pytest.approx(1.3)  # 12 doublings from all: the median
    assert ratio(4096, 4096, 4096, "fp16") == pytest.approx(1.2)  # the same units
    assert ratio(4096, 4096, 4096, "fp32") == 1.0  # another family


def test_distance_counts_doublings_of_all_dimensions_and_another_layout():
    a, b = (shape_of(kernel_of(GemmRow(*dims, "bf16", 1.0))) for dims in ((64, 64, 64), (128, 32, 256)))
    assert distance(a, b) == 1 + 1 + 2
    over = shape_of(kernel_of(GemmRow(64, 64, 64, "bf16", 1.0, 1, True)))
    assert distance(a, over) == 1.0
    assert distance(a, a) == 0.0


def test_rows_and_kernels_are_two_ways_to_say_one_thing():
    for row in (*ROWS, ATTENTION, NORM):
        assert row_of(kernel_of(row), row.time) == row


def test_a_file_that_repeats_the_model_changes_nothing(simulation):
    plain = model(simulation)
    rows = [replace(row, time=plain.kernel_s(kernel_of(row), 0)) for row in (*ROWS, ATTENTION, NORM)]
    own = Calibrated(
        calibration(gemm=tuple(rows[:3]), attention=(rows[3],), memory=(rows[4],)),
        simulation.cluster,
        lambda kernel: plain.kernel_s(kernel, 0),
    )
    assert [ratio for found in own.families().values() for ratio in found] == pytest.approx([1.0] * 5)


def all_reduce(simulation, cost, size, ranks):
    groups = (tuple(range(ranks)),)
    return alone_s(
        simulation.cluster,
        cost.collective(
            Collective("x", "all_reduce", "dp", size, "bf16", "nccl"), Communicator(f"dp{ranks}", "dp", groups, ())
        ),
    )


def test_a_collective_takes_the_measured_time_and_between_sizes_what_lies_between(simulation):
    plain = model(simulation)
    rows = tuple((size, all_reduce(simulation, plain, size, 8) * ratio) for size, ratio in ((2**20, 1.0), (2**24, 4.0)))
    own = model(simulation, calibration(nccl=(NcclCurve("all_reduce", 8, 1, rows),)))
    for size, time_s in rows:
        assert all_reduce(simulation, own, size, 8) == pytest.approx(time_s)
    middle = all_reduce(simulation, own, 2**22, 8) / all_reduce(simulation, plain, 2**22, 8)
    assert middle == pytest.approx(2.0)  # half way in the logarithms of size and ratio
    assert all_reduce(simulation, own, 2**28, 8) == pytest.approx(4 * all_reduce(simulation, plain, 2**28, 8))
    assert all_reduce(simulation, own, 2**24, 4) == pytest.approx(4 * all_reduce(simulation, plain, 2**24, 4))
    assert all_reduce(simulation, own, 2**24, 16) == all_reduce(
        simulation, plain, 2**24, 16
    )  # two nodes, another curve


def test_copies_take_the_measured_time(simulation):
    own = model(simulation, calibration(copies=(CopyRow("host_to_device", 2**28, 0.02),)))
    copy = Copy("c", "host_to_device", 2**28, "copy")
    assert alone_s(simulation.cluster, own.copy(copy, (0,))) == pytest.approx(0.02)


def test_slower_is_slower_by_that_much_alone(simulation):
    plain = model(simulation)
    group = Communicator("dp", "dp", (tuple(range(16)),), ())
    traffic = plain.collective(Collective("x", "all_gather", "dp", 2**27, "bf16", "nccl"), group)
    for ratio in (0.7, 1.0, 3.0):
        changed = slower(traffic, ratio)
        assert alone_s(simulation.cluster, changed) == pytest.approx(ratio * alone_s(simulation.cluster, traffic))
        assert changed.wire_bytes == traffic.wire_bytes


def test_a_thread_twice_as_slow_as_the_reference_takes_twice_as_long():
    # the block of the reference processor takes 9.627 and 6.753 us a kernel (sim/catalog/measured/host.yaml)
    same = host_coefficients("", "torch", False, HostTimes(9.627e-6, 6.753e-6, 4e-6))
    half = host_coefficients("", "torch", False, HostTimes(2 * 9.627e-6, 2 * 6.753e-6, 4e-6))
    for caller in ("forward", "backward", "framework", "checkpoint"):
        assert half.launch_s[caller] - 4e-6 == pytest.approx(2 * (same.launch_s[caller] - 4e-6))
    assert same.launch_s["forward"] == pytest.approx(4e-6 + 8.9e-6)
    assert not same.assumed
    assert half.points == pytest.approx(same.points / 2)


def test_predictions_say_what_came_from_the_file(simulation, tmp_path):
    text = (
        "calibration: 1\nprovenance: {date: '2026-11-21', gpu: h100-sxm-80gb, gpu_model: NVIDIA H100}\n"
        "gemm:\n- {m: 2048, n: 4096, k: 4096, dtype: bf16, time: 1 ms}\n"
    )
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    own = simulate(load_scenario_text(TEXT + "calibration: c.yaml\n", "x.yaml", folder=tmp_path))
    said = [
        words for words in own.report.warnings if words.startswith("calibrated by c.yaml (NVIDIA H100, 2026-11-21)")
    ]
    assert len(said) == 1
    assert "1 take the measured time" in said[0]
    assert own.report.time_s > simulation.report.time_s
