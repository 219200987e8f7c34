"""DeepSpeed's ``ds_config.json``, as it is found in the wild."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeepSpeedSettings:
    """What of a ds_config changes memory or time. Defaults are DeepSpeed's own; sizes in elements unless said.

    Source of defaults: deepspeed/runtime/zero/config.py and offload_config.py of DeepSpeed 0.19.6 @edaa7221.
    """

    stage: int = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    round_robin_gradients: bool = False
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = 2**63 - 1
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    memory_efficient_linear: bool = True
    offload_optimizer: str = "none"
    """none | cpu | nvme"""
    offload_param: str = "none"
    pin_memory: bool = True
    grad_accum_dtype: str | None = None
    communication_data_type: str | None = None
    gradient_clipping: float = 0.0
