"""A penalty on what the last loop still changes (`loops.fixed_point`), so that further loops change little.

    weight * mean over tokens of |h[T] - h[T-1]|^2 / |h[T]|^2

with T the loops of the pass. The trap: a larger state lowers the ratio as a smaller change does, so the denominator has
no gradient.

Decisions: LOOPS-14.
"""

# B batch, S' tokens of each sequence on this rank, D model.

import torch
from torch import Tensor

from mythos_dist.model.loops import Loops


def add_fixed_point_loss(
    aux_loss: Tensor, before: Tensor, after: Tensor, weight: float, loops: Loops, token_share: float
) -> Tensor:
    """Add the penalty to aux_loss (1,), of the states before and after the last loop (B, S', D).

    The tokens are `token_share` of the sequences': this rank's term of the sum over ranks. A sequence with one loop has
    no penalty: its state before the loop is the initial one.
    """
    if loops.n_loops == 1:
        return aux_loss
    size = after.detach().float().square().sum(-1).clamp(min=1e-30)
    ratio = (after - before).float().square().sum(-1) / size  # (B, S')
    if loops.depths is not None:
        ratio = torch.where((loops.depths > 1).unsqueeze(1), ratio, 0.0)
    return aux_loss + weight * ratio.mean() * token_share
