"""Our FSDP2 memory against torch's FSDPMemTracker: Llama-3 8B on 8 ranks and 70B on 64, with and without recompute.

``python -m validation.fsdp_mem_tracker [8b] [8b-full] [70b] [70b-full]`` runs torch's own ``fully_shard`` over fake
tensors under a fake process group, as rank 0, with ``torch.distributed._tools.fsdp2_mem_tracker.FSDPMemTracker``, for
one step after another; then it asks our program of the same scenario what is held at the same moment, by the tracker's
categories, and writes ``validation/fsdp_mem_tracker.yaml``. 8B takes a minute or two of one core, 70B five to ten.

On a CPU build of torch only CPU fake tensors survive a backward, so CPU kernels are what is counted. Where they are not
CUDA's: RMSNorm is composed of many operators on the CPU; here it is one (:class:`FusedNorm`) with the outputs of CUDA's
``_fused_rms_norm``. All that is left is in :func:`causes`; ``tests/real/test_fsdp_mem_tracker.py`` adds it up.
"""

from __future__ import annotations

import gc
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import processor
from typing import Any

import torch
import torch._dynamo
import yaml
from torch import Tensor, nn

from sim.ir.program import Alloc, Call, Free, Program, Storage
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.parallel.precision import dtypes_of
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import Scenario
from validation.real import modules
from validation.real.measure import start_rank

OUT = Path(__file__).with_suffix(".yaml")
CASES = {
    "8b": ("llama-3-8b", 1, "none"),
    "8b-full": ("llama-3-8b", 1, "full"),
    "70b": ("llama-3-70b", 8, "none"),
    "70b-full": ("llama-3-70b", 8, "full"),
}
"""Name -> model, nodes of 8 GPUs, recompute."""
SCENARIO = """
model: {model}
cluster: {{node: dgx-h100, num_nodes: {nodes}}}
framework: fsdp2
fsdp2: {{optimizer_implementation: fused}}
training:
  {{sequence_length: 8192, micro_batch_size: 1, global_batch_size: {ranks}, precision: bf16, recompute: {recompute},
   attention: flash-2, code: torch}}
"""


# --- a norm of one kernel --------------------------------------------------------------------------


