"""Before the first update of a fresh run: a method may fill its tables from predictions of the starting teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastssl.engine.step import Updater
from fastssl.errors import RecipeError
from fastssl.methods.base import Method
from fastssl.parallel import gather_rows
from fastssl.sources.feed import Stream, eval_batches
from fastssl.types import Out, View

BATCH = 64  # rows per process and forward


def prepare_method(updater: Updater, streams: Sequence[Stream], views: Mapping[str, View]) -> bool:
    """Let the method look at the starting teacher's predictions once; returns whether it did. Collective: every rank must call it."""
    method = updater.train_module.method
    if type(method).prepare is Method.prepare:
        return False
    if updater.teacher is None:
        raise RecipeError("this method looks at its teacher before training, but teacher.enabled is false")
    teacher, by_name = updater.teacher, {stream.name: stream for stream in streams}
    device, world, rank = updater.accelerator.device, updater.accelerator.num_processes, updater.accelerator.process_index

    def predict(name: str) -> Iterator[tuple[Tensor, Out]]:
        stream = by_name[views[name].stream]
        places = np.arange(len(stream.rows_N), dtype=np.int64)
        renderer = updater.renderer.one(name, BATCH)
        for raw in eval_batches(stream.source, stream.rows_N, places, BATCH, world, rank, device=device):
            with updater.accelerator.autocast():
                out = teacher.network(renderer(raw))
            # index -1 marks padding; every rank gets every row, in the order of the list
            keep = raw.index_B
            yield gather_rows(keep), Out(gather_rows(out.logits_NC), gather_rows(out.feat_ND))

    was_training = teacher.training
    teacher.eval()
    try:
        with torch.no_grad():
            method.prepare(predict)
    finally:
        teacher.train(was_training)
    return True
