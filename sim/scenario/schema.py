"""The question, as types. Names, types and single-field limits; rules that relate fields are in ``checks``.

A :class:`Scenario` is complete: every default has been filled in by ``load``, and ``sources`` says where
each value that the file did not give comes from. All sizes are base units.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from pydantic_core import core_schema

from sim.catalog.schema import GpuFacts, NetworkFacts, NodeFacts
from sim.interop.deepspeed_config import DeepSpeedSettings

NCCL_VERSION = (2, 30)
"""The version that ``sim/cost/nccl`` follows."""
Framework = Literal["ddp", "fsdp2", "fsdp1", "deepspeed", "megatron"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]
Recompute = Literal["none", "selective", "selective-op", "full"]
AttentionKernel = Literal["math", "flash-1", "flash-triton", "flash-2", "flash-3", "sdpa", "cudnn"]
ModelCode = Literal["torch", "huggingface", "megatron"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class _AsIs:
    """Marks a field whose value the catalogue or a reader has checked already: its type is checked, not its inside."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.is_instance_schema(source)


class ModelConfig(_Frozen):
    """A decoder-only transformer, in the keys of a Hugging Face Llama ``config.json``."""

    name: str = ""
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "gelu", "relu", "gelu_gated"] = "silu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    position: Literal["rope", "learned", "alibi", "none"] = "rope"
    max_position_embeddings: PositiveInt = 4096
    position_offset: int = 0
    """Extra rows of a learned position table (OPT has 2)."""
    attention_bias: bool = False
    """Bias of the query, key and value projections."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm_bias: bool = True
    """Only for layernorm: MPT has none."""
    embedding_norm: bool = False
    """A norm after the word embedding (BLOOM)."""
    embedding_width: PositiveInt | None = None
    """Width of the word embedding where it is projected to hidden_size (OPT-350M)."""
    final_norm: bool = True
    parallel_block: bool = False
    """Attention and MLP read the same normed input and are added together (Falcon)."""
    num_block_norms: Literal[1, 2] = 2
    """Norms in a block: Falcon-7B's parallel block has one, Falcon-40B's two."""
    query_key_norm: bool = False
    fused_qkv: bool = False
    """One matrix makes query, key and value where the family's own code has three (Phi-3's, Aleph Alpha's)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Residual, embedding and MLP dropout."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    num_local_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    num_shared_experts: int | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: silu and gelu_gated do, gelu and relu do not."""
        return self.hidden_act in ("silu", "gelu_gated")


class ClusterSpec(_Frozen):
    """The machine, in facts: overrides applied, network chosen."""

    node: Annotated[NodeFacts, _AsIs()]
    gpu: Annotated[GpuFacts, _AsIs()]
    network: Annotated[NetworkFacts, _AsIs()] | None
    num_nodes: PositiveInt
    num_gpus: PositiveInt
    written: dict[str, Any] = Field(default_factory=dict)
    """``node``, ``network`` and ``gpu`` as a scenario file gives them, files by their absolute path; ``backend``,
    ``nccl``, ``alpha`` and ``beta`` where it does."""
    backend: Literal["nccl", "gloo", "alpha-beta"] = "nccl"
    """Whose collectives: ``sim.cost.backend``."""
    alpha_s: float = 0.0
    beta_bytes_per_s: float = 0.0
    """Latency of a message and bandwidth of a GPU, each way, of the plain network; 0 under the others."""
    nccl: tuple[int, int] = NCCL_VERSION
    """NCCL's version: what it can do (``sim/cost/nccl``)."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs used on each node (a part of one node, or all of each)."""
        return self.num_gpus // self.num_nodes


class Parallelism(_Frozen):
    dp: PositiveInt
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    cp: PositiveInt = 1
    ep: PositiveInt = 1
    zero: Literal[0, 1, 2, 3] = 0
    sp: bool = False
    schedule: str = "1f1b"
    vpp: PositiveInt = 1
    layers_per_stage: tuple[int, ...] | None = None
    cp_comm: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """What attention exchanges under context parallelism, as Transformer Engine's ``cp_comm_type``."""
    order: tuple[str, ...] | None = None
    """Axes in the order in which neighbouring ranks vary, fastest first; None: the framework's."""

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.cp


