"""How the loops of a pass are doing: norms, changes, sameness of tokens, and what the update does to a disturbance.

What is looked for are the known ways in which looped models fail (Huginn, Geiping et al. 2025): the states of all
tokens become one, the state is ignored, the state grows. That A is below 1 says nothing about the block beside it, so
the gain is that of the whole update.
"""

# B batch, S' tokens of each sequence on this rank, D model.

from collections.abc import Callable

import torch
from torch import Tensor

from mythos_dist.parallel.collectives import all_reduce
from mythos_dist.parallel.mesh import Mesh

POWER_ITERATIONS = 3  # power iterations


class LoopRecorder:
    """Looks on while a rank runs the loops of passes without gradients.

    COLUMNS are sums over tokens: how many there are; norms of their states; the share of a state that the loop has
    changed; the mean cosine between a token's state and those of its sequence; the weight that halting gave.
    """

    COLUMNS = ("tokens", "state_norm", "residual_ratio", "token_correlation", "act_mass")

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.rows: dict[int, Tensor] = {}  # by loop: COLUMNS, fp32
        self.gains: list[Tensor] = []  # (), one per pass
        self.rho: Tensor | None = None  # (): the largest of A, which a state is multiplied by in each loop

    def record(self, t: int, before: Tensor, after: Tensor, weight: Tensor) -> None:
        """Loop t made `after` (B, S', D) of `before`; `weight` (B, S') is what halting gave it."""
        after = after.float()
        norm = after.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        change = (after - before.float()).norm(dim=-1, keepdim=True) / norm
        tokens = torch.full_like(norm, 1.0)
        rows = torch.stack([tokens.sum(), norm.sum(), change.sum(), weight.float().sum()])
        directions = self._over_sequence((after / norm).sum(1))  # (B, D)
        S = after.shape[1] * (self.mesh.tensor.size if self.mesh.sequence else 1)
        correlation = directions.square().sum() / S
        tokens, norms, changes, weights = self._over_sequence(rows)
        row = torch.stack([tokens, norms, changes, correlation, weights])
        self.rows[t] = self.rows[t] + row if t in self.rows else row

    def estimate_gain(self, update: Callable[[Tensor], Tensor], h: Tensor) -> None:
        """Estimate how much `update` stretches the disturbance of the state h (B, S', D) that it stretches most in the
        long run: power iteration with differences. Every rank that runs the loops with this one calls it."""
        size = (1e-3 if h.dtype == torch.float32 else 3e-2) * self._norm(h.float())  # so that rounding does not show
        generator = torch.Generator(h.device).manual_seed(self.mesh.tensor.rank if self.mesh.sequence else 0)
        v = torch.empty(h.shape, device=h.device).normal_(generator=generator)
        here, stretched = update(h).float(), size
        for _ in range(POWER_ITERATIONS):
            v = v * (size / self._norm(v))
            v = update((h.float() + v).to(h.dtype)).float() - here
            stretched = self._norm(v)
        self.gains.append(stretched / size)

    def _norm(self, x: Tensor) -> Tensor:
        return self._over_sequence(x.square().sum()).sqrt()

    def _over_sequence(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.mesh.tensor) if self.mesh.sequence else x
