"""Counting right answers: as cheap with many classes as with few, whatever the run asks of its other operations."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassStatScores

from fastssl.engine.scoring import _plain_counting


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_counting_under_deterministic_algorithms_compares_no_row_with_every_pair_of_classes():
    classes, rows = 60, 32
    logits, labels = torch.randn(rows, classes), torch.arange(rows) % classes
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        score = MulticlassStatScores(classes, average="none", ignore_index=-1, validate_args=False)
        with Largest() as seen, _plain_counting():
            score.update(logits, labels)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(was)
    assert seen.elements < rows * classes**2
    assert score.compute()[:, 0].sum() == (logits.argmax(1) == labels).sum()
