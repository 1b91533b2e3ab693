"""How the prelude's output e enters every loop: h = decay * h + scale * injected(e) + u, with decay in (0, 1).

Two forms: OpenMythos' (`reference`) and Parcae's (Prairie et al. 2026). The parameters have the names of their papers,
in which decay is A and scale is B; here B is always this parameter, and e is (..., D). Or h = u: with `none` nothing is
injected, with `difference` the block's input is h + B * (e - h).

Decisions: LOOPS-12, LOOPS-16.
"""

# D model.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import ParallelLinear, replicated


class Injection(nn.Module):
    """OpenMythos': decay = exp(-exp(log_dt + log_A)) and scale = B, per channel; e is injected unchanged."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.log_A = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.B = nn.Parameter(torch.empty(dim))
        replicated(self, mesh)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """decay and scale (D,), and e (..., D): the same in every loop."""
        # The clamp keeps the exponential finite for any parameter value.
        decay = torch.exp(-torch.exp((self.log_dt.float() + self.log_A.float()).clamp(-20, 20)))
        return decay.to(self.B.dtype), self.B.clone(), e  # ZeRO-3 frees a parameter after its module's forward


class NoInjection(nn.Module):
    """h = u = block(h): its residual connection keeps h, so decay is 1 and scale 0."""

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """decay and scale (D,), and e (..., D)."""
        return e.new_ones(e.shape[-1]), e.new_zeros(e.shape[-1]), e


class DifferenceInjection(nn.Module):
    """h = u = block(h + B * (e - h)): a part B of the block's input, per channel, is the prelude's output."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.B = nn.Parameter(torch.empty(dim))
        replicated(self, mesh)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """decay, which is not used, and B (D,), and e (..., D)."""
        return self.B.new_zeros(e.shape[-1]), self.B.clone(), e  # a copy as in `Injection`


class ParcaeInjection(nn.Module):
    """Parcae's: decay = exp(-dt * exp(log_A)) and scale = dt, with a step dt = softplus(delta) per channel; B @ e is
    injected, with a matrix B (D, D)."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.log_A = nn.Parameter(torch.empty(dim))
        self.delta = nn.Parameter(torch.empty(dim))
        self.B = ParallelLinear(dim, dim, "inputs", mesh)
        replicated(self, mesh)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """decay and scale (D,), and B @ e (..., D): one product, for all loops."""
        dt = F.softplus(self.delta.float())
        decay = torch.exp(-dt * torch.exp(self.log_A.float().clamp(-20, 20)))
        full, width = enter_tensor_parallel(e, self.mesh), self.B.weight.shape[1]
        first = self.mesh.tensor.rank * width
        own = full[..., first : first + width].contiguous()  # autograd would keep all of `full` for a view
        if own.shape[-1] < width:
            own = F.pad(own, (0, width - own.shape[-1]))
        return decay.to(e.dtype), dt.to(e.dtype), leave_tensor_parallel(self.B(own), self.mesh)


def build_injection(config: MythosConfig, mesh: Mesh) -> nn.Module:
    """The module for `model.injection`."""
    if config.injection == "none":
        return NoInjection()
    kinds = {"reference": Injection, "parcae": ParcaeInjection, "difference": DifferenceInjection}
    return kinds[config.injection](config.dim, mesh)
