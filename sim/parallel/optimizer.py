"""What an optimizer keeps for each parameter, and the kernels and temporaries of its step.

torch's ``foreach`` implementations, the default on CUDA (``_default_to_fused_or_foreach`` in torch/optim/optimizer.py):
each line below is one multi-tensor kernel over all parameters, in the order of the source. What is not in torch works
on one parameter after the other.

Parameters are (name, elements). Adafactor and Muon see matrices: ``shapes`` has the (rows, columns) of those that are
some; what is not in it is a vector to them, as the flat tensors of ZeRO and FSDP1 are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sim.ir.ledger import DTYPE_BYTES, Dim, DType, Gemm, Pointwise, Tensor
from sim.ir.program import Alloc, Compute, Free, Instruction, Storage

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """``states`` are tensors like the parameter that persist; ``kernels`` (name, reads, writes) letters name them.

    Letters: p parameter, g gradient, t a temporary copy for all parameters, u another, others a state of that letter.
    A temporary is made by the kernel that first writes it, and goes after the last that reads it.
    """

    states: tuple[str, ...]
    kernels: tuple[tuple[str, str, str], ...]


_ADAM = (
    ("lerp_ (first moment)", "mg", "m"),
    ("mul_ (second moment)", "v", "v"),
    ("addcmul_ (second moment)", "vg", "v"),
    ("sqrt", "v", "t"),
    ("div_ (bias correction)", "t", "t"),
    ("add_ (epsilon)", "t", "t"),
    ("addcdiv_", "pmt", "p"),
)
"""torch/optim/adam.py, _multi_tensor_adam, without decay (adam's own adds to the gradient, and is 0 by default)."""

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(("m", "v"), (("mul_ (weight decay)", "p", "p"), *_ADAM)),
    "adam": Optimizer(("m", "v"), _ADAM),
    # torch/optim/sgd.py, _multi_tensor_sgd: without momentum, and with (no decay, no Nesterov: torch's defaults)
    "sgd": Optimizer((), (("add_", "pg", "p"),)),
    "sgd-momentum": Optimizer(
        ("b",), (("mul_ (momentum)", "b", "b"), ("add_ (gradient)", "bg", "b"), ("add_", "pb", "p"))
    ),
    # lion_pytorch/lion_pytorch.py, update_fn: a clone of the moment, the sum beside it, its sign in place
    "lion": Optimizer(
        ("m",),
        (
            ("mul_ (weight decay)", "p", "p"),
            ("clone", "m", "t"),
            ("mul_", "t", "t"),
            ("add", "tg", "u"),
            ("sign_", "u", "u"),
            ("add_", "pu", "p"),
            ("mul_ (moment)", "m", "m"),
            ("add_ (moment)", "mg", "m"),
        ),
    ),
    # bitsandbytes/optim/adamw.py: one kernel a parameter reads and writes blocks of 8-bit numbers
    "adam-8bit": Optimizer(("m", "v"), (("blockwise", "pgmv", "pmv"),)),
    # torch/optim/_adafactor.py, _multi_tensor_adafactor: states are rows and columns; norms are read by the host
    "adafactor": Optimizer(
        ("r",),
        (
            ("norm (parameter)", "p", ""),
            ("norm (rows)", "g", ""),
            ("norm (columns)", "g", ""),
            ("row_var @ col_var", "", "t"),
            ("clamp_min_", "t", "t"),
            ("rsqrt_", "t", "t"),
            ("mul_ (gradient)", "tg", "t"),
            ("norm (update)", "t", ""),
            ("mul_ (rate)", "t", "t"),
            ("add_", "pt", "p"),
        ),
    ),
    # torch/optim/_muon.py for matrices of the blocks; the rest is AdamW's
    "muon": Optimizer(("b",), ()),
}

_ADAM_LOOP = (
    *_ADAM[:3],
    ("sqrt", "v", "t"),
    ("div (bias correction)", "t", "u"),
    ("add_ (epsilon)", "u", "u"),
    ("addcdiv_", "pmu", "p"),
)
"""_single_tensor_adam: the quotient is a new tensor, ``denom``, and lives until the next parameter's takes its name."""

_LOOPED = {
    "adamw": Optimizer(("m", "v"), (("mul_ (weight decay)", "p", "p"), *_ADAM_LOOP)),
    "adam": Optimizer(("m", "v"), _ADAM_LOOP),
}

STATE_NAMES = {"m": "exp_avg", "v": "exp_avg_sq", "b": "momentum_buffer", "r": "variance"}
BLOCKWISE_LEAST = 4096
"""Smaller parameters keep 32-bit states (``min_8bit_size`` of bitsandbytes/optim/optimizer.py)."""
BLOCKWISE_BLOCK = 256
"""Elements that share a scale, fp32 (bitsandbytes/optim/optimizer.py from 0.44; 2048 before)."""
NEWTON_SCHULZ_STEPS = 5
"""``DEFAULT_NS_STEPS`` of torch/optim/_muon.py."""
FOREACH_CHUNK = 65536
"""Elements of a block's work in multi-tensor kernels (aten/src/ATen/native/cuda/MultiTensorApply.cuh, kChunkSize)."""
SCALAR_BYTES = 512
"""What a tensor of one number takes: a whole block of the allocator."""

