"""What a framework has to know of the job besides the layers and its own settings."""

from __future__ import annotations

from dataclasses import dataclass

from sim.ir.ledger import DType


@dataclass(frozen=True, slots=True)
class Plan:
    """The job, as one rank's framework sees it.

    ``dp``                 ranks that share the model states (the data-parallel group)
    ``parameter_dtype``    dtype of the parameters that the passes read, and of the gradients that autograd hands over
    ``master``             fp32 master weights beside 16-bit parameters (without them the parameters are fp32)
    ``num_microbatches``   microbatches of a rank in one optimizer step
    ``optimizer``          adamw | adam | sgd
    ``fused``              DeepSpeed's multi-tensor FusedAdam, what a config's "AdamW" means on a GPU; else torch's own
    ``dp_axis``            name of the data-parallel axis
    ``dp_rank``            which partition is this rank's; None: the one that holds most
    ``num_gpus_per_node``  ranks of one node
    ``root_modules``       torch modules around the layers that own no parameter (a Hugging Face model has two, the
                           causal model and its decoder): ZeRO-3 prefetches as it enters each
    ``gpu_memory_bytes``   of the GPU, what the CUDA context leaves; 0: unknown, taken to be enough
    ``gradient_clipping``  largest norm under FSDP; 0 is no clipping (DeepSpeed has it among its own settings)
    ``replicas``           groups of ``dp`` ranks that hold the same shards and average their gradients (HSDP)
    ``replicate_axis``     name of the axis over them
    ``reshard_axis``       name of the axis over which FSDP2 gathers again after resharding to fewer ranks
    ``pipeline``           other microbatches' passes run between the forward and the backward of one
    ``gathers_ahead``      torch's schedule of several stages a rank gathers a stage's parameters before it is its turn
    ``model_ranks``        ranks that hold one replica together, on the axis "model"
    ``tp``                 tensor-parallel ranks
    ``partial``            (layer, parameter) whose gradients each tensor-parallel rank has a part of
    """

    dp: int
    parameter_dtype: DType
    master: bool
    num_microbatches: int
    optimizer: str = "adamw"
    fused: bool = True
    dp_axis: str = "dp"
    dp_rank: int | None = None
    num_gpus_per_node: int = 8
    root_modules: int = 1
    gpu_memory_bytes: int = 0
    gradient_clipping: float = 0.0
    replicas: int = 1
    replicate_axis: str = "dp_replicate"
    reshard_axis: str = "dp_reshard"
    pipeline: bool = False
    gathers_ahead: bool = False
    model_ranks: int = 1
    tp: int = 1
    partial: tuple[tuple[int, str], ...] = ()

    @property
    def loss_scaling(self) -> bool:
        """fp16 scales the loss and looks for overflow; bf16 and fp32 do not."""
        return self.parameter_dtype == "fp16"
