"""How long a matrix multiplication takes: tiles, waves, operand traffic, power.

C[m, n] = A[m, k] B[k, n] is cut into tiles of C; an SM works on one tile at a time, and where there are
fewer tiles than SMs the depth k may be cut as well (split-K). For one choice of tile TM x TN and split s:

    depth    = ceil(k / s), in steps of 64
    tile     = prologue + depth * max(2 TM TN / (f * peak / SMs), (TM + TN) * e / L2 rate of an SM)
    waves    = 1 if tiles <= SMs, else (1 - q) * ceil(tiles / SMs) + q * tiles / SMs
    compute  = waves * tile
    memory   = max(compulsory bytes, bytes with re-reads) / achieved bandwidth  +  partial sums through the L2
    together = (compute^p + memory^p)^(1/p)  +  exposed * bytes of C / achieved bandwidth

with e bytes an element. The library picks the tile and the split; so does the model (the fastest). A and B together
larger than the L2 are read again for each block of ``block_rows`` rows or columns. A compute-bound kernel that runs
long draws more power than the GPU may, and the clock falls: the compute time grows by ``droop`` as the kernel's time
grows past ``droop_s``.

    T = floor + together + droop * (FLOPs / peak) * x,    x = together / (together + droop_s), 1 when sustained

A product that adds to C in place, or writes it wider, moves more than one 16-bit write of C (:func:`result_s`): an SM
reads its tile of C when the main loop is over and writes it; other SMs' main loops hide that but for ``exposed``.

    more = exposed * (bytes of C read and written - 2 m n) / achieved bandwidth

Hopper's kernels are persistent: as many blocks as SMs, each of which works through tiles that are its own from the
start. Where others hold SMs, as many blocks wait until one is free, and then have all of their tiles before them: the
main loops take up to two turns, of which most SMs are idle in the second (pytorch/pytorch #143988: FSDP's matmuls on
H100 take 2x as long beside NCCL, which holds 10 % of the SMs; #147966; NVIDIA/Fuser #5742: a trace of cuBLAS's grid of
2 x 66 blocks on H100's 132 SMs). What the power limit takes goes with FLOPs and is taken once. Before Hopper each tile
is a block, which the GPU sends to whatever SM is free; from Blackwell on blocks ask for their next tile (cluster launch
control: CUTLASS, ``media/docs/cpp/blackwell_cluster_launch_control.md``, which draws the difference): there whole waves
of the SMs that are left.

Which operand is transposed (forward TN, gradient of the input NN, of the weight NT) makes no difference to 16-bit
tensor cores, which take both orders from shared memory: 0.718 and 0.716 of the peak on A100, 0.496 and 0.491 on B200
for TN and NN; NT is 0.509 where it writes 16 bits (MooreThreads/SimuMax @4dcaae5, configs/system). Volta, which cannot
load transposed (``ldmatrix`` came with Turing), is 3 % slower in TN, 2 and 6 % faster in NN and NT than its numbers
below have it (validation/measure/gemm_v100.tsv): a step has all three, their sum is right.

Sources: NVIDIA, "Matrix Multiplication Background User's Guide" (tiles, wave quantisation, alignment); CUTLASS,
``media/docs/efficient_gemm.md`` (tile hierarchy, split-K, stream-K: q towards 1); Osama et al., "Stream-K", PPoPP 2023.
Leaves out: the heuristics of cuBLAS, which now and then choose badly. Grows with each dimension as long as dimensions
are multiples of 64. Checked by: tests/laws/test_cost_laws.py, validation/measure/fit_gemm.py,
validation/measure/fit_accumulation.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sim.cost.roofline import Machine, bound_s

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
"""Thread-block tiles that cuBLAS and CUTLASS ship for tensor cores (CUTLASS, ``media/docs/efficient_gemm.md``)."""
SPLITS = (1, 2, 4, 8, 16)
PERSISTENT = ((9, 0),)
"""Compute capabilities whose matmuls have blocks that stay to the end, with tiles given out beforehand."""
DEPTH_STEP = 64
"""Elements of k that a tile loads at a time (cutlass default of 128 bytes of 16-bit elements)."""


@dataclass(frozen=True, slots=True)
class GemmCoefficients:
    """What the formulas cannot know, fitted on measured times of one GPU and precision.

    ``peak_fraction``       share of the dense peak in a tile's main loop
    ``l2_bytes_per_clock``  operand bytes that one SM takes from the L2 in a clock
    ``prologue_clocks``     clocks to fill the pipeline and write the tile of C
    ``floor_s``             the shortest kernel
    ``memory_fraction``     share of the memory bandwidth that is achieved
    ``overlap_exponent``    p above: 1 adds compute and memory, infinity hides the shorter
    ``tail_smoothing``      q above: 0 whole waves, 1 as if work were divided evenly
    ``block_rows``          side of the block of C whose operands stay in the L2
    ``resident_fraction``   share of the L2 up to which operands are found there
    ``droop``, ``droop_s``  growth of a long compute-bound kernel, and after how long
    ``exposed_result``      share of the writing of C that no other tile's main loop hides
    """

    peak_fraction: float
    l2_bytes_per_clock: float
    prologue_clocks: float
    floor_s: float
    memory_fraction: float
    overlap_exponent: float
    tail_smoothing: float
    block_rows: float
    resident_fraction: float
    droop: float
    droop_s: float
    exposed_result: float


@dataclass(frozen=True, slots=True)
class Alignment:
    """Rates of matmuls whose rows do not start at multiples of 16 bytes, as a share of aligned ones, by what they are
    multiples of."""

    eight_bytes: float
    four_bytes: float
    two_bytes: float


def alignment_factor(one: int, other: int, element_bytes: float, alignment: Alignment) -> float:
    """Return the share of the rate that is left, from the lengths of the rows of the operands in memory.

    The rows of A, B and C are k or n long; where the product contracts over tokens (a weight's gradient), both operands
    are stored with the tokens as rows, and their rows are m and n long. 16-byte loads (cp.async, TMA) need rows that
    start at multiples of 16 bytes; else the library falls back to kernels that load 4 bytes or single elements.
    """
    if one == 1 or other == 1:
        return 1.0
    each = int(2 * element_bytes)  # half bytes: the scales of blocks lie elsewhere
    row = min(length * each & -(length * each) for length in (one, other)) // 2
    if row >= 16:
        return 1.0
    if row >= 8:
        return alignment.eight_bytes
    return alignment.four_bytes if row >= 4 else alignment.two_bytes


def gemm_s(
    m: int,
    n: int,
    k: int,
    batch: int,
    machine: Machine,
    coefficients: GemmCoefficients,
    factor: float = 1.0,
    sustained: bool = False,
    left_sms: int = 0,
) -> float:
    """Return the time of ``batch`` products C[m, n] = A[m, k] B[k, n], in seconds.

    ``factor`` is what alignment leaves of the rate; ``sustained`` means that such kernels follow each other, so that
    the clock has already fallen when this one starts. ``left_sms``: so many SMs are free for a kernel whose blocks
    stay to the end; 0: all of them.
    """
    c = coefficients
    kernel = _chosen(m, n, k, batch, machine, c, factor)
    compute_s = kernel.compute_s
    if 0 < left_sms < kernel.blocks:
        compute_s *= _turns(kernel.tiles, kernel.blocks, left_sms) / kernel.waves
    best = _together(compute_s, kernel.memory_s, c.overlap_exponent)
    result_bytes = batch * max(machine.element_bytes, 2) * m * n
    best += c.exposed_result * result_bytes / (c.memory_fraction * machine.memory_bytes_per_s)
    flops = 2 * batch * m * n * k
    share = 1.0 if sustained else best / (best + c.droop_s)
    return c.floor_s + best + c.droop * share * flops / machine.peak_flops


def blocks_of(m: int, n: int, k: int, batch: int, machine: Machine, coefficients: GemmCoefficients) -> int:
    """Return how many blocks a kernel has whose blocks stay to the end: one an SM, or a tile if these are fewer."""
    return _chosen(m, n, k, batch, machine, coefficients, 1.0).blocks


def _together(compute_s: float, memory_s: float, exponent: float) -> float:
    """Return the time of main loops and memory traffic, which hide behind each other but for what ``exponent`` says."""
    longer, shorter = (compute_s, memory_s) if compute_s > memory_s else (memory_s, compute_s)
    together: float = longer * (1 + (shorter / longer) ** exponent) ** (1 / exponent)
    return together


def _turns(tiles: int, blocks: int, left_sms: int) -> int:
    """Return how many tiles follow each other where only ``left_sms`` of the blocks begin at once.

    Block i works on tiles i, i + blocks, ...: the last ones, which wait, have one less than the first if the tiles do
    not come out even, and so have those whose SMs they take, where there are enough of them.
    """
    less, first = tiles // blocks, -(-tiles // blocks)
    if first == less:
        return 2 * first
    waiting, with_less = blocks - left_sms, blocks - tiles % blocks
    if with_less >= 2 * waiting:
        return max(first, 2 * less)
    return first + less if with_less >= waiting else 2 * first


class _Chosen(NamedTuple):
    """The kernel that is taken for a product: its main loops and memory traffic alone, waves, tiles, and blocks."""

    compute_s: float
    memory_s: float
    waves: float
    tiles: int
    blocks: int


def _chosen(
    m: int, n: int, k: int, batch: int, machine: Machine, coefficients: GemmCoefficients, factor: float
) -> _Chosen:
    """Return the fastest of the tiles and splits on an idle GPU, the first of equals."""
    c = coefficients
    element = machine.element_bytes
    sms = machine.num_sms
    l2_rate = c.l2_bytes_per_clock * machine.clock_hz
    flop_rate = machine.peak_flops / sms * c.peak_fraction * factor
    operand_bytes = batch * element * (m * k + n * k)
    result_bytes = batch * max(element, 2) * m * n
    moved = operand_bytes + result_bytes
    memory_s = moved / (sms * l2_rate)
    if moved > c.resident_fraction * machine.l2_bytes:
        if operand_bytes > machine.l2_bytes:
            moved = max(moved, result_bytes + int(2 * batch * element * m * n * k / c.block_rows))
        memory_s = max(memory_s, moved / (c.memory_fraction * machine.memory_bytes_per_s))
    prologue_s = c.prologue_clocks / machine.clock_hz
    partial_s = batch * 8 * m * n / (sms * l2_rate)
    q = c.tail_smoothing
    best = float("inf")
    chosen = _Chosen(0.0, 0.0, 1.0, 0, 0)
    for tile_m, tile_n in TILES:
        tiles = batch * -(-m // tile_m) * -(-n // tile_n)
        step_s = max(2 * tile_m * tile_n / flop_rate, (tile_m + tile_n) * element / l2_rate)
        for split in SPLITS if tiles < sms else (1,):
            depth = -(-k // (split * DEPTH_STEP)) * DEPTH_STEP
            waves = tiles * split / sms
            waves = 1.0 if waves <= 1 else (1 - q) * -(-tiles * split // sms) + q * waves
            compute_s = waves * (depth * step_s + prologue_s)
            memory = memory_s + partial_s * split if split > 1 else memory_s
            if compute_s < best and memory < best:  # else it cannot be faster
                together = _together(compute_s, memory, c.overlap_exponent)
                if together < best:
                    best = together
                    chosen = _Chosen(compute_s, memory, waves, tiles * split, min(tiles * split, sms))
    return chosen


def result_s(
    m: int, n: int, batch: int, c_bytes: int, exposed: float, machine: Machine, coefficients: GemmCoefficients
) -> float:
    """Return what it takes longer, in seconds, that ``c_bytes`` an element of C are read and written, not 16 bits."""
    more = batch * m * n * (c_bytes - max(machine.element_bytes, 2))
    return max(0.0, exposed * more / (coefficients.memory_fraction * machine.memory_bytes_per_s))


def gemm_bound_s(m: int, n: int, k: int, batch: int, machine: Machine) -> float:
    """Return the roofline of the product, in seconds: FLOPs at peak; each byte once beyond what the L2 can hold."""
    moved = batch * (machine.element_bytes * (m * k + n * k) + max(machine.element_bytes, 2) * m * n)
    return bound_s(2 * batch * m * n * k, max(0, moved - machine.l2_bytes), machine)