@torch.library.custom_op("sim_real::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``_fused_rms_norm``: the result, and rstd in fp32."""
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (x.float() * rstd).to(x.dtype) * weight, rstd


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("sim_real::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``_fused_rms_norm_backward``: gradients of the input and of the weight."""
    normed = x.float() * rstd
    scaled = grad.float() * weight.float()
    inner = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
    return (inner * rstd).to(x.dtype), (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    x, weight, rstd = ctx.saved_tensors
    return rms_norm_backward(grad, x, rstd, weight)


rms_norm.register_autograd(_differentiate, setup_context=_keep)


class FusedNorm(nn.Module):
    """An RMSNorm whose temporaries nobody sees, as on a GPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)[0]


# --- torch -------------------------------------------------------------------------------------------


def track(scenario: Scenario) -> dict[str, dict[str, int]]:
    """Return what the tracker says of the second step: bytes by category at its peak, and when it ends."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    from validation.real.jobs import batch, fully_sharded, make_model, mesh_of
    from validation.real.modules import loss_of

    device = torch.device("cpu")
    mesh = mesh_of(scenario, device)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = make_model(scenario, device)
    sharded: Any = fully_sharded(scenario, model, mesh["dp"])
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-4, fused=True)
    code = scenario.training.code

    def step(tokens: Tensor, labels: Tensor) -> None:
        logits = sharded(tokens)
        loss = loss_of(logits, labels, code)
        del logits
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    with fake:
        step(*batch(scenario, device))  # the first makes the states, and global tensors while DTensor plans
        gc.collect()
        tracker = FSDPMemTracker(sharded, optimizer)
        tokens, labels = batch(scenario, device)
        tracker.track_inputs((tokens, labels))
        with tracker:
            step(tokens, labels)
        peak = tracker.get_tracker_snapshot("peak")[device]
        end = tracker.get_tracker_snapshot("current")[device]
    named = lambda found: {getattr(k, "value", k): int(v) for k, v in found.items()}  # noqa: E731
    return {"peak": named(peak), "end": named(end)}


# --- ours --------------------------------------------------------------------------------------------


def ours(scenario: Scenario) -> dict[str, dict[str, int]]:
    """Return the same of our program: bytes by the tracker's categories when most is held, and when a step ends."""
    dtypes = dtypes_of(scenario)
    ledger = describe(
        scenario.model,
        scenario.training,
        parameter_dtype=dtypes.parameter,
        compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
    )
    return held(lower(ledger, scenario).programs[0])


def held(program: Program) -> dict[str, dict[str, int]]:
    live: dict[int, tuple[Storage, str]] = {}
    total = best = 0
    peak: dict[str, int] = {}

    def parts() -> dict[str, int]:
        found: dict[str, int] = {}
        for storage, category in live.values():
            found[category] = found.get(category, 0) + storage.num_bytes
        return found | {"Total": total}

    def run(calls: tuple[Call, ...], watched: bool) -> None:
        nonlocal total, best, peak
        for call in calls:
            phase = call.chunk.split(".")[0]
            for each in program.chunks[call.chunk]:
                if isinstance(each, Alloc):
                    live[id(each.storage)] = each.storage, category_of(each.storage, phase)
                    total += each.storage.num_bytes
                    if watched and total > best:
                        best, peak = total, parts()
                elif isinstance(each, Free):
                    total -= each.storage.num_bytes
                    del live[id(each.storage)]

    run(program.setup, watched=False)
    run(tuple(call for call in program.first_step if call.chunk != "workspaces"), watched=False)
    run(program.step, watched=True)
    return {"peak": peak, "end": parts()}


def causes(scenario: Scenario, when: str, mine: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return what the tracker counts beyond ours: category -> name of the cause -> bytes. ``mine``: ours then."""
    model, training = scenario.model, scenario.training
    tensors = 9 * model.num_hidden_layers + 3
    found = {"OptState": {"step counts, fp32 on the host, one a parameter": 4 * tensors}}
    if when == "end":
        ids = 2 * 8 * training.micro_batch_size * training.sequence_length
        return found | {"Inputs": {"tokens and labels, which the script holds": ids}}
    found["Activation"] = {"the loss and the weight it was divided by, held during backward": 8}
    if training.recompute == "none":
        found["Activation"]["state of CUDA's random generator, saved by each attention"] = -16 * model.num_hidden_layers
    elif mine.get("All Gather", 0):  # the peak is in a block that has just been run again
        found["Temp"] = {"state of CUDA's random generator, saved by its attention": -16}
    return found


def category_of(storage: Storage, phase: str) -> str:
    """Return the tracker's category of one of our storages."""
    if storage.name.startswith("batch."):
        return "Inputs"
    later = {
        "parameters": "Unsharded Param",
        # the tracker knows a whole parameter's gradient once FSDP's hook has seen it: until then it is Temp
        "gradients": "Temp" if "grad:" in storage.name else "Sharded Grad",
        "activations": "Activation" if phase == "forward" else "Temp",
        "buffers": "All Gather" if "gather" in storage.name else "Reduce Scatter",
        "optimizer": "OptState",
    }
    at_setup = {"parameters": "Sharded Param", "buffers": "Buffer"}
    return (at_setup if phase == "setup" else later).get(storage.category, "Temp")


def main(names: list[str]) -> None:
    found = yaml.safe_load(OUT.read_text()) if OUT.exists() else {"cases": {}}
    modules.RMS_NORM = FusedNorm
    for name in names or list(CASES):
        model, nodes, recompute = CASES[name]
        text = SCENARIO.format(model=model, nodes=nodes, ranks=8 * nodes, recompute=recompute)
        scenario = load_scenario_text(text, name)
        start_rank(fake_world=8 * nodes)
        started = time.process_time()
        theirs = track(scenario)
        seconds = time.process_time() - started
        started = time.process_time()
        mine = ours(scenario)
        found["cases"][name] = {
            "scenario": yaml.safe_load(text),
            "tracker": theirs,
            "ours": mine,
            "cpu_seconds": {"tracker": round(seconds, 1), "ours": round(time.process_time() - started, 2)},
        }
        found["measured"] = {
            "date": date.today().isoformat(),
            "torch": version("torch"),
            "machine": f"{processor() or 'x86_64'}, CPU only",
        }
        found["cases"][name]["causes"] = {when: causes(scenario, when, mine[when]) for when in ("peak", "end")}
        OUT.write_text(yaml.safe_dump(found, sort_keys=False, width=120))
        for when in ("peak", "end"):
            for category in sorted({*theirs[when], *mine[when]}):
                a, b = theirs[when].get(category, 0), mine[when].get(category, 0)
                print(name, when, f"{category:16} tracker {a:>15,} ours {b:>15,} {b - a:>+15,}", flush=True)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
