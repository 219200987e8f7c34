"""What autograd keeps of each layer equals the ledger, to the byte, against real torch modules on the CPU.

Each layer kind, code, kernel, dtype and dropout is run under ``saved_tensors_hooks``; storages are counted once,
parameters and shared tables left out. Where a CPU kernel keeps something else than CUDA's, the difference is a named
cause with its own formula (``block_causes``), never a tolerance. Torch is imported when they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sim.ir.ledger import DTYPE_BYTES, DType, Layer, Ledger
from sim.model.transformer import describe
from sim.scenario.schema import ModelConfig, Training

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.real

SEQ = 32
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Mode = tuple[DType, bool]
MODES: list[Mode] = [("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True)]
MODE_IDS = ["fp32", "bf16", "fp16", "autocast"]

LLAMA = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128, tie_word_embeddings=False,
)  # fmt: skip
GPT = ModelConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    head_dim=16, vocab_size=128, hidden_act="gelu", norm="layernorm", position="learned", max_position_embeddings=64,
    attention_bias=True, attention_output_bias=True, mlp_bias=True,
)  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "llama_mha": LLAMA.model_copy(update={"num_key_value_heads": 4}),
    "llama_mqa": LLAMA.model_copy(update={"num_key_value_heads": 1}),
    "qwen3": LLAMA.model_copy(update={"query_key_norm": True, "attention_bias": True}),
    "gemma_mlp": LLAMA.model_copy(update={"hidden_act": "gelu_gated"}),
    "gpt": GPT,
    "gpt_dropout": GPT.model_copy(update={"dropout": 0.25}),
    "opt": GPT.model_copy(update={"hidden_act": "relu", "position_offset": 2}),
    "opt_350m": GPT.model_copy(update={"hidden_act": "relu", "position_offset": 2, "final_norm": False}),
    "bloom": GPT.model_copy(update={"position": "alibi", "embedding_norm": True}),
    "mpt": GPT.model_copy(
        update={
            "position": "alibi", "norm_bias": False, "attention_bias": False, "attention_output_bias": False,
            "mlp_bias": False,
        }
    ),
    "no_bias": GPT.model_copy(update={"norm_bias": False, "attention_bias": False, "mlp_bias": False}),
    "falcon_7b": LLAMA.model_copy(
        update={
            "parallel_block": True, "num_block_norms": 1, "norm": "layernorm", "hidden_act": "gelu",
            "num_key_value_heads": 1,
        }
    ),
    "neox": LLAMA.model_copy(
        update={
            "parallel_block": True, "norm": "layernorm", "hidden_act": "gelu", "num_key_value_heads": 4,
            "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
        }
    ),
    "falcon_40b": LLAMA.model_copy(
        update={"parallel_block": True, "num_block_norms": 2, "norm": "layernorm", "hidden_act": "gelu"}
    ),
}  # fmt: skip
FUSED = ("gpt", "bloom", "mpt", "gpt_dropout", "no_bias", "neox", "falcon_7b", "falcon_40b")


def torch_dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, DTYPES[name])
    assert isinstance(found, torch.dtype)
    return found


def ledger_of(config: ModelConfig, code: str, kernel: str, mode: Mode, batch: int = 2) -> Ledger:
    dtype, autocast = mode
    compute: DType = "bf16" if autocast else dtype
    training = Training.model_validate(
        {
            "sequence_length": SEQ, "micro_batch_size": batch, "global_batch_size": batch, "precision": compute,
            "attention": kernel, "code": code,
        }
    )  # fmt: skip
    return describe(config, training, parameter_dtype=dtype, compute_dtype=compute, autocast=autocast)


def saved_by_ledger(layer: Layer, *, excluded: tuple[str, ...] = ()) -> int:
    """Bytes of all storages that ops of the layer save, each once."""
    sizes = {t.name: t.num_bytes for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        sizes[layer.input.name] = layer.input.num_bytes
    names = {name for op in layer.forward for name in op.saves} - set(excluded)
    return sum(sizes[name] for name in sorted(names))


# --- where CPU kernels keep something else than CUDA's ---


def norm_on_cpu(config: ModelConfig, code: str, mode: Mode, rows: int, width: int) -> int:
    """Bytes that the CPU keeps beyond CUDA's for one norm of [rows, width].

    LayerNorm: mean and rstd in the input's dtype, not fp32 (vectorised kernel of layer_norm_kernel.cpp).
    nn.RMSNorm: composed of pow, mean, rsqrt and products (rms_norm_composite): in 16 bit the fp32 copy and the result
    in fp32 (before the weight) instead of the 16-bit input; in fp32 that result beside the input.
    """
    low = mode[0] != "fp32"
    if config.norm == "layernorm":
        return -2 * rows * (4 - 2) if low else 0
    if code == "torch":
        return rows * width * ((4 + 4 - 2) if low else 4)
    return 0


def dropout_on_cpu(elements: int, dtype: str) -> int:
    """The CPU has no fused dropout: the mask is noise in the input's dtype, not one byte (aten Dropout.cpp)."""
    return elements * (DTYPE_BYTES[dtype] - 1)


RNG_STATE = 16
"""CUDA's fused kernels keep a seed and an offset, int64 each; the CPU's flash kernel has no dropout."""


