"""From a plan to the two tensors that kernels read: whole numbers ``rows`` int64 [B, columns] and ``reals`` float64 [B, numbers].

A handful of small tensor operations on the plan's device, in fixed shapes and without host reads; arguments and affine coefficients come from the
functions that the reference uses, so they are equal to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment import geometry
from fastssl.augment.blur import box_weights
from fastssl.augment.ops import CODE, SPACES, argument, tables
from fastssl.augment.plan import Plan
from fastssl.augment.policy import Law, Policy, resized_to
from fastssl.augment.triton_passes import Move, ResizePass, Shape

OP_REALS = 7  # an op's argument, then its six affine coefficients


class Numbers:
    """Collects columns: every ``add`` returns the place of what it added; ``tensors`` stacks them once all passes are through."""

    def __init__(self, policy: Policy, plan: Plan, extent_B2: Tensor, canvas: Shape):
        self.policy, self.plan = policy, plan
        self.extent = torch.stack([extent_B2[:, 0].clamp(1, canvas.height), extent_B2[:, 1].clamp(1, canvas.width)], 1).long()
        self.zero = torch.zeros_like(self.extent[:, 0])
        self.columns: list[Tensor] = []
        self.reals: list[Tensor] = []
        self.real_count = 0
        self._ops: dict[int, tuple[int, int]] = {}

    def add(self, *columns: Tensor) -> int:
        self.columns += [column.long() for column in columns]
        return len(self.columns) - len(columns)

    def add_reals(self, block_BN: Tensor) -> int:
        self.reals.append(block_BN)
        self.real_count += block_BN.shape[1]
        return self.real_count - block_BN.shape[1]

    def tensors(self) -> tuple[Tensor, Tensor]:
        rows = torch.stack(self.columns or [self.zero], 1)
        return rows, torch.cat(self.reals, 1) if self.reals else self.zero.double().unsqueeze(1)

    def sides(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Height and width of each image, int64 [B]."""
        if not shape.full:
            return self.extent[:, 0], self.extent[:, 1]
        return torch.full_like(self.zero, shape.height), torch.full_like(self.zero, shape.width)

    def move(self, move: Move, source: Shape) -> int:
        """The four columns of a map; 0 where there is none."""
        if not move.laws:
            return 0
        first, mirrors = [self.zero, self.zero], [self.zero, self.zero]
        window = 0  # becomes 1 once the window has been cut: later mirrors turn the window itself
        for number in move.laws:
            law, drawn = self.policy.laws[number], self.plan.laws[number]
            if law.name == "flip":
                mirrors[window] = mirrors[window] ^ drawn["flip"].long()
            else:
                first, window = self._window(law, drawn, source), 1
        return self.add(*first, *mirrors)

    def _window(self, law: Law, drawn: dict[str, Tensor], source: Shape) -> list[Tensor]:
        if law.name == "pad_crop":
            return [drawn["y"] - law["pad"], drawn["x"] - law["pad"]]
        return [geometry.centred(side, self.policy.size) for side in self.sides(source)]

    def op(self, law_number: int, slot: int, domain: Shape) -> tuple[int, int]:
        """(column of the code, place of the argument) of one RandAugment op.  All slots of a law are computed at once."""
        if law_number not in self._ops:
            law, drawn = self.policy.laws[law_number], self.plan.laws[law_number]
            space, n = SPACES[law["space"]], law["n"]
            code = torch.where(drawn["applied"], drawn["code"], CODE["Identity"])
            a = argument(space, code, drawn["level"], drawn["sign"])
            height, width = (side.unsqueeze(1).expand(-1, n).reshape(-1) for side in self.sides(domain))
            flat = code.reshape(-1)
            matrix = geometry.coefficients(flat, a.reshape(-1), height, width)
            matrix = geometry.whole_pixels(matrix, flat, tables(space, code.device)["pixels"][flat])
            if space.resample == "nearest":
                matrix = geometry.fixed_point(matrix).double()
            block = torch.cat([a.unsqueeze(2), matrix.view(-1, n, 6)], 2)
            self._ops[law_number] = self.add(*code.unbind(1)), self.add_reals(block.flatten(1))
        code_at, real_at = self._ops[law_number]
        return code_at + slot, real_at + slot * OP_REALS

    def axes(self, p: ResizePass, source: Shape) -> int:
        """Columns of the y axis, then of the x axis, of a resize; boxes are bounded so that no read leaves the buffer."""
        height, width = self.sides(source)
        law, drawn = self.policy.laws[p.law], self.plan.laws[p.law]
        if law.name == "resized_crop":
            top, left, h, w = drawn["box"].unbind(1)
            columns = []
            for first, side, longest in ((top, h, height), (left, w, width)):
                first = torch.minimum(first.clamp_min(0), longest - 1)
                columns += [first, torch.minimum(side.clamp_min(1), longest - first), torch.full_like(first, self.policy.size), self.zero]
            return self.add(*columns)
        if p.center is not None:
            size = self.policy.size
            y, x = ([self.zero, side, out, geometry.centred(out, size)] for side, out in ((height, drawn["height"]), (width, drawn["width"])))
            return self.add(*y, *x)
        goals = [torch.full_like(self.zero, goal) for goal in resized_to(law, self.policy.size)]
        return self.add(self.zero, height, goals[0], self.zero, self.zero, width, goals[1], self.zero)

    def mirror(self, laws: tuple[int, ...]) -> int:
        """The column of mirrors that act one after the other; -1 where there is none."""
        if not laws:
            return -1
        total = self.zero
        for number in laws:
            total = total ^ self.plan.laws[number]["flip"].long()
        return self.add(total)

    def coin(self, law_number: int | None) -> int:
        """The column of a law that applies or does not; -1 where the pass has none."""
        return -1 if law_number is None else self.add(self.plan.laws[law_number]["applied"])

    def jitter(self, law_number: int | None) -> tuple[int, int]:
        """(columns of the order and the hue byte's shift, place of the factors) of color_jitter; (-1, 0) where the pass has none."""
        if law_number is None:
            return -1, 0
        drawn = self.plan.laws[law_number]
        order = torch.where(drawn["applied"].unsqueeze(1), drawn["order"], -1)
        shift = (drawn["factor"][:, 3] * 255).trunc().long() & 255
        return self.add(*order.unbind(1), shift), self.add_reals(drawn["factor"])

    def blur(self, law_number: int) -> int:
        drawn = self.plan.laws[law_number]
        return self.add(*box_weights(drawn["sigma"]), drawn["applied"])
