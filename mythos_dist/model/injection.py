"""How the prelude's output e enters every loop: h = A * h + B * injected(e) + u, with A in (0, 1) by construction.

Two forms: OpenMythos' (`reference`) and Parcae's (Prairie et al. 2026).
"""

# B batch, S' tokens of each sequence on this rank, D model.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import ParallelLinear, replicated


class Injection(nn.Module):
    """OpenMythos': B * e, and A = exp(-exp(log_dt + log_A)), per channel."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.log_A = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.B = nn.Parameter(torch.empty(dim))
        replicated(self, mesh)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A and B (D,), and e unchanged: the same in every loop."""
        # The clamp keeps the exponential finite for any parameter value.
        A = torch.exp(-torch.exp((self.log_dt.float() + self.log_A.float()).clamp(-20, 20)))
        return A.to(self.B.dtype), self.B.clone(), e  # ZeRO-3 frees a parameter after its module's forward


class ParcaeInjection(nn.Module):
    """Parcae's: A = exp(-dt * exp(log_A)) with a step dt = softplus(delta) per channel, and dt * (B @ e), B (D, D)."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.log_A = nn.Parameter(torch.empty(dim))
        self.delta = nn.Parameter(torch.empty(dim))
        self.B = ParallelLinear(dim, dim, "inputs", mesh)
        replicated(self, mesh)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A and dt (D,), B @ e (B, S', D): one product, for all loops."""
        dt = F.softplus(self.delta.float())
        A = torch.exp(-dt * torch.exp(self.log_A.float().clamp(-20, 20)))
        full, width = enter_tensor_parallel(e, self.mesh), self.B.weight.shape[1]
        first = self.mesh.tensor.rank * width
        own = full[..., first : first + width].contiguous()  # autograd would keep all of `full` for a view
        if own.shape[-1] < width:
            own = F.pad(own, (0, width - own.shape[-1]))
        return A.to(e.dtype), dt.to(e.dtype), leave_tensor_parallel(self.B(own), self.mesh)
