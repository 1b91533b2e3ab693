"""Statistics of a pass's loops: norms and changes of the hidden state, token correlation, the gain of the update.

They show the known failures of looped models (Huginn, Geiping et al. 2025): the hidden states of all tokens collapse to
one, they are ignored, or they grow. A decay below 1 does not bound the block, so the gain is that of the full update.
"""

# B batch, S' tokens of each sequence on this rank, D model.

from collections.abc import Callable

import torch
from torch import Tensor

from mythos_dist.parallel.collectives import sum_over_sequence
from mythos_dist.parallel.mesh import Mesh

POWER_ITERATIONS = 3


class LoopRecorder:
    """Records the loops that a rank runs in passes without gradient.

    COLUMNS are sums over tokens of: 1; the norm of the state; its relative change by the loop; the mean cosine
    between the state and those of the token's sequence; the halting weight.
    """

    COLUMNS = ("tokens", "state_norm", "residual_ratio", "token_correlation", "act_mass")

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.rows: dict[int, Tensor] = {}  # by loop index: COLUMNS, fp32
        self.gains: list[Tensor] = []  # (), one per pass
        self.rho: Tensor | None = None  # (): the largest element of decay

    def record(self, t: int, before: Tensor, after: Tensor, weight: Tensor, seq_len: int) -> None:
        """Record loop t: the states before and after it (B, S', D), and the halting weight of `after` (B, S').

        seq_len: tokens of a sequence on all ranks.
        """
        after = after.float()
        norm = after.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        change = (after - before.float()).norm(dim=-1, keepdim=True) / norm
        tokens = torch.full_like(norm, 1.0)
        rows = torch.stack([tokens.sum(), norm.sum(), change.sum(), weight.float().sum()])
        directions = sum_over_sequence((after / norm).sum(1), self.mesh)  # (B, D)
        correlation = directions.square().sum() / seq_len
        tokens, norms, changes, weights = sum_over_sequence(rows, self.mesh)
        row = torch.stack([tokens, norms, changes, correlation, weights])
        self.rows[t] = self.rows[t] + row if t in self.rows else row

    def estimate_gain(self, update: Callable[[Tensor], Tensor], h: Tensor, positions: Tensor) -> None:
        """Estimate the spectral radius of `update`'s Jacobian at h (B, S', D), by power iteration with finite
        differences. Collective: every rank that runs these loops calls it.

        positions: (B, S') int64, of h's tokens in their sequences.
        """
        size = (1e-3 if h.dtype == torch.float32 else 3e-2) * self._norm(h.float())  # above rounding errors
        v = _noise(positions, h.shape[2])
        here, stretched = update(h).float(), size
        for _ in range(POWER_ITERATIONS):
            v = v * (size / self._norm(v))
            v = update((h.float() + v).to(h.dtype)).float() - here
            stretched = self._norm(v)
        self.gains.append(stretched / size)

    def _norm(self, x: Tensor) -> Tensor:
        return sum_over_sequence(x.square().sum(), self.mesh).sqrt()


def _noise(positions: Tensor, dim: int) -> Tensor:
    """Values in [-0.5, 0.5) that depend on row, position and channel only, so that ranks that share sequences have the
    values of one process: positions (B, S') int64 -> (B, S', dim) fp32. Mixed as by SplitMix64 (Steele et al. 2014)."""
    rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
    x = (positions + (rows << 32)).unsqueeze(-1) * dim + torch.arange(dim, device=positions.device)
    x = x * -7046029254386353131  # wraps around
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return ((x >> 40) & 0xFFFFFF).float() / (1 << 24) - 0.5
