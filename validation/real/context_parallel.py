"""Run torch's ring attention in real processes on the CPU with gloo, and write down its collectives.

``python -m validation.real.context_parallel 4`` prints them as JSON, forward and backward of one attention, for each
way to fetch keys and values. ``context_parallel`` itself knows CUDA's kernels alone: the ring around them is given
the CPU's fused kernel. Its result is held against attention over the whole sequence.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from validation.real.processes import launch, write

BATCH, HEADS, SEQUENCE, HEAD_DIM = 2, 4, 64, 16
METHODS = ("allgather", "alltoall")


def measure(num_ranks: int) -> dict[str, dict[str, list[list[Any]]]]:
    """Return method -> forward, backward -> (kind, bytes, ranks) of the first rank; all do the same."""
    written = launch(__file__, (), num_ranks)
    if any(each != written[0] for each in written):
        raise RuntimeError("the ranks differ")
    found: dict[str, dict[str, list[list[Any]]]] = written[0]
    return found


def worker(folder: str) -> None:
    """What each process runs."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    write(folder, {method: run(method) for method in METHODS})
    torch.distributed.destroy_process_group()


def run(method: str) -> dict[str, list[tuple[str, int, int]]]:
    import torch
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    from validation.real.recorder import Recorder

    aten = torch.ops.aten
    set_rotate_method(method)
    group = torch.distributed.group.WORLD
    rank, cp = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(BATCH, HEADS, SEQUENCE, HEAD_DIM, requires_grad=True) for _ in range(3)]
    grad = torch.randn(BATCH, HEADS, SEQUENCE, HEAD_DIM)
    expected = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
    expected_grads = torch.autograd.grad(expected, whole, grad)

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        """An early and a late piece, so that all ranks have as much to do."""
        pieces = tensor.detach().chunk(2 * cp, dim=2)
        return torch.cat((pieces[rank], pieces[2 * cp - 1 - rank]), dim=2)

    def forward(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)

    def backward(query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool, grad_out: Any) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, logsumexp, 0.0, is_causal
        )

    q, k, v = map(mine, whole)
    with Recorder() as there:
        out, lse = ring._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
    with Recorder() as back:
        grads = ring._templated_ring_attention_backward(
            group, 2, backward, mine(grad), "grad_out", q, k, v, out, lse, is_causal=True
        )
    torch.testing.assert_close(out, mine(expected), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(ours, mine(theirs), rtol=1e-4, atol=1e-5)
    return {"forward": there.collectives, "backward": back.collectives}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(sys.argv[2])
    else:
        print(json.dumps(measure(int(sys.argv[1])), indent=1))