FUSED = ("adamw", "adam", "sgd", "sgd-momentum")
"""Those with ``fused=True`` in torch.optim."""
OF_MATRICES = ("adafactor", "muon")


def numel(name: str, num_elements: int, dtype: DType) -> Tensor:
    """Return a flat tensor: how frameworks see parameters."""
    return Tensor(name, (Dim("numel", num_elements),), dtype)


def state_storages(
    optimizer: str, parameters: Sequence[tuple[str, int]], dtype: DType, shapes: Shapes | None = None
) -> tuple[Storage, ...]:
    """Return the storages of the states of (name, elements) parameters, in the order in which step() makes them."""
    return tuple(
        Storage(f"{state}.{name}", num_bytes, "optimizer")
        for name, count in parameters
        for state, num_bytes in _states(optimizer, count, dtype, (shapes or {}).get(name))
    )


def _states(optimizer: str, count: int, dtype: DType, shape: tuple[int, int] | None) -> list[tuple[str, int]]:
    """Return (name, bytes) of the states of one parameter."""
    element = DTYPE_BYTES[dtype]
    if optimizer == "adam-8bit":
        if count < BLOCKWISE_LEAST:
            return [("state1", count * 4), ("state2", count * 4)]
        scales = -(-count // BLOCKWISE_BLOCK) * 4
        return [("state1", count), ("state2", count), ("absmax1", scales), ("absmax2", scales)]
    if optimizer == "adafactor" and shape is not None:
        rows, columns = shape
        return [("row_var", rows * element), ("col_var", columns * element)]
    letters = OPTIMIZERS["adamw" if optimizer == "muon" and shape is None else optimizer].states
    return [(STATE_NAMES[letter], count * element) for letter in letters]


def foreach_step(
    optimizer: str,
    parameters: Sequence[tuple[str, int]],
    parameter_dtype: DType,
    gradient_dtype: DType,
    shapes: Shapes | None = None,
) -> list[Instruction]:
    """Return the step of torch's foreach optimizer over (name, elements) parameters.

    Adam's temporary is one more copy of every parameter: ``_foreach_sqrt`` returns new tensors (torch/optim/adam.py);
    so are Adafactor's updates. Lion and 8-bit Adam have no foreach, Muon none in torch: one parameter after the other.
    """
    if optimizer == "muon":
        return _muon_step(parameters, parameter_dtype, gradient_dtype, shapes or {})
    if optimizer in ("lion", "adam-8bit"):
        return looped_step(optimizer, parameters, parameter_dtype, gradient_dtype)
    return _step(optimizer, parameters, parameter_dtype, gradient_dtype)


def looped_step(
    optimizer: str, parameters: Sequence[tuple[str, int]], parameter_dtype: DType, gradient_dtype: DType
) -> list[Instruction]:
    """Return the step one parameter after the other: temporaries of one at a time, of Adam's also the last's."""
    spec = _LOOPED.get(optimizer, OPTIMIZERS[optimizer])
    keeps = optimizer in _LOOPED
    out: list[Instruction] = []
    named: Instruction | None = None
    for parameter in parameters:
        step = _step(optimizer, (parameter,), parameter_dtype, gradient_dtype, spec)
        if keeps:
            *step, ends = step
            if named is not None:
                made = next(i for i, each in enumerate(step) if isinstance(each, Free))
                step.insert(made, named)
            named = ends
        out.extend(step)
    return out if named is None else [*out, named]


def _step(
    optimizer: str,
    parameters: Sequence[tuple[str, int]],
    parameter_dtype: DType,
    gradient_dtype: DType,
    spec: Optimizer | None = None,
) -> list[Instruction]:
    """Return the kernels over all of ``parameters`` together."""
    spec = spec or OPTIMIZERS[optimizer]
    total = sum(count for _, count in parameters)
    states: DType = "uint8" if optimizer == "adam-8bit" else parameter_dtype
    dtypes: dict[str, DType] = {"p": parameter_dtype, "g": gradient_dtype, "t": parameter_dtype, "u": parameter_dtype}
    tensors = {letter: numel(letter, total, dtypes.get(letter, states)) for letter in "pgtumvbr"}
    last = {letter: i for i, (_, reads, writes) in enumerate(spec.kernels) for letter in reads + writes}
    made: dict[str, list[Storage]] = {}
    out: list[Instruction] = []
    for i, (name, reads, writes) in enumerate(spec.kernels):
        for letter in writes:
            if letter in "tu" and letter not in made:
                word = "exp_avg_sq_sqrt" if optimizer in ("adam", "adamw") else "update"
                made[letter] = [
                    Storage(f"{word}.{owner}", count * DTYPE_BYTES[parameter_dtype], "temporary")
                    for owner, count in parameters
                ]
                out.extend(Alloc(storage) for storage in made[letter])
        kernel = Pointwise("optimizer", tuple(tensors[r] for r in reads), tuple(tensors[w] for w in writes))
        out.append(Compute(f"{optimizer}.{name}", kernel))
        out.extend(Free(s) for letter, storages in made.items() if last[letter] == i for s in storages)
    return out


def _muon_step(
    parameters: Sequence[tuple[str, int]], parameter_dtype: DType, gradient_dtype: DType, shapes: Shapes
) -> list[Instruction]:
    """Return torch/optim/_muon.py, ``_single_tensor_muon``, then AdamW over what is no matrix of a block.

    For each matrix: the update (Nesterov's, a new tensor), its 16-bit copy, and in each of the Newton-Schulz steps two
    squares of the shorter side and the next 16-bit matrix beside the last one (``_zeropower_via_newtonschulz``).
    """
    out: list[Instruction] = []
    for name, count in parameters:
        shape = shapes.get(name)
        if shape is None:
            continue
        short, long = sorted(shape)
        p, g = numel("p", count, parameter_dtype), numel("g", count, gradient_dtype)
        update = Storage(f"update.{name}", count * DTYPE_BYTES[gradient_dtype], "temporary")
        first, second = (Storage(f"{word}.{name}", 2 * count, "temporary") for word in ("orthogonal", "next"))
        squares = [Storage(f"{word}.{name}", 2 * short * short, "temporary") for word in ("gram", "gram_update")]
        low, square = numel("o", count, "bf16"), numel("s", short * short, "bf16")
        out.append(Compute("muon.lerp_ (momentum)", Pointwise("optimizer", (p, g), (p,))))
        out += [Alloc(update), Compute("muon.lerp (Nesterov)", Pointwise("optimizer", (p, g), (g,)))]
        out += [Alloc(first), Compute("muon.bfloat16", Pointwise("copy", (g,), (low,)))]
        out.append(Compute("muon.norm", Pointwise("reduce", (low,), (low,))))
        m, n = (Dim("short", short),), (Dim("long", long),)
        for step in range(NEWTON_SCHULZ_STEPS):
            if not step:
                out.extend(Alloc(storage) for storage in squares)
                out.append(Alloc(second))
            out.append(Compute("muon.gram", Gemm(m, m, n, "bf16")))
            out.append(Compute("muon.gram_update", Gemm(m, m, m, "bf16")))
            out.append(Compute("muon.orthogonal", Gemm(m, n, m, "bf16")))
        out.append(Compute("muon.squares", Pointwise("elementwise", (square,), (square,))))
        out += [Free(second), *(Free(storage) for storage in squares)]
        out.append(Compute("muon.mul_ (weight decay)", Pointwise("optimizer", (p,), (p,))))
        out.append(Compute("muon.add_", Pointwise("optimizer", (p, low), (p,))))
        out += [Free(first), Free(update)]
    rest = [(name, count) for name, count in parameters if name not in shapes]
    return [*out, *(_step("adamw", rest, parameter_dtype, gradient_dtype) if rest else ())]


def norm_scratch(sizes: Iterable[int]) -> list[Storage]:
    """Return what ``clip_grad_norm_`` makes for its norm: a number for each chunk of each gradient, one for each.

    ``foreach_tensor_norm_cuda`` allocates as many chunks for every tensor as the largest has, fp32
    (aten/src/ATen/native/cuda/ForeachReduceOp.cu); the norms are tensors of one number, then stacked.
    """
    counts = list(sizes)
    if not counts:
        return []
    chunks = -(-max(counts) // FOREACH_CHUNK)
    return [
        Storage("clip.partial_norms", 4 * len(counts) * chunks, "temporary"),
        Storage("clip.norms", SCALAR_BYTES * len(counts), "temporary"),
        Storage("clip.stacked_norms", 4 * len(counts), "temporary"),
    ]


def clip_gradients(sizes: Sequence[int], dtype: DType) -> list[Instruction]:
    """Return ``clip_grad_norm_`` (torch/nn/utils/clip_grad.py): a norm over all gradients, then a multiplication."""
    gradients = numel("gradients", sum(sizes), dtype)
    scratch = norm_scratch(sizes)
    return [
        *(Alloc(storage) for storage in scratch),
        Compute("clip.norm", Pointwise("reduce", (gradients,), ())),
        Compute("clip.scale", Pointwise("elementwise", (gradients,), (gradients,))),
        *(Free(storage) for storage in scratch),
    ]