class Training(_Frozen):
    sequence_length: PositiveInt
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt
    precision: Precision
    sample_length: int = 0
    """Mean tokens of the samples packed into a sequence, each of which attends to itself alone; 0: one fills it."""
    optimizer: Literal["adamw", "adam", "sgd", "sgd-momentum", "adafactor", "adam-8bit", "lion", "muon"] = "adamw"
    recompute: Recompute = "none"
    recompute_interval: PositiveInt = 1
    """Every how many blocks one recomputes: 1 is all of them."""
    attention: AttentionKernel = "sdpa"
    gradient_clipping: float = Field(default=0.0, ge=0.0)
    """Largest norm; 0 is no clipping."""
    compile: bool = False
    launch_blocking: bool = False
    """``CUDA_LAUNCH_BLOCKING=1``: the host waits for each kernel."""
    cpu_threads: int = Field(default=0, ge=0)
    """OpenMP threads of each rank (``OMP_NUM_THREADS``); 0: all cores of the node, which its ranks share."""
    code: ModelCode
    """Whose modules run: plain torch (fused norms), Hugging Face's eager code, or Megatron's fused kernels."""
    loss: (
        Literal[
            "eager",
            "compiled",
            "vocab-parallel",
            "vocab-parallel-compiled",
            "fused",
            "kernel",
            "chunked",
            "linear-fused",
        ]
        | None
    ) = None
    """None: that of the model's code. eager: F.cross_entropy of fp32 logits; compiled: that by torch.compile;
    vocab-parallel: Megatron's, vocab-parallel-compiled: by torch.compile (``cross_entropy_fusion_impl: native``);
    fused: the gradient over the logits (Transformer Engine, Liger); kernel: a gradient of
    its own without fp32 logits (flash-attn's CrossEntropyLoss, as in llm-foundry); chunked: torchtune's;
    linear-fused: projection and loss in one (Liger)."""
    metrics: int = 0
    """Cross-entropies that the trainer computes of each microbatch's logits after its backward, beside the loss."""
    checkpoint: Literal["torch", "deepspeed"] = "torch"
    """Whose checkpoint function runs blocks again: DeepSpeed's goes by ``activation_checkpointing`` of its config."""
    norms: Literal["fused", "composed"] | None = None
    """fused: ``_fused_rms_norm`` (torch from 2.9 on), Liger's; composed: op by op in fp32, as torchtitan and nn.RMSNorm
    did before, and transformers does. None: composed in Hugging Face's code, else fused."""
    softmax: Literal["fused", "composed"] | None = None
    """Of attention ``math`` in Hugging Face's code: fused is one kernel that scales, masks and normalises
    (``ScaledMaskedSoftmax`` of Megatron and apex, as others' trainers took it over). None: composed."""


OptimizerImplementation = Literal["foreach", "fused", "for-loop"]


class DdpSettings(_Frozen):
    """torch.nn.parallel.DistributedDataParallel, and how its users train in 16 bit."""

    bucket_cap_mb: float | None = Field(default=None, gt=0)
    """Largest gradient bucket, MiB. Left out: a first bucket of 1 MiB, then 25; given, it holds for the first too."""
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False
    mixed_precision: Literal["autocast", "pure"] = "autocast"
    """autocast: fp32 parameters, 16-bit matmuls; pure: parameters, gradients and optimizer in 16 bit."""
    optimizer_implementation: OptimizerImplementation = "foreach"


TorchDtype = Literal["fp32", "bf16", "fp16"]


