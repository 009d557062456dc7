"""Backbone, optional neck, classifier and a method's extra heads as one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fastssl.types import Out


class Network(nn.Module):
    """images [N, C, H, W] -> :class:`Out` with logits [N, K], features [N, feat_dim] and one tensor per extra head that is not on request.

    ``backbone`` maps images to pooled features; ``neck`` (identity by default) maps those to the ``feat_dim`` features that the classifier,
    every head and ``Out.feat_ND`` share.  ``bn_groups`` is the number of BatchNorm row groups on this rank.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feat_dim: int,
        classifier: nn.Module,
        heads: Mapping[str, nn.Module] | None = None,
        neck: nn.Module | None = None,
        on_request: Iterable[str] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Identity() if neck is None else neck
        self.classifier = classifier
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.feat_dim = feat_dim
        self.bn_groups = 1
        self.on_request = frozenset(on_request)
        self.eval_backbone = False  # a frozen backbone keeps its BatchNorm statistics

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.eval_backbone:
            self.backbone.eval()
        return self

    def forward(self, x_NCHW: Tensor) -> Out:
        feat = self.neck(self.backbone(x_NCHW))
        return Out(self.classifier(feat), feat, {name: head(feat) for name, head in self.heads.items() if name not in self.on_request})
