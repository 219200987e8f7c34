"""Laws of single kernels, for all shapes and GPUs: growth, bounds, order of precisions.

Growth is exact: the model picks the fastest of its tiles, each of which is slower for more work, so a larger product
is never faster as long as its dimensions are multiples of 64 (alignment: a padded matrix may well be faster, and is).
How much slower it is depends on waves. Attention grows with each dimension likewise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cost import efficiency
from sim.cost.attention import attention_s
from sim.cost.gemm import GemmCoefficients, gemm_bound_s, gemm_s
from sim.cost.memory_bound import memory_bound_s
from sim.cost.roofline import bound_s, machine_of
from tests.unit.test_cost_model import H100, RTX_4090, V100

L40S = dataclasses.replace(
    RTX_4090, name="l40s", memory_bytes_per_s=864e9, l2_bytes=96 * 2**20, num_sms=142, boost_clock_hz=2520e6,
    power_w=350, peak_flops={"bf16": 362.05e12, "fp16": 362.05e12, "tf32": 183e12, "fp8": 733e12, "fp32": 91.6e12},
)  # fmt: skip
A100 = dataclasses.replace(
    H100, name="a100-sxm-80gb", compute_capability=(8, 0), memory_bytes_per_s=2039e9, l2_bytes=40 * 2**20, num_sms=108,
    boost_clock_hz=1410e6, power_w=400, peak_flops={"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
)  # fmt: skip
GPUS = [H100, A100, L40S, RTX_4090, V100]
MORE = settings(max_examples=150, deadline=None)
GPU = st.sampled_from(GPUS)
SIXTY_FOURS = st.one_of(st.integers(1, 64), st.integers(1, 1024)).map(lambda i: 64 * i)
ROWS = st.one_of(st.integers(1, 4096), st.integers(1, 1 << 20))


def coefficients(gpu: Any, dtype: str) -> tuple[Any, GemmCoefficients]:
    return machine_of(gpu, dtype), efficiency.gemm_coefficients(efficiency.source_of(gpu), dtype)[0]


@MORE
@given(GPU, ROWS, SIXTY_FOURS, SIXTY_FOURS, st.integers(1, 64), st.integers(1, 4096), st.booleans())
def test_a_larger_matmul_is_never_faster(
    gpu: Any, m: int, n: int, k: int, batch: int, more: int, sustained: bool
) -> None:
    machine, c = coefficients(gpu, "bf16")
    base = gemm_s(m, n, k, batch, machine, c, 1.0, sustained)
    for larger in ((m + more, n, k, batch), (m, n + 64 * more, k, batch), (m, n, k + 64 * more, batch)):
        assert gemm_s(*larger, machine, c, 1.0, sustained) >= base * (1 - 1e-9)
    assert gemm_s(m, n, k, batch + more, machine, c, 1.0, sustained) >= base * (1 - 1e-9)


@MORE
@given(GPU, ROWS, SIXTY_FOURS, SIXTY_FOURS, st.integers(1, 64), st.sampled_from(["bf16", "fp8", "tf32", "fp32"]))
def test_no_matmul_beats_the_roofline(gpu: Any, m: int, n: int, k: int, batch: int, dtype: str) -> None:
    """Neither FLOPs at the dense peak, nor each byte once (beyond what the L2 can hold) at the bandwidth."""
    machine, c = coefficients(gpu, dtype)
    assert gemm_s(m, n, k, batch, machine, c) >= gemm_bound_s(m, n, k, batch, machine)


@MORE
@given(GPU, ROWS, SIXTY_FOURS, SIXTY_FOURS)
def test_less_precision_is_never_slower_and_every_kernel_takes_time(gpu: Any, m: int, n: int, k: int) -> None:
    """fp32 without tensor cores, tf32, 16 bit: peaks and bytes both improve, and they share coefficients."""
    times = [gemm_s(m, n, k, 1, *coefficients(gpu, dtype)) for dtype in ("fp32", "tf32", "fp16")]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 1e-6


@MORE
@given(SIXTY_FOURS, SIXTY_FOURS, SIXTY_FOURS)
def test_kernels_that_follow_each_other_are_no_faster_than_alone(m: int, n: int, k: int) -> None:
    for gpu in GPUS:
        machine, c = coefficients(gpu, "fp16")
        assert gemm_s(m, n, k, 1, machine, c, 1.0, True) >= gemm_s(m, n, k, 1, machine, c, 1.0, False)


SEQUENCE = st.integers(1, 65536)


@MORE
@given(
    GPU, st.sampled_from(["flash-2", "flash-3", "cudnn", "memory-efficient"]), st.booleans(), st.booleans(),
    st.integers(1, 64), st.sampled_from([(32, 8), (32, 32), (64, 1), (8, 2)]), SEQUENCE,
    st.sampled_from([64, 128, 256]), st.integers(1, 2048),
)  # fmt: skip
def test_attention_grows_and_never_beats_the_peak(
    gpu: Any, kernel: str, causal: bool, backward: bool, batch: int, heads: tuple[int, int], seq: int, head_dim: int,
    more: int,
) -> None:  # fmt: skip
    """Executed FLOPs: 4 (backward 10) for each visible pair of a query and a key and each element of the head."""
    machine = machine_of(gpu, "fp16")
    c, _ = efficiency.attention_coefficients(efficiency.source_of(gpu), kernel, backward)
    num_heads, kv_heads = heads

    def time_s(batch: int, queries: int, keys: int, head_dim: int) -> float:
        return attention_s(batch, num_heads, kv_heads, queries, keys, head_dim, causal, backward, machine, c)

    base = time_s(batch, seq, seq, head_dim)
    larger = (
        (batch + more, seq, seq, head_dim),
        (batch, seq + more, seq + more, head_dim),
        (batch, seq, seq + more, head_dim),
        (batch, seq, seq, head_dim + 64),
    )
    assert all(time_s(*shape) >= base * (1 - 1e-9) for shape in larger)
    pairs = seq * (seq + 1) / 2 if causal else seq * seq
    assert base >= bound_s((10 if backward else 4) * batch * num_heads * head_dim * pairs, 0, machine)
    assert base > 1e-6


@MORE
@given(
    GPU, st.sampled_from(
        [
            "elementwise", "norm", "softmax", "reduce", "amax", "gather", "scatter", "copy", "transpose", "columns",
            "optimizer",
        ]
    ),
    st.integers(0, 10**11), st.integers(0, 10**10),
)  # fmt: skip
def test_kernels_bound_by_memory_grow_and_never_beat_the_bandwidth(gpu: Any, kind: str, moved: int, more: int) -> None:
    """What the L2 cannot hold comes from memory; a larger tensor never takes less."""
    machine, c = machine_of(gpu, "fp32"), efficiency.memory_coefficients(gpu)
    base = memory_bound_s(kind, moved, 0, machine, c)
    assert base >= c.floor_s > 0
    assert base >= bound_s(0, moved - gpu.l2_bytes, machine)
    assert memory_bound_s(kind, moved + more, 0, machine, c) >= base
    assert memory_bound_s(kind, moved, more, machine, c) >= bound_s(more, 0, machine)
    drawing_s = memory_bound_s(kind, moved, 0, machine, c, more)
    assert max(base, more / (c.random_per_clock * machine.num_sms * machine.clock_hz)) <= drawing_s
    assert drawing_s <= base + more / (c.random_per_clock * machine.num_sms * machine.clock_hz) + 1e-12


@pytest.mark.parametrize("path", sorted(efficiency.MEASURED.glob("gemm_*.yaml")), ids=lambda path: path.stem)
def test_fitted_coefficients_state_residuals_within_ten_per_cent(path: Any) -> None:
    """Rows that the fit did not see, m >= 64; a file without residuals says that it is assumed."""
    import yaml

    data = yaml.safe_load(path.read_text())
    assert data["source"]
    assert data["date"]
    if data.get("kind") == "assumed":
        return
    assert data["script"] == "validation/measure/fit_gemm.py"
    for dtype in ("bf16", "fp8"):
        if dtype in data:
            assert data[dtype]["residuals_m_from_64"]["median_abs"] < 0.10
            assert data[dtype]["residuals_m_from_64"]["count"] > 200
