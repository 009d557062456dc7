"""Index sequences of the published samplers, rank by rank and epoch by epoch."""

from __future__ import annotations

import re

from fastssl.sources.order import Order, indices
from tests.golden.recorder import Recorder

LAWS = {"v2_labelled": "v2_labelled", "cifar_replacement": "mc_cifar", "distributed": "distributed"}  # recorded name -> order law


def samplers(rec: Recorder) -> None:
    length, world, per_rank = rec.hp("hp.dataset_len"), rec.hp("hp.world"), rec.hp("hp.samples_per_rank")
    epochs = rec.raw("hp.epochs").tolist()
    for recorded, law in LAWS.items():
        options = {"drop_last": False} if law == "distributed" else {"epoch_length": world * per_rank}
        # A batch of one row per rank: position t * world + r is entry t of rank r.
        order = Order(law, length, 0, batch=world, replicas=world, **options)
        count = -(-length // world) if law == "distributed" else per_rank
        for epoch in epochs:
            entries = indices(order, epoch * count * world, count * world).reshape(count, world)
            for rank in range(world):
                rec.check(f"{recorded}.r{rank}.e{epoch}", entries[:, rank])


def longtail_sampler(rec: Recorder) -> None:
    """One process, seed 0 + epoch: the whole permutation of every epoch."""
    for name in rec.names("order_epoch"):
        epoch, length = int(re.fullmatch(r"order_epoch(\d+)", name)[1]), len(rec.arrays[name])  # type: ignore[index]
        rec.check(name, indices(Order("distributed", length, 0, batch=1), epoch * length, length))


HANDLERS = {"simmatchv2_samplers_": samplers, "longtail_counts_sampler": longtail_sampler}
