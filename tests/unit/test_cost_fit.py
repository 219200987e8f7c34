"""The fit scripts compute what the model computes, and run on a small file of measurements."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cost import efficiency
from sim.cost.attention import attention_s
from sim.cost.gemm import gemm_s
from sim.cost.roofline import Machine

SCRIPTS = Path(__file__).parents[2] / "validation" / "measure"
H100 = Machine(989.4e12, 2, 132, 1.83e9, 3350e9, 50 * 2**20)
SOURCE = efficiency.Source("h100-sxm", True, "", 1.0)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fit_attention
    import fit_gemm

    yield fit_gemm, fit_attention
    sys.modules.pop("fit_attention")
    sys.modules.pop("fit_gemm")


def test_the_arrays_of_the_gemm_script_are_the_model(scripts: Any) -> None:
    coefficients, _ = efficiency.gemm_coefficients(SOURCE, "bf16")
    random = np.random.default_rng(0)
    shapes = np.exp2(random.uniform(0, 15, size=(200, 3))).astype(int)
    theta = [getattr(coefficients, name) for name in type(coefficients).__dataclass_fields__]
    vector = scripts[0].times(np.array([*theta, 0, 1, 0]), *shapes.T.astype(float), H100)
    one_by_one = [gemm_s(m, n, k, 1, H100, coefficients) for m, n, k in shapes.tolist()]
    assert np.allclose(vector, one_by_one, rtol=1e-3)


@pytest.mark.parametrize("backward", [False, True])
def test_the_arrays_of_the_attention_script_are_the_model(scripts: Any, backward: bool) -> None:
    coefficients, _ = efficiency.attention_coefficients(SOURCE, "flash-3", backward)
    theta = np.array([getattr(coefficients, name) for name in scripts[1].FIELDS])
    rows = [
        (b, 32, kv, s, d, c)
        for b in (1, 8)
        for kv in (8, 32)
        for s in (512, 1000, 16384)
        for d in (64, 128)
        for c in (0, 1)
    ]
    vector = scripts[1].times(theta, np.array(rows, float), backward, H100)
    one_by_one = [attention_s(b, h, kv, s, s, d, bool(c), backward, H100, coefficients) for b, h, kv, s, d, c in rows]
    assert np.allclose(vector, one_by_one, rtol=1e-6)


def test_the_gemm_script_runs_on_a_file_of_measurements(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times that the model itself made, 8 % slower by turns: the fit's held-out error is about as small."""
    coefficients, _ = efficiency.gemm_coefficients(SOURCE, "bf16")
    lines = ["system\tsource\tgemm_dtype\tm\tn\tk\tus"]
    sizes = [2**i for i in range(8, 15)]
    for i, (m, n, k) in enumerate((m, n, k) for m in sizes for n in sizes[::2] for k in sizes[::2]):
        us = gemm_s(m, n, k, 1, H100, coefficients) * 1e6 * (1.08 if i % 2 else 1.0)
        lines.append(f"h100_sxm\tsynthetic\tbfloat16\t{m}\t{n}\t{k}\t{us}")
    path = tmp_path / "gemm.tsv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "argv", ["fit_gemm.py", str(path), "--only", "h100-sxm", "--iterations", "300"])
    scripts[0].main()
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:2] == ["h100-sxm", "bf16"]
    assert float(row[3].rstrip("%")) < 15
