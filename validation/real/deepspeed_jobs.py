"""A scenario under DeepSpeed: its engine over ZeRO 0 to 3, and its own pipeline.

What a CPU needs: no shared-memory op (it compiles for minutes), ``torch._dynamo`` imported before any hook, and torch's
own AdamW, which DeepSpeed calls untested; the collectives and the bytes of states do not depend on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.scenario.schema import Scenario
from validation.real.jobs import Note, batch, local, make_model, make_optimizer, num_blocks_of
from validation.real.modules import loss_of

TABLES: dict[tuple[int, ...], Tensor] = {}
LINEAR = nn.functional.linear
OUTSIDE_ZERO = ("grad_accum_dtype", "communication_data_type", "gradient_clipping", "offload_optimizer",
                "offload_param", "pin_memory", "offload_ratio", "offload_param_pin_memory", "throughput_timer_waits",
                "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints",
                "synchronize_checkpoint_boundary")  # fmt: skip
"""Fields of the settings that are not keys of ``zero_optimization``."""


def ds_config(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario's settings as DeepSpeed reads them."""
    settings, training = scenario.deepspeed, scenario.training
    zero: dict[str, Any] = {
        f.name: getattr(settings, f.name) for f in fields(DeepSpeedSettings) if f.name not in OUTSIDE_ZERO
    }
    if settings.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": settings.offload_optimizer, "pin_memory": settings.pin_memory}
        if settings.offload_ratio != 1.0:
            zero["offload_optimizer"]["ratio"] = settings.offload_ratio
    if settings.offload_param != "none":
        pinned = settings.offload_param_pin_memory
        zero["offload_param"] = {"device": settings.offload_param, "pin_memory": pinned}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": scenario.num_microbatches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "data_types": {"grad_accum_dtype": settings.grad_accum_dtype or training.precision},
        "gradient_clipping": settings.gradient_clipping,
    }
    if settings.communication_data_type:
        config["communication_data_type"] = settings.communication_data_type
    return config


def start() -> None:
    """Tell DeepSpeed of the process group that there is."""
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(torch.distributed.get_backend())
    if torch.distributed.get_backend() == "fake":
        from deepspeed.runtime.zero import partitioned_param_coordinator

        # ZeRO-3 compares its record with rank 0's, which does not arrive
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


class DeepSpeedJob:
    """DeepSpeed's engine without a pipeline."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        import deepspeed

        start()
        self.scenario, self.device = scenario, device
        config = ds_config(scenario)
        with deepspeed.zero.Init(config_dict_or_path=config) if scenario.deepspeed.stage == 3 else nullcontext():
            model = make_model(scenario, device)
        optimizer = make_optimizer(scenario, model.parameters())
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(self, note: Note) -> None:
        for _ in range(self.scenario.num_microbatches):
            tokens, labels = batch(self.scenario, self.device)
            loss = self.engine(tokens, labels)
            note("forward")
            self.engine.backward(loss)
            del loss, tokens, labels
            note("backward")
            self.engine.step()
        note("end")

    def states(self) -> dict[str, list[Tensor]]:
        return engine_states(self.engine)

    def close(self) -> None:
        self.engine.destroy()
        nn.functional.linear = LINEAR  # ZeRO-3 leaves its own behind


class DeepSpeedPipelineJob:
    """DeepSpeed's pipeline engine: 1F1B. ``passes`` are (kind, stage, microbatch) of the last step."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule

        start()
        self.scenario, self.device = scenario, device
        self.passes: list[tuple[str, int, int]] = []
        self.note: Note = lambda border: None
        count = scenario.model.num_hidden_layers
        code = scenario.training.code
        layers = [
            LayerSpec(EndPiece, scenario, device, "embed"),
            *(LayerSpec(BlockPiece, scenario, device, "block") for _ in range(count)),
            LayerSpec(EndPiece, scenario, device, "head"),
        ]
        assert len(set(num_blocks_of(scenario, scenario.parallelism.pp))) == 1, "blocks divide evenly"
        model = PipelineModule(
            layers,
            num_stages=scenario.parallelism.pp,
            loss_fn=lambda logits, labels: loss_of(logits, labels, code),
            partition_method="type:BlockPiece",
            activation_checkpoint_interval=1 if scenario.training.recompute == "full" else 0,
            checkpointable_layers=["BlockPiece"],
        )
        optimizer = make_optimizer(scenario, model.parameters())
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(scenario))
        TABLES.clear()
        self._follow()

    def _follow(self) -> None:
        table = dict(self.engine._INSTRUCTION_MAP)
        for command, method in list(table.items()):
            if command.__name__ in ("ForwardPass", "BackwardPass"):
                table[command] = self._followed(command.__name__.removesuffix("Pass").lower(), method)
            elif command.__name__ == "OptimizerStep":
                table[command] = self._noted(method)
        self.engine._INSTRUCTION_MAP = table

    def _followed(self, kind: str, method: Any) -> Any:
        def followed(engine: Any, *args: Any, **kwargs: Any) -> None:
            done = sum(1 for each in self.passes if each[0] == kind)
            self.passes.append((kind, engine.stage_id, done))
            method(engine, *args, **kwargs)
            self.note(kind)

        return followed

    def _noted(self, method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> None:
            self.note("step")
            method(*args, **kwargs)

        return noted

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield batch(self.scenario, self.device)

    def step(self, note: Note) -> None:
        self.note = note
        self.passes.clear()
        ends = self.engine.is_first_stage() or self.engine.is_last_stage()
        self.engine.train_batch(self._batches() if ends else None)
        note("end")

    def states(self) -> dict[str, list[Tensor]]:
        return engine_states(self.engine)

    def close(self) -> None:
        self.engine.destroy()


class Piece(nn.Module):
    """A layer of DeepSpeed's pipeline: embedding, block or head. Takes and returns one tensor."""

    def __init__(self, scenario: Scenario, device: torch.device, kind: str) -> None:
        super().__init__()
        self.model = make_model(
            scenario, device, int(kind == "block"), first=kind == "embed", last=kind == "head"
        )  # fmt: skip
        rotary = self.model._buffers.pop("rotary", None)
        if rotary is not None and kind == "block":  # all blocks of a rank share one table
            self.model.register_buffer("rotary", TABLES.setdefault(tuple(rotary.shape), rotary), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class BlockPiece(Piece):
    """What is recomputed."""


class EndPiece(Piece):
    """What is not."""


def engine_states(engine: Any) -> dict[str, list[Tensor]]:
    """Return what DeepSpeed's engine and its optimizer hold, whatever the stage."""
    parameters = list(engine.module.parameters())
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found: dict[str, list[Tensor]] = {
        "parameters": [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [t for s in inner.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()],
        "buffers": [local(b) for b in engine.module.buffers()],
    }
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat"):
        found["optimizer"] += [t for t in getattr(optimizer, name, []) if isinstance(t, Tensor)]
    for groups in getattr(optimizer, "fp32_groups", []):
        found["optimizer"] += list(groups)
    for gradients in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        found["gradients"] += [g for g in gradients or [] if isinstance(g, Tensor)]
    if (flat := getattr(optimizer, "grad_partitions_flat_buffer", None)) is not None:
        found["gradients"].append(flat)
    return found