class Fsdp2Settings(_Frozen):
    """torch.distributed.fsdp.fully_shard and its MixedPrecisionPolicy, in torch's own names."""

    reshard_after_forward: bool | PositiveInt = True
    """True: gather again in backward; False: keep the whole parameters; a number: keep slices over so many ranks."""
    reshard_root: bool = False
    """True where ``reshard_after_forward=True`` is passed for the root too: by default it stays gathered."""
    param_dtype: TorchDtype | None = None
    """Dtype of the gathered parameters; None: ``training.precision``."""
    reduce_dtype: TorchDtype | None = "fp32"
    """Dtype of the gradient reduction; None: that of the gathered parameters."""
    orig_dtype: TorchDtype = "fp32"
    """Dtype in which parameters are sharded and optimized."""
    shard_size: PositiveInt | None = None
    """Ranks of a shard group; fewer than dp is HSDP: replicas of the shard groups average their gradients."""
    wrap: Literal["blocks", "torchtitan"] = "blocks"
    """blocks: each block and the root; torchtitan: embedding and head are groups of their own."""
    gradient_sync: Literal["every", "last"] = "every"
    """last: ``set_requires_gradient_sync(False)`` on all microbatches but the last, so gradients stay whole."""
    reshard_after_backward: bool = True
    """False: ``set_reshard_after_backward(False)`` on all microbatches but the last."""
    cpu_offload: bool = False
    optimizer_implementation: OptimizerImplementation = "foreach"
    float8_recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """torchao's scales of ``precision: fp8``: one a tensor, or one a row."""
    async_tensor_parallel: bool = False
    """``torch._inductor.config._micro_pipeline_tp``: tp's exchanges in pieces beside pieces of the products."""
    float8_all_gather: bool = False
    """torchao's ``enable_fsdp_float8_all_gather``, with ``precompute_float8_dynamic_scale_for_fsdp``."""


class Fsdp1Settings(_Frozen):
    """torch.distributed.fsdp.FullyShardedDataParallel, as MosaicML's trainer names its mixed precision.

    DEFAULT reduces gradients in fp32, PURE in 16 bit, FULL keeps everything in fp32 (composer/distributed/
    mosaic_parallelism.py, ``get_mixed_precision``).
    """

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"] = (
        "FULL_SHARD"
    )
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    orig_dtype: TorchDtype = "fp32"
    """In which the model is made: shards, their gradients, optimizer states (Lightning's ``bf16-true``: bf16)."""
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NONE"] = "BACKWARD_PRE"
    forward_prefetch: bool = False
    limit_all_gathers: bool = True
    use_orig_params: bool = False
    cpu_offload: bool = False
    keep_low_precision_grads: bool = False
    shard_size: PositiveInt | None = None
    """Ranks of a shard group of the hybrid strategies; None: the GPUs of one node."""
    gradient_sync: Literal["every", "last"] = "every"
    """last: ``no_sync()`` on all microbatches but the last, so gradients stay whole."""
    optimizer_implementation: OptimizerImplementation = "foreach"


class MegatronSettings(_Frozen):
    """Megatron-LM's arguments, by its own names and with its defaults (megatron/training/arguments.py)."""

    use_distributed_optimizer: bool = False
    """Optimizer states sharded over dp: what ``parallelism.zero: 1`` means."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    """With the distributed optimizer: gather parameters as the next forward needs them."""
    accumulate_allreduce_grads_in_fp32: bool | None = None
    """None: for bf16, as Megatron turns it on."""
    gradient_accumulation_fusion: bool = True
    apply_rope_fusion: bool = True
    """False: rotary embedding op by op (``--no-rope-fusion``)."""
    bias_swiglu_fusion: bool = True
    """False: a gated activation op by op (``--no-bias-swiglu-fusion``)."""
    async_tensor_model_parallel_allreduce: bool = True
    """False: input gradients are summed over tp before the weight's gradient is multiplied, not beside it."""
    overlap_p2p_communication: bool = True
    """Of the interleaved schedule: exchanges run beside the next pass."""
    scatter_gather_tensors_in_pipeline: bool = False
    """Of 2021 to 2023, without ``sp``: a tp rank sends its part of a message, which the receivers gather."""
    tp_comm_overlap: bool = False
    """Transformer Engine's user buffers: tensor-parallel exchanges in pieces beside pieces of the products."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """Whose CUDA graphs the blocks' passes are captured in, if any; both save the host the same."""
    cuda_graph_scope: Literal["full", "full_iteration"] = "full"
    """``full``: each block's forward and backward; ``full_iteration``: all passes of a step in one graph."""
    check_for_nan_in_grad: bool = True
    transformer_impl: Literal["transformer_engine", "local"] = "transformer_engine"
    """Whose linear layers the blocks have; Megatron's own keep no tensors between passes."""
    masked_softmax_fusion: bool = True
    """Whether unfused attention's softmax is one kernel, where there is one for its shape."""
    create_attention_mask_in_dataloader: bool = False
    """Whether a batch comes with a mask of bools, [batch, 1, seq, seq], which the kernels in use do not read.
    Megatron's own default is True; NeMo, Megatron-Bridge and launch scripts of long sequences turn it off."""
    bucket_size: PositiveInt | None = None
    """Elements of a gradient bucket (``ddp_bucket_size``); None: max(40e6, 1e6 dp)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """Where the scales of ``precision: fp8`` come from: the steps before, the tensor, or blocks of it."""
    first_last_layers_bf16: bool = False
    """Whether the first and the last blocks stay in 16 bit; how many, say the next two."""
    num_layers_at_start_in_bf16: int = Field(default=1, ge=0)
    num_layers_at_end_in_bf16: int = Field(default=1, ge=0)
    attention_backend: Literal["auto", "flash"] = "auto"
    """``auto``: Transformer Engine runs cuDNN's kernel from Hopper on, on Blackwell where flash-2 is asked for too."""
    use_megatron_fsdp: bool = False
    """Gradients, and with ``zero: 3`` parameters, sharded too: what ``parallelism.zero`` above 1 means."""
    suggested_communication_unit_size: PositiveInt | None = None
    """Of Megatron-FSDP: elements under way at once; None: max(1e9, twice a layer's)."""
    fp8_param_gather: bool = False
    """Quantised weights are kept and gathered in 8 bits, with no 16-bit copy: needs a distributed optimizer or FSDP."""
    use_precision_aware_optimizer: bool = False
    """Transformer Engine's FusedAdam holds the master as what bf16 parameters lack of it, reads 16-bit gradients."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Of that optimizer's states."""
    cpu_offloading_num_layers: int = Field(default=0, ge=0)
    """Of so many blocks, the first ones, Transformer Engine keeps what backward needs on the host."""
    cpu_offloading_activations: bool = True
    """False: of them nothing (weights, the other choice, stay on the GPU since Transformer Engine 2.10)."""
    nvte_cpu_offload_v1: bool = False
    """Whether that is Transformer Engine's way before 2.10, as the environment's ``NVTE_CPU_OFFLOAD_V1`` asks for."""
    distribute_saved_activations: bool = False
    """Inputs of recomputed blocks are kept in parts on the tensor-parallel ranks."""


