"""Layers over pipeline stages: which stage holds which layers, and what a stage makes of a tied embedding.

The embedding stands on the first stage, the head with the final norm on the last. Blocks are spread evenly where they
divide. Where they do not, the embedding and the head count as a layer each and the first stages take the rest:
Megatron's ``account_for_embedding_in_pipeline_split`` with ``account_for_loss_in_pipeline_split``
(megatron/core/transformer/transformer_block.py) and torchtitan's ``input_weight`` and ``output_weight`` of 1
(torchtitan/distributed/pipeline_parallel.py); so Llama-3-405B's 126 layers are 7, 8, ..., 8, 7 on 16 stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sim.ir.ledger import Layer, Tensor


@dataclass(frozen=True, slots=True)
class Stage:
    """A virtual stage of the model: its place, its layers, and what of the batch they read.

    ``tied`` are (index of the layer in the stage, parameter) of weights that another stage holds too: their gradients
    are added over the embedding group.
    """

    index: int
    layers: tuple[Layer, ...]
    batch_inputs: tuple[Tensor, ...]
    tied: tuple[tuple[int, str], ...] = ()


def blocks_per_stage(
    num_blocks: int, num_stages: int, given: Sequence[int] | None = None, *, in_a_v: bool = False
) -> tuple[int, ...]:
    """Return the blocks of each virtual stage, in the order of the model.

    ``given`` has an entry for each virtual stage, or for each rank, whose virtual stages (rank, rank + p, ...) then
    share them as evenly as they go. ``in_a_v``: a rank's are rank and 2p-1-rank.
    """
    if given is not None:
        ranks = len(given)
        chunks = num_stages // ranks
        assert chunks * ranks == num_stages, f"{ranks} entries for {num_stages} stages"
        if in_a_v and chunks == 2:
            return tuple(_share(count, 2, 0) for count in given) + tuple(_share(n, 2, 1) for n in reversed(given))
        return tuple(_share(given[stage % ranks], chunks, stage // ranks) for stage in range(num_stages))
    if num_blocks % num_stages == 0:
        return (num_blocks // num_stages,) * num_stages
    counted = [_share(num_blocks + 2, num_stages, stage) for stage in range(num_stages)]
    counted[0] -= 1
    counted[-1] -= 1
    return tuple(counted)


def _share(count: int, parts: int, part: int) -> int:
    """Return what of ``count`` falls to one of the parts; the first ones take the rest."""
    return count // parts + (1 if part < count % parts else 0)


def split(
    layers: Sequence[Layer],
    batch_inputs: Sequence[Tensor],
    num_stages: int,
    given: Sequence[int] | None = None,
    *,
    in_a_v: bool = False,
) -> tuple[Stage, ...]:
    """Return the virtual stages of a model, in its order. One stage is the model as it is."""
    if num_stages == 1:
        return (Stage(0, tuple(layers), tuple(batch_inputs)),)
    blocks = [layer for layer in layers if layer.kind == "block"]
    before = list(layers[: next(i for i, layer in enumerate(layers) if layer.kind == "block")])
    after = list(layers[len(before) + len(blocks) :])
    counts = blocks_per_stage(len(blocks), num_stages, given, in_a_v=in_a_v)
    assert sum(counts) == len(blocks), f"{counts} for {len(blocks)} layers"
    stages, start = [], 0
    for index, count in enumerate(counts):
        own = blocks[start : start + count]
        start += count
        if index == 0:
            own = before + own
        if index == num_stages - 1:
            own = own + after
        stages.append(own)
    return tuple(_stage(index, own, stages, batch_inputs) for index, own in enumerate(stages))


def _stage(
    index: int, own: Sequence[Layer], stages: Sequence[Sequence[Layer]], batch_inputs: Sequence[Tensor]
) -> Stage:
    names = {layer.name for layer in own}
    elsewhere = {
        (layer_name, parameter)
        for stage in stages
        for layer in stage
        if layer.tied and not any(layer is mine for mine in own)
        for _, layer_name, parameter in layer.tied
    }
    kept: list[Layer] = []
    tied: list[tuple[int, str]] = []
    for place, layer in enumerate(own):
        away = [ours for ours, layer_name, _ in layer.tied if layer_name not in names]
        tied += [(place, ours) for ours in away]
        tied += [(place, p.name) for p in layer.parameters if (layer.name, p.name) in elsewhere]
        # a stage that does not hold the owner keeps a copy of its own
        kept.append(replace(layer, tied=tuple(t for t in layer.tied if t[0] not in away)) if away else layer)
    read = {name for layer in kept for op in (*layer.forward, *layer.backward) for name in (*op.reads, *op.saves)}
    # what all blocks share (angles, masks) stands in the model's first layer; every stage with blocks makes its own
    if index and stages[0][0].buffers and any(layer.kind == "block" for layer in kept):
        kept[0] = replace(kept[0], buffers=stages[0][0].buffers)
    return Stage(index, tuple(kept), tuple(t for t in batch_inputs if t.name in read), tuple(tied))
