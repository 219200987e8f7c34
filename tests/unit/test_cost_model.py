"""CostModel and the kernel models: what a kernel costs, and what is said about how that is known."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sim.catalog.load import gpu
from sim.catalog.schema import GpuFacts
from sim.cost import efficiency
from sim.cost.gemm import GemmCoefficients, alignment_factor, gemm_bound_s, gemm_s
from sim.cost.model import CostModel, CostSettings
from sim.cost.roofline import Machine, machine_of, peak_of
from sim.ir.ledger import Attention, Dim, Gemm, Pointwise, Tensor
from sim.ir.program import HostCompute

H100 = GpuFacts(
    name="h100-sxm-80gb", vendor="nvidia", architecture="hopper", compute_capability=(9, 0),
    memory_bytes=80 * 2**30, total_memory_bytes=81082 * 2**20, memory_bytes_per_s=3350e9, l2_bytes=50 * 2**20,
    num_sms=132, boost_clock_hz=1830e6, power_w=700,
    peak_flops={"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp8": 1978.9e12, "fp32": 66.9e12},
    cuda_context_bytes=525 * 2**20,
)  # fmt: skip
RTX_4090 = dataclasses.replace(
    H100, name="rtx-4090", architecture="ada", compute_capability=(8, 9), memory_bytes_per_s=1008e9,
    l2_bytes=72 * 2**20, num_sms=128, boost_clock_hz=2520e6, power_w=450,
    peak_flops={"bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12, "fp8": 330.3e12, "fp32": 82.6e12},
)  # fmt: skip
V100 = dataclasses.replace(
    H100, name="v100-sxm2-32gb", architecture="volta", compute_capability=(7, 0), memory_bytes_per_s=900e9,
    l2_bytes=6 * 2**20, num_sms=80, boost_clock_hz=1530e6, power_w=300, peak_flops={"fp16": 125e12, "fp32": 15.7e12},
)  # fmt: skip


def model(gpu: GpuFacts = H100, **settings: Any) -> CostModel:
    node = SimpleNamespace(host_memory_bytes_per_s=400e9, num_cpu_cores=112, cpu="2x Intel Xeon Platinum 8480C")
    cluster: Any = SimpleNamespace(gpus_per_node=8, spec=SimpleNamespace(node=node), links=())
    return CostModel(cluster, gpu, CostSettings(**settings))


def gemm(m: int, n: int, k: int, dtype: Any = "bf16") -> Gemm:
    return Gemm((Dim("seq", m),), (Dim("ffn", n),), (Dim("hidden", k),), dtype)


def attention(seq: int, direction: Any = "forward", kernel: str = "flash-2", causal: bool = True) -> Attention:
    def dim(name: str, size: int) -> tuple[Dim, ...]:
        return (Dim(name, size),)

    return Attention(
        kernel, direction, dim("batch", 16384 // seq), dim("heads", 16), dim("kv_heads", 16), dim("seq", seq),
        dim("seq", seq), dim("head_dim", 128), causal, "bf16",
    )  # fmt: skip


def pointwise(kind: str, num_elements: int) -> Pointwise:
    x = Tensor("x", (Dim("hidden", num_elements),), "bf16")
    return Pointwise(kind, (x,), (x,))


def test_a_large_matmul_on_h100_runs_at_three_quarters_of_peak() -> None:
    """m 4096, n = k = 8192 was measured at 0.69-0.78 ms, 710-800 TFLOP/s, around m = 2048 to 8192."""
    tflops = 2 * 4096 * 8192 * 8192 / model().kernel_s(gemm(4096, 8192, 8192), 0) / 1e12
    assert 650 < tflops < 800


def test_a_matmul_of_few_rows_reads_its_weights() -> None:
    """m = 64: 16384 x 4096 weights of 134 MB; 47-50 us measured, 2.8 TB/s."""
    assert model().kernel_s(gemm(64, 16384, 4096), 0) == pytest.approx(49e-6, rel=0.1)


def test_short_benchmarks_are_faster_than_training() -> None:
    kernel = gemm(2048, 4096, 4096)
    assert model(sustained=False).kernel_s(kernel, 0) < model().kernel_s(kernel, 0)


def test_one_tile_more_than_sms_costs_a_wave() -> None:
    """108 SMs, whole waves, no other cost: 216 tiles of 256 x 128 fill two waves, one row more needs part of a third.

    The best answer to that row are tiles of 64 x 64: 16 waves of an eighth of a tile become 17.
    """
    machine = Machine(108 * 2e12, 2, 108, 1.41e9, 1e18, 2**40)
    ideal = GemmCoefficients(
        peak_fraction=1, l2_bytes_per_clock=1e9, prologue_clocks=0, floor_s=0, memory_fraction=1, overlap_exponent=1,
        tail_smoothing=0, block_rows=1e9, resident_fraction=1, droop=0, droop_s=1, exposed_result=0,
    )  # fmt: skip
    full = gemm_s(216 * 256, 128, 4096, 1, machine, ideal)
    assert full == pytest.approx(2 * 256 * 128 * 2 * 4096 / 2e12, rel=1e-4)
    assert gemm_s(216 * 256 + 1, 128, 4096, 1, machine, ideal) == pytest.approx(full * 17 / 16, rel=1e-4)
    smooth = dataclasses.replace(ideal, tail_smoothing=1)
    assert gemm_s(216 * 256 + 1, 128, 4096, 1, machine, smooth) < full * 1.01


def test_rows_that_are_not_aligned_lose_the_wide_loads() -> None:
    """d_ff 10922 (4-byte rows) against 10944 on H100: 272.7 and 398.4 TFLOP/s, a factor of 0.68; odd rows a third."""
    align = efficiency.ALIGNMENT
    assert alignment_factor(10944, 4096, 2, align) == 1.0
    assert alignment_factor(10922, 4096, 2, align) == align.four_bytes
    assert alignment_factor(50257, 768, 2, align) == align.two_bytes
    assert model().kernel_s(gemm(4096, 50257, 768), 0) > 2 * model().kernel_s(gemm(4096, 50304, 768), 0)
    gradient = Gemm((Dim("vocab", 50257),), (Dim("hidden", 768),), (Dim("batch", 3), Dim("seq", 1023)), "bf16")
    padded = dataclasses.replace(gradient, m=(Dim("vocab", 50304),))
    odd_tokens = dataclasses.replace(padded, k=(Dim("seq", 3072),))
    assert model().kernel_s(gradient, 0) > 2 * model().kernel_s(padded, 0)
    assert model().kernel_s(padded, 0) == pytest.approx(model().kernel_s(odd_tokens, 0), rel=0.01)


def test_batched_products_of_rows_that_are_not_aligned_run_at_the_measured_rates_on_ampere() -> None:
    """384 times [1024, 1024] by [1024, 140] on A100: 53.89 TFLOP/s in fp16, 12.21 in bf16 (pytorch/pytorch #83272)."""
    ampere = gpu("a100-sxm-40gb")
    for dtype, measured in (("fp16", 53.89), ("bf16", 12.21)):
        coefficients, _ = efficiency.gemm_coefficients(efficiency.source_of(ampere), dtype)
        factor = alignment_factor(140, 1024, 2, efficiency.alignment_of(ampere, dtype, 384))
        time_s = gemm_s(1024, 140, 1024, 384, machine_of(ampere, dtype), coefficients, factor)
        assert 2 * 384 * 1024 * 1024 * 140 / time_s == pytest.approx(measured * 1e12, rel=0.01)
        assert efficiency.alignment_of(ampere, dtype, 1) == efficiency.ALIGNMENT
    assert efficiency.alignment_of(gpu("h100-sxm-80gb"), "bf16", 384) == efficiency.ALIGNMENT


@pytest.mark.parametrize(("kernel", "expected"), [("flash-2", 335), ("sdpa", 335), ("flash-3", 616)])
def test_causal_attention_forward_as_its_authors_plot_it(kernel: str, expected: float) -> None:
    """TFLOP/s at 16k tokens, 16 heads of 128, H100: flash-attention @0251105a, assets."""
    op = attention(16384, kernel=kernel)
    assert op.flops / model().kernel_s(op, 0) / 1e12 == pytest.approx(expected, rel=0.06)


def test_cudnn_attention_is_between_its_plots_of_2024_and_its_benchmark_of_2026() -> None:
    """16k tokens, causal: 16 heads on H100 539 TFLOP/s (flash-attention @0251105a), 64 on H200 673 (cudnn-frontend)."""
    op = attention(16384, kernel="cudnn")
    assert 539 < op.flops / model().kernel_s(op, 0) / 1e12 < 673


def test_sdpa_is_what_torch_would_run() -> None:
    """FlashAttention-2 needs compute capability 8.0, cuDNN comes first on 10.0 (sdp_utils.cpp)."""
    b200 = dataclasses.replace(H100, compute_capability=(10, 0))
    assert [efficiency.sdpa_kernel(gpu)[0] for gpu in (V100, RTX_4090, b200)] == [
        "memory-efficient",
        "flash-2",
        "cudnn",
    ]
    cost = model(V100)
    old = dataclasses.replace(attention(4096, kernel="sdpa"), dtype="fp16")
    new = dataclasses.replace(attention(4096, kernel="flash-2"), dtype="fp16")
    assert cost.kernel_s(old, 0) == pytest.approx(2 * cost.kernel_s(new, 0), rel=0.1)


def test_flash_2_does_not_gain_from_the_new_matmul_instructions_of_blackwell() -> None:
    """B200: 148 SMs at 1856 MHz against 132 at 1830: 1.14 times as fast as on H100, not 2.3 times."""
    b200 = dataclasses.replace(
        H100, compute_capability=(10, 0), num_sms=148, boost_clock_hz=1856e6, power_w=1000,
        peak_flops={"bf16": 2250e12, "fp32": 75e12}, memory_bytes_per_s=8000e9, l2_bytes=126 * 2**20,
    )  # fmt: skip
    op = attention(16384)
    assert model().kernel_s(op, 0) / model(b200).kernel_s(op, 0) == pytest.approx(1.14, rel=0.05)


def test_attention_backward_of_flash_3_as_its_paper_plots_it() -> None:
    """Not causal, 16k: 561 TFLOP/s (arXiv 2407.08608, figure 6)."""
    op = attention(16384, "backward", "flash-3", causal=False)
    assert op.flops / model().kernel_s(op, 0) / 1e12 == pytest.approx(561, rel=0.06)


def test_a_large_addition_reaches_its_share_of_the_bandwidth_and_a_small_one_the_floor() -> None:
    cost = model()
    big = pointwise("elementwise", 2**30)
    assert big.moved_bytes / cost.kernel_s(big, 0) == pytest.approx(0.92 * 3350e9, rel=0.01)
    assert cost.kernel_s(pointwise("elementwise", 64), 0) == pytest.approx(3e-6, rel=0.01)


def test_v100_has_no_bf16_and_runs_it_at_the_next_best_rate() -> None:
    assert peak_of(V100, "bf16") == (125e12, "fp16")
    assert peak_of(V100, "fp32") == (15.7e12, "fp32")
    cost = model(V100)
    assert cost.kernel_s(gemm(4096, 4096, 4096, "fp16"), 0) < cost.kernel_s(gemm(4096, 4096, 4096, "fp32"), 0) / 3


def test_measured_gpus_are_recognised_by_their_figures_and_others_say_whose_shares_they_take() -> None:
    assert efficiency.source_of(H100).same
    assert efficiency.source_of(dataclasses.replace(H100, memory_bytes_per_s=2400e9)).same is False
    cost = model()
    cost.kernel_s(gemm(4096, 4096, 4096), 0)
    assert cost.assumptions() == ()
    assert (cost.num_kernels, cost.num_assumed_kernels) == (1, 0)
    other = model(RTX_4090)
    other.kernel_s(gemm(4096, 4096, 4096), 0)
    other.kernel_s(attention(4096), 0)
    assert (other.num_kernels, other.num_assumed_kernels) == (2, 2)
    assert "rtx-pro-6000" in other.assumptions()[0]


def test_assumptions_stand_in_one_order_whichever_kernel_is_first() -> None:
    """Which kernel is priced first depends on how ranks are folded."""
    one, other = model(RTX_4090), model(RTX_4090)
    kernels = [gemm(4096, 4096, 4096), gemm(4096, 4096, 4096, "fp16"), attention(4096)]
    for kernel in kernels:
        one.kernel_s(kernel, 0)
    for kernel in reversed(kernels):
        other.kernel_s(kernel, 0)
    assert one.assumptions() == other.assumptions()
    assert [text.split()[0] for text in one.assumptions()] == ["matmuls", "matmuls", "attention"]


def test_what_holds_of_forward_and_backward_is_said_once() -> None:
    cost = model(gpu("b200-sxm-180gb"))
    for direction in ("forward", "backward"):
        cost.kernel_s(attention(4096, direction), 0)
    (said,) = (text for text in cost.assumptions() if text.startswith("attention"))
    assert said.startswith("attention (flash-2) on b200-sxm-180gb: ")
    assert said.endswith("(2 different kernels)")


def test_a_power_limit_lowers_the_clock_as_measured() -> None:
    """500 W instead of 700 W: ((5/7 - 0.34) / 0.66)^0.31 = 0.839, not (5/7)^(1/3) = 0.894."""
    capped = dataclasses.replace(H100, power_w=500)
    source = efficiency.source_of(capped)
    assert source.limited == pytest.approx(((5 / 7 - 0.34) / 0.66) ** 0.31)
    assert source.power == pytest.approx((5 / 7) ** (1 / 3))
    assert efficiency.source_of(H100).limited == 1.0
    cost = model(capped)
    slower = cost.kernel_s(gemm(8192, 8192, 8192), 0) / model().kernel_s(gemm(8192, 8192, 8192), 0)
    assert slower == pytest.approx(1 / source.limited, rel=0.01)
    assert cost.kernel_s(attention(8192), 0) == pytest.approx(model().kernel_s(attention(8192), 0) / source.limited)
    assert any("power limit" in text for text in cost.assumptions())


def test_a_card_made_for_less_power_runs_at_the_cube_root_of_the_ratio() -> None:
    """H100 PCIe: 350 W for 756 TFLOP/s against 700 W for 989."""
    source = efficiency.source_of(gpu("h100-pcie-80gb"))
    assert source.limited == 1.0
    assert source.power == pytest.approx((350 / 756 * 989.4 / 700) ** (1 / 3), rel=1e-3)
    cost = model(gpu("h100-pcie-80gb"))
    cost.kernel_s(gemm(4096, 4096, 4096), 0)
    assert any("cube root" in text for text in cost.assumptions())


def test_a_slow_rank_is_slow_and_the_others_are_not() -> None:
    cost, kernel = model(slow={3: 1.5}), gemm(1024, 1024, 1024)
    assert cost.kernel_s(kernel, 3) == 1.5 * cost.kernel_s(kernel, 0)


def test_equal_kernels_are_priced_once() -> None:
    cost = model()
    assert cost.kernel_s(gemm(512, 512, 512), 0) == cost.kernel_s(gemm(512, 512, 512), 7)
    assert cost.num_kernels == 1


def test_cpu_adam_shares_the_memory_of_the_node() -> None:
    """8 ranks of one node, 1e9 elements each: 8 * 28 GB at half of 400 GB/s = 1.12 s, however they are folded."""
    work = HostCompute("adam", "cpu_adam", 10**9)
    assert model().host_s(work, tuple(range(16))) == pytest.approx(8 * 28e9 / 200e9)
    assert model().host_s(work, (0,)) == model().host_s(work, (0, 8)) == model().host_s(work, tuple(range(16)))
    one = 10**9 * 28 / 19.9e9  # a core of Sapphire Rapids moves 19.9 GB/s
    assert model(cpu_threads=1).host_s(work, (0,)) == pytest.approx(one)
    for threads in (4, 64):
        assert model(cpu_threads=threads).host_s(work, (0,)) == model().host_s(work, (0,))
    slower = 917 * 3.8 / (770 * 3.8)  # Zen 5, on which it was measured, over Sapphire Rapids, at the same clock
    assert model().host_s(HostCompute("loop", "python", 1000), (0,)) == pytest.approx(50e-6 * slower)


def test_compiled_code_is_issued_faster() -> None:
    kernel = gemm(64, 64, 64)
    assert model(compiled=True).launch_s(kernel, 0) < model().launch_s(kernel, 0)
    assert model().issue_s(0) > 0


def test_nothing_beats_the_roofline_even_without_a_floor() -> None:
    machine = machine_of(H100, "bf16")
    assert gemm_bound_s(8192, 8192, 8192, 1, machine) == pytest.approx(2 * 8192**3 / 989.4e12)


@pytest.mark.parametrize(
    ("kernel", "head_dim", "tflops"),
    [("flash-1", 128, 83), ("flash-1", 64, 97), ("flash-triton", 128, 80), ("memory-efficient", 128, 92)],
)
def test_earlier_kernels_reach_what_was_plotted_on_a100(kernel: str, head_dim: int, tflops: float) -> None:
    """flash-attention, assets/flash2_a100_fwd_bwd_benchmark.png: causal, one sequence of 16k, width 2048, both ways."""
    cost = model(gpu("a100-sxm-80gb"))
    sequence = (Dim("seq", 16384),)
    heads, head = (Dim("heads", 2048 // head_dim),), (Dim("head_dim", head_dim),)
    ways: tuple[Any, ...] = ("forward", "backward")
    total = sum(
        cost.kernel_s(
            Attention(kernel, way, (Dim("batch", 1),), heads, heads, sequence, sequence, head, True, "bf16"), 0
        )
        for way in ways
    )  # fmt: skip
    assert 14 * 16384**2 * 2048 / 2 / total / 1e12 == pytest.approx(tflops, rel=0.2)


def test_b200_falls_to_half_its_peak_where_matmuls_follow_each_other() -> None:
    """SimuMax's table, measured on B200: products of 1e11 FLOP and more reach 0.45 to 0.5 of 2250 TFLOP/s."""
    b200 = gpu("b200-sxm-180gb")
    kernel = gemm(4096, 28672, 8192)
    flops = 2 * 4096 * 28672 * 8192
    assert 0.44 < flops / model(b200).kernel_s(kernel, 0) / 2250e12 < 0.51
    assert flops / model(b200, sustained=False).kernel_s(kernel, 0) / 2250e12 > 0.6


def test_a_matmul_of_as_many_tiles_as_sms_needs_a_second_wave_beside_a_gather() -> None:
    """132 tiles of 128 x 256 on an H100, 24 SMs gather: MFU 80 to 47 % (forums.developer.nvidia.com/t/337991)."""
    kernel = gemm(128 * 12, 256 * 11, 8192)
    ratio = model().beside_s(kernel, 0, 24, 0.0) / model().kernel_s(kernel, 0)
    assert 1.4 < ratio < 2.0


def test_hopper_s_matmuls_take_two_turns_beside_a_gather() -> None:
    """FSDP's take "2x as long" beside NCCL on 10 % of the SMs (pytorch/pytorch #143988): each block has its tiles from
    the start. What the power limit takes is taken once. On other GPUs other blocks take the tiles over."""
    kernel = gemm(16384, 8192, 8192)
    ratio = model().beside_s(kernel, 0, 13, 0.0) / model().kernel_s(kernel, 0)
    assert 1.7 < ratio < 2.0
    assert model().beside_s(kernel, 0, 2, 0.0) == model().beside_s(kernel, 0, 13, 0.0)
    assert model().waits_for_sms(kernel, 2)
    assert not model().waits_for_sms(kernel, 1)  # a block that waits for flags
    assert not model().waits_for_sms(dataclasses.replace(kernel, margin=16), 16)
    for other in (gpu("a100-sxm-80gb"), gpu("b200-sxm-180gb")):
        assert model(other).beside_s(kernel, 0, 13, 0.0) / model(other).kernel_s(kernel, 0) < 1.3
        assert not model(other).waits_for_sms(kernel, 13)


def test_a_matmul_of_few_blocks_finds_room_beside_a_gather() -> None:
    kernel = gemm(1024, 1024, 8192)
    small = model().waits_for_sms(kernel, 4)
    assert not small
    assert model().beside_s(kernel, 0, 4, 0.0) == model().kernel_s(kernel, 0)
    assert not model().waits_for_sms(attention(4096), 24)


def test_exchanges_over_user_buffers_take_their_own_sms() -> None:
    """Transformer Engine's ``num_sm``, which its products leave, not NCCL's 24 channels; never more than it has."""
    from sim.ir.traffic import Traffic

    ring, shift = Traffic("ring/Simple", (), 0, 24), Traffic("copy", (), 0, 1)
    assert [model(exchange_sms=16).exchanged(traffic).sms for traffic in (ring, shift)] == [16, 1]
    assert model().exchanged(ring) is ring


@pytest.mark.parametrize(
    ("tiles", "left", "turns"),
    [
        (264, 108, 4),  # two each: 24 blocks begin when the first have done theirs
        (300, 108, 4),  # 96 blocks have two, 36 three: 24 of 72 that run have two, and 24 wait with two
        (390, 108, 6),  # six blocks have two
        (370, 108, 5),  # 26 blocks have two: 24 wait with two, but all but two of those that run have three
        (140, 108, 2),  # eight blocks have two, the others one: two turns of one are no longer
    ],
)
def test_how_many_tiles_follow_each_other_in_two_turns(tiles: int, left: int, turns: int) -> None:
    """132 blocks."""
    from sim.cost.gemm import _turns

    assert _turns(tiles, 132, left) == turns


def test_kernels_bound_by_memory_share_its_bandwidth() -> None:
    """A large copy at 3/4 of the bandwidth takes 4/3 of its time; a compute-bound matmul is hardly slower."""
    large = Tensor("x", (Dim("numel", 2**28),), "bf16")
    copy = Pointwise("elementwise", (large,), (large,))
    quarter = H100.memory_bytes_per_s / 4
    assert model().beside_s(copy, 0, 0, quarter) / model().kernel_s(copy, 0) == pytest.approx(4 / 3, rel=0.02)
    kernel = gemm(8192, 8192, 8192)
    assert model().beside_s(kernel, 0, 0, quarter) / model().kernel_s(kernel, 0) < 1.1


@pytest.mark.parametrize("sms", [1, 8, 16, 24, 32])
def test_the_more_sms_are_taken_the_slower(sms: int) -> None:
    for kernel in (gemm(4096, 4096, 4096), attention(4096)):
        assert model().beside_s(kernel, 0, sms, 0.0) <= model().beside_s(kernel, 0, sms + 8, 0.0)


def test_adding_to_c_in_fp32_takes_what_its_bytes_leave_exposed() -> None:
    """C of 4096 x 4096 is read and written in 4 bytes, not written in 2: 6 bytes more, of which A100 exposes 0.41."""
    plain, a100 = gemm(4096, 4096, 4096), gpu("a100-sxm-80gb")
    adding = dataclasses.replace(plain, result="fp32", accumulates=True)
    fraction = efficiency.gemm_coefficients(efficiency.source_of(a100), "bf16")[0].memory_fraction
    more = model(a100).kernel_s(adding, 0) - model(a100).kernel_s(plain, 0)
    assert more == pytest.approx(0.41 * 6 * 4096**2 / (fraction * a100.memory_bytes_per_s))


def test_training_runs_at_the_clock_that_long_matmuls_settle_at() -> None:
    """GB200 in FP8: 0.595 of the time at peak on top, for short products as for long ones; A100's table has it."""
    gb200, short = gpu("gb200-186gb"), gemm(1024, 4096, 4096, "fp8")
    burst, training = (model(gb200, sustained=s).kernel_s(short, 0) for s in (False, True))
    assert training - burst > 0.5 * 2 * 1024 * 4096 * 4096 / 5000e12
    source = efficiency.source_of(gpu("a100-sxm-80gb"))
    assert efficiency.sustained_droop(source, "bf16", 0.08) == 0.08


def test_attention_runs_at_the_clock_that_long_kernels_settle_at() -> None:
    """B200, 16 heads over 131,072 tokens: 63.3 and 189.2 ms; 0.153 and 0.147 of the time at peak is the clock's."""
    b200 = gpu("b200-sxm-180gb")
    ways: tuple[tuple[Any, float, float], ...] = (("forward", 63.2572e-3, 0.153), ("backward", 189.1638e-3, 0.147))
    for way, measured_s, droop in ways:
        kernel = dataclasses.replace(
            attention(131072, way, "cudnn"), batch=(Dim("batch", 1),), kv_heads=(Dim("kv_heads", 2),)
        )
        burst, training = (model(b200, sustained=s).kernel_s(kernel, 0) for s in (False, True))
        assert training == pytest.approx(measured_s, rel=0.02)
        assert training - burst == pytest.approx(droop * kernel.flops / b200.peak_flops["bf16"], rel=2e-3)
    for name, droop in (("gb200-186gb", 0.194), ("gb300-288gb", 0.208), ("b300-sxm-288gb", 0.208)):
        assert efficiency.attention_droop(efficiency.source_of(gpu(name)), "cudnn", backward=True) == droop
    h100 = attention(8192, "forward", "cudnn")  # in its matmuls' settled clock
    assert model(sustained=False).kernel_s(h100, 0) == model().kernel_s(h100, 0)


@pytest.mark.parametrize(
    ("dtype", "measured_ms"), [("bf16", 13.102), ("fp8", 6.812), ("mxfp8", 7.161), ("nvfp4", 3.764)]
)
def test_b300_multiplies_as_transformer_engine_s_own_profile_of_it(dtype: str, measured_ms: float) -> None:
    """Twelve products of a layer of a 5B model on 15,872 tokens (docs/examples/gemm_profiling, operands quantised)."""
    b300, tokens = gpu("b300-sxm-288gb"), 15872
    linears = ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096))
    shapes = [s for k, n in linears for s in ((tokens, n, k), (tokens, k, n), (k, n, tokens))]
    total_s = sum(model(b300).kernel_s(gemm(m, n, k, dtype), 0) for m, n, k in shapes)
    assert total_s == pytest.approx(measured_ms * 1e-3, rel=0.035)


@pytest.mark.parametrize(("name", "more_ms"), [("b300-sxm-288gb", 1.345), ("h200-sxm-141gb", 1.307)])
def test_looking_for_the_largest_value_takes_as_long_on_either_memory(name: str, more_ms: float) -> None:
    """The same profile, current less delayed scaling: 2.48e9 elements in 24 tensors, a launch each beside the pass."""
    one = Pointwise("amax", (Tensor("x", (Dim("hidden", 2_482_000_000 // 24),), "bf16"),), ())
    assert 24 * (model(gpu(name)).kernel_s(one, 0) + 3e-6) == pytest.approx(more_ms * 1e-3, rel=0.15)


def test_v100_runs_real_numbers_slower_than_zeros() -> None:
    """DeepBench multiplies zeros (106 TFLOP/s). With randn three cards reach 95, 97.4 and 94.8 for seconds, each 6.7 to
    6.8 times its own fp32 rate, of which the median card keeps 13.68 for minutes."""
    v100, kernel, flops = gpu("v100-sxm2-32gb"), gemm(8192, 8192, 8192, "fp16"), 2 * 8192**3
    assert flops / model(v100, sustained=False).kernel_s(kernel, 0) == pytest.approx(106e12, rel=0.02)
    assert flops / model(v100).kernel_s(kernel, 0) == pytest.approx(6.76 * 13.68e12, rel=0.01)


def test_products_that_promote_their_sums_are_slower_on_hopper_alone() -> None:
    """1.1 to 1.2 measured: 1.15 on the main loop, beside what the clock and the writing of C take. None in bf16."""
    for name, dtype, longer in (
        ("h100-sxm-80gb", "fp8", 1.12), ("h100-sxm-80gb", "bf16", 1.0), ("b200-sxm-180gb", "fp8", 1.0),
    ):  # fmt: skip
        plain = gemm(8192, 8192, 8192, dtype)
        cost = model(gpu(name))
        promoting = cost.kernel_s(dataclasses.replace(plain, promotes=True), 0)
        assert promoting / cost.kernel_s(plain, 0) == pytest.approx(longer, abs=0.005)