class AllocatorConfig(_Frozen):
    """PYTORCH_ALLOC_CONF, as the caching allocator reads it."""

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: int = 0
    garbage_collection_threshold: float = Field(default=0.0, ge=0.0, lt=1.0)
    memory_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """What ``set_per_process_memory_fraction`` allows the allocator of the GPU's memory; None: not called."""
    cublas_workspace_bytes: int | None = None
    """What CUBLAS_WORKSPACE_CONFIG asks for; PyTorch takes it from the allocator. None: its default for the GPU."""


class SlowRank(_Frozen):
    """A GPU that runs its kernels at ``factor`` of their speed."""

    rank: int = Field(ge=0)
    factor: float = Field(gt=0, le=1)


class DegradedLink(_Frozen):
    """A wire, both ways, that carries ``factor`` of its bytes per second. Devices by the names of the cluster's graph:
    ``node0.gpu3`` and ``node0.nvswitch0``, ``node0.nic1`` and ``leaf``, ``leaf2`` and ``spine``."""

    between: tuple[str, str]
    factor: float = Field(gt=0, le=1)


class Faults(_Frozen):
    """What is not as good as the catalogue says."""

    slow: tuple[SlowRank, ...] = ()
    links: tuple[DegradedLink, ...] = ()


class Scenario(_Frozen):
    """One resolved question."""

    name: str
    model: ModelConfig
    cluster: ClusterSpec
    framework: Framework
    parallelism: Parallelism
    training: Training
    ddp: DdpSettings = DdpSettings()
    deepspeed: Annotated[DeepSpeedSettings, _AsIs()]
    fsdp2: Fsdp2Settings = Fsdp2Settings()
    fsdp1: Fsdp1Settings = Fsdp1Settings()
    megatron: MegatronSettings = MegatronSettings()
    allocator: AllocatorConfig = AllocatorConfig()
    faults: Faults = Faults()
    calibration: Any = None
    """What was measured on the user's own machine: a ``calibration.Calibration``, which few scenarios load."""
    sources: dict[str, str] = Field(default_factory=dict)
    """dotted path of a resolved value -> where it comes from, for values that the file does not give."""
    warnings: tuple[str, ...] = ()

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one data-parallel rank in an optimizer step."""
        return self.training.global_batch_size // (self.parallelism.dp * self.training.micro_batch_size)
