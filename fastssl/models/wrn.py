"""Wide residual networks for small images, in the form that the published semi-supervised code trains.

WRN-28-k: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; 28 = 3 stages x 4 blocks x 2 convolutions + 3 shortcuts + stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Transition = Literal["raw", "preact"]


class PreActBlock(nn.Module):
    """Pre-activation residual block: act(bn1) - 3x3 conv - act(bn2) - 3x3 conv, plus a shortcut (1x1 conv where the shape changes).

    ``entry`` says what the first half reads:
    "both"    conv1 and shortcut read act(bn1(x)) (first block of the network);
    "conv"    conv1 reads act(bn1(x)), the shortcut reads x (every ordinary block);
    "neither" conv1 and shortcut read raw x.  bn1 then feeds nothing: its affine parameters exist, get no gradient and are frozen, so that
              neither weight decay nor DDP touches them; its running statistics move only when ``track_dead_norm``.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        *,
        entry: Literal["both", "conv", "neither"],
        slope: float,
        bn_momentum: float,
        bn_eps: float,
        conv_bias: bool,
        dropout: float,
        track_dead_norm: bool,
    ):
        super().__init__()
        self.entry, self.slope, self.dropout, self.track_dead_norm = entry, slope, dropout, track_dead_norm
        self.bn1 = nn.BatchNorm2d(c_in, bn_eps, bn_momentum)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(c_out, bn_eps, bn_momentum)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=conv_bias)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=conv_bias) if c_in != c_out or stride != 1 else None
        if entry == "neither":
            self.bn1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.entry == "neither":
            if self.track_dead_norm and self.training:
                with torch.no_grad():
                    self.bn1(x)
            h = x
        else:
            h = F.leaky_relu(self.bn1(x), self.slope, inplace=True)
            if self.entry == "both":
                x = h
        h = F.leaky_relu(self.bn2(self.conv1(h)), self.slope, inplace=True)
        if self.dropout > 0:
            h = F.dropout(h, self.dropout, self.training)
        h = self.conv2(h)
        return h + (x if self.shortcut is None else self.shortcut(x))


class PreActResNet(nn.Module):
    """Stem conv, stages of :class:`PreActBlock`, final act(bn), global average pool: images [N, C, H, W] -> features [N, widths[-1]].

    ``widths`` = (stem, stage 1, stage 2, ...); every stage has ``blocks`` blocks; strides are ``first_stride``, 2, 2, ...
    ``transition``: "raw" = the first blocks of stages 2, 3, ... read raw x on both paths, as the published PyTorch code does;
    "preact" = conv1 reads act(bn1(x)), as in the WRN paper.  Convolutions start as normal, fan-out, gain sqrt 2; BatchNorm as 1 and 0.
    ``slope`` is LeakyReLU's (0 = ReLU); ``dropout`` in [0, 1) sits before each block's second convolution.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        widths: Sequence[int],
        blocks: int,
        stem_stride: int = 1,
        first_stride: int = 1,
        slope: float = 0.1,
        bn_momentum: float = 0.001,
        bn_eps: float = 1e-5,
        conv_bias: bool = False,
        transition: Transition = "raw",
        dropout: float = 0.0,
        track_dead_norm: bool = False,
    ):
        super().__init__()
        if transition not in ("raw", "preact"):
            raise ValueError(f"transition is {transition!r}; it must be 'raw' or 'preact'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
        if blocks < 1 or min(widths) < 1:
            raise ValueError(f"widths {list(widths)} and blocks {blocks} must be at least 1")
        self.slope = slope
        self.feat_dim = widths[-1]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=conv_bias)
        common = {"slope": slope, "bn_momentum": bn_momentum, "bn_eps": bn_eps, "conv_bias": conv_bias, "dropout": dropout, "track_dead_norm": track_dead_norm}
        stages = []
        for s, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            entry = "both" if s == 0 else "neither" if transition == "raw" else "conv"
            first = PreActBlock(c_in, c_out, first_stride if s == 0 else 2, entry=entry, **common)  # type: ignore[arg-type]
            rest = [PreActBlock(c_out, c_out, 1, entry="conv", **common) for _ in range(blocks - 1)]  # type: ignore[arg-type]
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(widths[-1], bn_eps, bn_momentum)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # biases, where present, keep PyTorch's default start
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h = self.stages(self.conv1(x_NCHW))
        return F.leaky_relu(self.bn(h), self.slope, inplace=True).mean(dim=(2, 3))


# The networks by name; every keyword of PreActResNet stays an option. Parameters counted for 3 input channels, without classifier.

# CIFAR-10: 128 features, 1 466 320 parameters. models/named.py has the variants that other published code trains under the same name.
wrn_28_2 = partial(PreActResNet, widths=(16, 32, 64, 128), blocks=4)

# CIFAR-100: 512 features.
wrn_28_8 = partial(PreActResNet, widths=(16, 128, 256, 512), blocks=4)

# STL-10: WRN-28-2 with a fourth stage (256 features) and stride 2 already in the first; convolutions carry biases.
wrn_var_37_2 = partial(PreActResNet, widths=(16, 32, 64, 128, 256), blocks=4, first_stride=2, bn_eps=1e-3, conv_bias=True)
