"""Fused losses and updates: Triton on CUDA, a torch reference everywhere else, one function for both.

What stays in torch: ShrinkMatch's class shrinking (``functional.shrink_loss``) and SimMatchV2's edges (``functional.edge_matching``).  Shrinking sorts
[U, C] scores and scans them, a megabyte or two in a few device kernels without a host sync, so a recorded step launches them for next to nothing; sorting
rows of 22k classes inside one program would not fit its registers.  Edges multiply student similarities with a dense [N, C] label matrix and send a gradient
back through the product: that is a second kernel family, not this one.
"""

from fastssl.kernels.choice import runs_triton, use
from fastssl.kernels.pseudo_label_ce import PseudoLabelCE, pseudo_label_ce
from fastssl.kernels.sgd_ema import SgdEma, sgd_ema_
from fastssl.kernels.similarity import instance_matching
from fastssl.kernels.soft_ce import consistency
from fastssl.kernels.two_heads import TwoHeads, two_head_losses

__all__ = ["PseudoLabelCE", "SgdEma", "TwoHeads", "consistency", "instance_matching", "pseudo_label_ce", "runs_triton", "sgd_ema_", "two_head_losses", "use"]