def block_causes(config: ModelConfig, code: str, kernel: str, mode: Mode, batch: int) -> dict[str, int]:
    """What the CPU keeps of a block beyond CUDA: name of the cause -> bytes."""
    rows, low = batch * SEQ, "bf16" if mode[1] else mode[0]
    causes = {"norms": config.num_block_norms * norm_on_cpu(config, code, mode, rows, config.hidden_size)}
    if config.query_key_norm:
        for heads in (config.num_attention_heads, config.num_key_value_heads):
            causes[f"norm of {heads} heads"] = _head_norm(config, code, mode, rows * heads)
    if kernel == "flash-2":
        causes["random state of flash"] = -RNG_STATE
    if config.dropout:
        causes["dropout masks"] = 2 * dropout_on_cpu(rows * config.hidden_size, low)
    if code == "huggingface" and config.hidden_act == "gelu" and config.position == "learned" and mode[1]:
        # CPU's autocast does not list pow: x, tanh and 1 + tanh stay 16 bit, and pow keeps x, which CUDA has cast
        causes["gelu_new under autocast"] = rows * config.intermediate_size * ((2 + 2 + 2) - (4 + 4 + 4))
    return causes


def _head_norm(config: ModelConfig, code: str, mode: Mode, rows: int) -> int:
    return norm_on_cpu(config, code, mode, rows, config.head_dim)


def tables_for(config: ModelConfig, code: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    import torch

    from validation.real import modules

    mask = torch.full((SEQ, SEQ), -1e4).triu(1)[None, None].to(dtype)
    if config.position != "rope":
        return (mask,)
    angles = modules.rotary_angles(SEQ, config.head_dim)
    if code == "torch":
        return (torch.polar(torch.ones_like(angles), angles), mask)
    both = torch.cat((angles, angles), -1)
    return (both.cos().to(dtype), both.sin().to(dtype), mask)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("kernel", ["flash-2", "math"])
@pytest.mark.parametrize("code", ["torch", "huggingface"])
@pytest.mark.parametrize("name", MODELS)
def test_block(name: str, code: str, kernel: str, mode: Mode, batch: int) -> None:
    """The CPU's scaled_dot_product_attention is a flash kernel for every dtype: held against ``flash-2``."""
    import torch

    from validation.real import modules

    config, dtype = MODELS[name], torch_dtype(mode[0])
    block = modules.Block(config, code, "sdpa" if kernel == "flash-2" else kernel, fused=name in FUSED).to(dtype)
    tables = tables_for(config, code, dtype)
    x = torch.randn(batch, SEQ, config.hidden_size, dtype=dtype, requires_grad=True).clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode[1]):
        measured = modules.saved_bytes(lambda: block(x, tables), [*block.parameters(), *tables])
    causes = block_causes(config, code, kernel, mode, batch)
    assert measured == saved_by_ledger(ledger_of(config, code, kernel, mode, batch).layers[1]) + sum(causes.values())


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("code", ["torch", "huggingface"])
def test_attention_dropout(code: str, mode: Mode, p: float) -> None:
    """Dropout inside ``math`` attention keeps its mask and the dropped probabilities."""
    import torch

    from validation.real import modules

    config = GPT.model_copy(update={"attention_dropout": p})
    block = modules.Block(config, code, "math", fused=True).to(torch_dtype(mode[0]))
    tables = tables_for(config, code, torch_dtype(mode[0]))
    x = torch.randn(2, SEQ, config.hidden_size, dtype=torch_dtype(mode[0]), requires_grad=True).clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode[1]):
        measured = modules.saved_bytes(lambda: block(x, tables), [*block.parameters(), *tables])
    causes = block_causes(config, code, "math", mode, 2)
    if p:
        scores = 2 * config.num_attention_heads * SEQ * SEQ
        # SDPA's math computes in fp32 whatever came in; eager attention in the low dtype
        kind = "fp32" if code == "torch" or mode == ("fp32", False) else "bf16"
        causes["mask"] = dropout_on_cpu(scores, kind)
    assert measured == saved_by_ledger(ledger_of(config, code, "math", mode).layers[1]) + sum(causes.values())


EMBEDDINGS = {
    "llama": LLAMA,
    "gpt": GPT,
    "gpt_dropout": MODELS["gpt_dropout"],
    "opt_350m": GPT.model_copy(update={"embedding_width": 32, "position_offset": 2, "final_norm": False}),
    "bloom": GPT.model_copy(update={"position": "alibi", "embedding_norm": True}),
}


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding(name: str, mode: Mode) -> None:
    import torch

    from validation.real import modules

    config, dtype = EMBEDDINGS[name], torch_dtype(mode[0])
    module = modules.Embedding(config, "torch").to(dtype)
    tokens = torch.randint(config.vocab_size, (2, SEQ))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode[1]):
        measured = modules.saved_bytes(lambda: module(tokens), [*module.parameters(), tokens])
    causes = {}
    if config.embedding_norm:
        causes["norm"] = norm_on_cpu(config, "torch", mode, 2 * SEQ, config.hidden_size)
    if config.dropout:
        causes["dropout mask"] = dropout_on_cpu(2 * SEQ * config.hidden_size, mode[0])
    layer = ledger_of(config, "torch", "flash-2", mode).layers[0]
    assert measured == saved_by_ledger(layer, excluded=("tokens",)) + sum(causes.values())


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("code", ["torch", "huggingface"])
@pytest.mark.parametrize("name", ["llama", "gpt", "opt_350m"])
def test_head_and_loss(name: str, code: str, mode: Mode) -> None:
    import torch

    from validation.real import modules

    config, dtype = EMBEDDINGS[name], torch_dtype(mode[0])
    module = modules.Head(config, code).to(dtype)
    labels = torch.randint(config.vocab_size, (2, SEQ))
    x = torch.randn(2, SEQ, config.hidden_size, dtype=dtype, requires_grad=True).clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode[1]):
        measured = modules.saved_bytes(lambda: module(x, labels), [*module.parameters(), labels])
    cause = norm_on_cpu(config, code, mode, 2 * SEQ, config.hidden_size) if config.final_norm else 0
    layer = ledger_of(config, code, "flash-2", mode).layers[-1]
    assert measured == saved_by_ledger(layer, excluded=("labels",)) + cause
