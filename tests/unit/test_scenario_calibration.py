"""Calibration files: read as they were written, and refused by line where they are wrong."""

from __future__ import annotations

import pytest

from sim.errors import ScenarioError
from sim.scenario.calibration import (
    AttentionRow,
    CopyRow,
    GemmRow,
    HostTimes,
    MemoryRow,
    NcclCurve,
    calibration_text,
    read_calibration,
)

ROWS = {
    "gemm": [GemmRow(8192, 4096, 1024, "bf16", 1.25e-4), GemmRow(64, 64, 4096, "fp16", 5e-6, 8, True)],
    "attention": [AttentionRow("flash-2", "backward", 1, 32, 8, 4096, 4096, 128, "bf16", 3e-4, False)],
    "memory": [MemoryRow("norm", 2**26, 4e-5)],
    "copies": [CopyRow("host_to_device", 2**28, 5e-3)],
}
HOST = HostTimes(9e-6, 7e-6, 4e-6)
CURVES = [NcclCurve("all_reduce", 16, 2, ((1024, 4e-5), (2**30, 8e-3)))]
PROVENANCE = {"date": "2026-11-21", "gpu": "h100-sxm-80gb", "gpu_model": "NVIDIA: H100 #1", "counts": {"gemm": 2}}


def read(tmp_path, text):
    path = tmp_path / "calibration.yaml"
    path.write_text(text, encoding="utf-8")
    return read_calibration(path, "calibration.yaml")


def problems(tmp_path, text):
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, text)
    return [str(finding) for finding in caught.value.findings]


def test_what_is_written_is_read_back(tmp_path):
    found = read(tmp_path, calibration_text(PROVENANCE, ROWS, HOST, CURVES))
    for name, rows in ROWS.items():
        for row, other in zip(rows, getattr(found, name), strict=True):
            assert row.time == pytest.approx(other.time, rel=1e-5)
            assert [getattr(row, f) for f in row.__slots__ if f != "time"] == [
                getattr(other, f) for f in row.__slots__ if f != "time"
            ]
    assert (found.host.forward, found.host.backward, found.host.driver) == pytest.approx((9e-6, 7e-6, 4e-6))
    assert [size for size, _ in found.nccl[0].rows] == [1024, 2**30]
    assert found.gpu == "h100-sxm-80gb"
    assert found.words == "calibration.yaml (NVIDIA: H100 #1, 2026-11-21)"


HEAD = "calibration: 1\nprovenance: {date: '2026-11-21'}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: llama-2-7b\n", "calibration.yaml:1: calibration is missing: this is no calibration file"),
        ("calibration: 2\n", "calibration.yaml:1: calibration is 2: this is no calibration file"),
        ("calibration: 1\n", "calibration.yaml:1: provenance does not say when this was measured"),
        (HEAD + "gemm:\n- {m: 1, n: 2, dtype: bf16, time: 3 us}\n", "calibration.yaml:4: gemm.0.k is missing"),
        (HEAD + "gemm:\n- {m: 1, n: 2, k: 3, dtype: bf16, time: 3}\n",
         "calibration.yaml:4: gemm.0.time: 3 is not a"),
        (HEAD + "gemm: 3\n", "calibration.yaml:3: gemm is not a list"),
        (HEAD + "memory:\n- {family: scatter, bytes: 3 B, time: 3 us}\n", "calibration.yaml:4: memory.0.family"),
        (HEAD + "nccl:\n- {collective: all_reduce, ranks: 8, nodes: 1, rows: [[1024, 3 us], [x, 2 us]]}\n",
         "calibration.yaml:4: row 2 is not a size and a time"),
        (HEAD + "host: {forwards: 3 us}\n", "calibration.yaml:3: unknown key host.forwards"),
        (HEAD + "kernels: []\n", "calibration.yaml:3: unknown key kernels"),
        ("", "calibration.yaml: is empty"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_by_line(tmp_path, text, said):
    assert any(finding.startswith(said) for finding in problems(tmp_path, text)), problems(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path):
    text = (
        HEAD + "gemm:\n- {m: 1, n: 2, k: x, dtype: bf16, time: 3 us}\n- {m: 1, n: 2, k: 3, dtype: bf17, time: 3 us}\n"
    )
    assert len(problems(tmp_path, text)) == 2


def test_a_wrong_curve_tells_its_wrong_rows_too(tmp_path):
    text = calibration_text(PROVENANCE, {}, HostTimes(), CURVES).replace("ranks: 16", "ranks: 0").replace("40 us", "40")
    assert [words.split("\n")[0] for words in problems(tmp_path, text)] == [
        "calibration.yaml:10: nccl.0.ranks: 0 is too small",
        "calibration.yaml:13: row 1 is not a size and a time",
    ]
