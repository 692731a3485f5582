"""The columns that a backward's products may not leave out: p >= threshold in some row, or a label.

Opt-in (``skip_below``): p falls off so fast that a batch of some thousand rows touches a part of a
large vocabulary only. The threshold bounds entries, not their sum: the mass that a row loses is
reported. Source: cut cross-entropy, Wijmans et al. 2024, arXiv:2411.09009, section 4.3.
"""

import torch
from torch import Tensor

from fastpref.kernels.logits import IGNORE_INDEX, tiles
from fastpref.kernels.logp_rows import RowGrads
from fastpref.kernels.vocab_parallel import sum_over_ranks


class ActiveColumns:
    """Finds them slab by slab, and counts."""

    def __init__(self, grads: RowGrads, threshold: float, rows: int) -> None:
        self.grads, self.threshold, self.rows = grads, threshold, rows
        self.skipped = 0
        self.mass = torch.zeros_like(grads.values[0])

    def _probs(self, exps: Tensor, shift: Tensor, part: slice) -> Tensor:
        _, top, log_total, *_ = self.grads.values[:, part]
        scale = ((shift[part] - top) - log_total).exp()
        scale.masked_fill_(self.grads.target[part] == IGNORE_INDEX, 0.0)
        return exps[part] * scale[:, None]

    def of(self, exps: Tensor, shift: Tensor, start: int) -> Tensor | None:
        """(k,) columns of the slab at ``start:``, of which ``exps`` (M, width) was kept.

        None where there are no others. One host sync.
        """
        M, width = exps.shape
        parts = [slice(*ends) for ends in tiles(M, self.rows)]
        peak = shift.new_zeros(width)
        for part in parts:
            p = self._probs(exps, shift, part)
            if self.grads.with_entropy:  # the size of its slope where that is above 1
                slope = p.clamp(min=torch.finfo(p.dtype).tiny).log_()
                slope.add_(self.grads.values[5, part, None]).abs_().clamp_(min=1)
                p.mul_(slope)
            torch.maximum(peak, p.amax(0), out=peak)
        column = self.grads.target - start
        inside = (column >= 0) & (column < width)
        label = torch.where(inside, torch.inf, 0.0).to(peak.dtype)
        peak.scatter_reduce_(0, column.clamp(0, width - 1), label, "amax")
        # what is NaN is not small: it has to reach the gradients
        active = (~(peak < self.threshold)).nonzero()[:, 0]
        if len(active) == width:
            return None
        self.skipped += width - len(active)
        small = (peak < self.threshold).to(peak.dtype)
        for part in parts:
            self.mass[part].addmv_(self._probs(exps, shift, part), small)
        return active

    def stats(self, num_columns: int, group: str) -> Tensor:
        """(2,) fp32: the active fraction of all columns, and the largest mass that a row lost."""
        counts = self.mass.new_tensor([self.skipped, num_columns])
        skipped, columns = sum_over_ranks(counts, group)
        mass = sum_over_ranks(self.mass, group)
        most = mass.amax() if len(mass) else mass.new_zeros(())
        return torch.stack([1 - skipped / columns, most]).float()
