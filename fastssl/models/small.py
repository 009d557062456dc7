"""Small networks that train in minutes on a CPU at 28 to 64 pixels."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl.models.wrn import PreActResNet


def small_resnet(in_channels: int = 3, *, width: int = 16, depth: int = 1, stages: int = 3, stem_stride: int = 1, dropout: float = 0.0) -> PreActResNet:
    """Pre-activation ResNet with ReLU and ordinary BatchNorm (momentum 0.1): ``stages`` of ``depth`` blocks, ``width`` doubling per stage.

    Features: ``width * 2**(stages-1)``.  ``stem_stride`` 2 quarters the work of every stage.
    """
    widths = [width, *(width * 2**s for s in range(stages))]
    return PreActResNet(in_channels, widths=widths, blocks=depth, stem_stride=stem_stride, slope=0.0, bn_momentum=0.1, transition="preact", dropout=dropout)


class SmallCNN(nn.Module):
    """``layers`` of 3x3 conv, BatchNorm, ReLU with 2x2 max-pooling after each but the last, then global average pooling."""

    def __init__(self, in_channels: int, width: int, layers: int):
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"width {width} and layers {layers} must be at least 1")
        modules: list[nn.Module] = []
        for i in range(layers):
            c_out = width * 2**i
            modules += [nn.Conv2d(in_channels, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            if i < layers - 1:
                modules.append(nn.MaxPool2d(2))
            in_channels = c_out
        self.layers = nn.Sequential(*modules)
        self.feat_dim = in_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.layers(x_NCHW).mean(dim=(2, 3))


def small_cnn(in_channels: int = 3, *, width: int = 32, layers: int = 3) -> SmallCNN:
    """Plain convolutional network, ``width`` doubling per layer. Features: ``width * 2**(layers-1)``."""
    return SmallCNN(in_channels, width, layers)
