"""A low-rank correction of the recurrent block's output that depends on the loop (Bae et al. 2024).

Decisions: PARALLEL-5.
"""

# B batch, S' tokens of each sequence on this rank, D model, r rank of the LoRA.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.parallel.collectives import all_gather_many
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import shard_parameter


class DepthLoRA(nn.Module):
    """u + ((u @ down^T) * scale[t]) @ B. With `per_loop` each loop has its own down and B instead of a row of `scale`.

    The rank r is sharded over the tensor axis. Each rank gathers the 2 * D * r weights to use them: that sends r / N of
    the bytes that gathering the hidden states of N tokens and all-reducing the results would send.
    """

    def __init__(self, dim: int, rank: int, max_loops: int, per_loop: bool, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.max_loops = max_loops
        self.per_loop = per_loop
        if per_loop:
            self.down = shard_parameter((max_loops, rank, dim), {1: mesh.tensor})
            self.B = shard_parameter((max_loops, rank, dim), {1: mesh.tensor})
        else:
            self.down = shard_parameter((rank, dim), {0: mesh.tensor})
            self.scale = shard_parameter((max_loops, rank), {1: mesh.tensor})
            self.B = shard_parameter((rank, dim), {0: mesh.tensor})

    def forward(self, u: Tensor, t: int | Tensor) -> Tensor:
        """u (B, S', D) -> u plus its correction. t: the loop, or each sequence's own (B,); loops beyond the table use
        its last row."""
        rows = u.flatten(0, 1)
        # With sequence parallelism ranks see different tokens and gradients are partial; otherwise they are equal.
        axis, partial = self.mesh.tensor, self.mesh.sequence
        if self.per_loop:
            if not isinstance(t, int):  # decoding; config.rules refuses it in training
                t = t.clamp(max=self.max_loops - 1)
                down, B = all_gather_many([self.down[t], self.B[t]], axis, 1, partial=partial)  # (B, r, D)
                return torch.baddbmm(u, u @ down.transpose(1, 2), B)
            t = min(t, self.max_loops - 1)
            down, B = all_gather_many([self.down[t], self.B[t]], axis, 0, partial=partial)
            return torch.addmm(rows, F.linear(rows, down), B).view_as(u)
        if isinstance(t, int):
            scale = self.scale[min(t, self.max_loops - 1)]
            down, scale, B = all_gather_many([self.down, scale, self.B], axis, 0, partial=partial)
            return torch.addmm(rows, F.linear(rows, down) * scale, B).view_as(u)
        scale = self.scale[t.clamp(max=self.max_loops - 1)].t()  # (local r, B)
        down, scale, B = all_gather_many([self.down, scale, self.B], axis, 0, partial=partial)
        scaled = F.linear(u, down) * scale.t().unsqueeze(1)
        return torch.addmm(rows, scaled.flatten(0, 1), B).view_as(u)
