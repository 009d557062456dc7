"""Constants kept per device: made once, and never remembered when they were made under a tracer."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.augment.constants import constant


def test_constants_are_made_once_and_never_fake():
    values, cpu = (0.125, 7.0, 31.5), torch.device("cpu")
    with FakeTensorMode():
        fake = constant(values, torch.float32, cpu)
    assert type(fake) is not torch.Tensor
    real = constant(values, torch.float32, cpu)
    assert type(real) is torch.Tensor and real.tolist() == list(values)
    assert constant(values, torch.float32, cpu) is real
    assert constant(values, torch.float64, cpu).dtype == torch.float64
