"""What each loop's state counts: the last one's alone, or by halting probabilities (ACT, Graves 2016; PonderNet, Banino
et al. 2021; Ouro, Zhu et al. 2025)."""

# B batch, S' tokens of each sequence on this rank, D model.

import math

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, MythosConfig
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import replicated


class Halting(nn.Module):
    """The probability that a token halts after this loop, and the weight its state gets; `act.mode` says how.

    off: the last loop's state gets weight 1, the others 0; the layer is there all the same, so that checkpoints do not
    depend on the mode. reference and safe: a token whose cumulative probability reaches the threshold gets what is left
    of 1 and halts. In the last loop safe gives tokens that are still running what is left as well, so weights sum to 1
    at any number of loops; the reference loses that mass (0.45 of it at one loop). ponder: the probability is that of
    halting now if not before; weights are the resulting distribution over loops in training, and otherwise 1 at the
    first loop where its sum reaches the threshold.
    """

    def __init__(self, config: MythosConfig, act: ActConfig, mesh: Mesh):
        super().__init__()
        self.mode = act.mode_of(config)
        self.cost, self.kl, self.prior = act.ponder_cost, act.kl, act.prior
        self.halt = replicated(nn.Linear(config.dim, 1), mesh)
        self.dim = config.dim
        self.threshold = config.act_threshold
        self.parts = mesh.tensor.size if mesh.sequence else 1  # ranks that a sequence's tokens are spread over

    @property
    def regularised(self) -> bool:
        """Whether `loss` is anything but 0."""
        return self.cost > 0 or self.kl > 0

    def idle(self, like: Tensor) -> Tensor:
        """A zero in fp32, made with the parameters of no token: through the layer, where ZeRO-3 gathers them.

        like: (…, D), for its kind of numbers and its device."""
        return self.halt(like.new_zeros(0, self.dim)).float().sum()

    def forward(self, h: Tensor, mass: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """h (B, S', D), mass (B, S') fp32, cumulative -> weight (B, S') fp32, the new mass."""
        p = torch.sigmoid(self.halt(h.flatten(0, 1)).float()).view_as(mass)
        if self.mode == "ponder":
            return self._ponder(p, mass, last)
        running = mass < self.threshold
        p = p * running
        rest = (1.0 - mass) * running  # of those that run it is positive: their mass is below the threshold
        new_mass = mass + p
        # In the last loop too the halting layer takes part: a stage that runs no other must have a gradient for it.
        halts = torch.ones_like(running) if last and self.mode == "safe" else new_mass >= self.threshold
        return torch.where(halts, rest, p), new_mass

    def _ponder(self, p: Tensor, mass: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        # The last loop takes the rest whatever p is; with a zero of p, for a stage that runs no other.
        weight = (1.0 - mass) * (1.0 + 0.0 * p if last else p)
        new_mass = mass + weight
        if torch.is_grad_enabled() and self.training:
            return weight, new_mass
        leaves = (mass < self.threshold) & ((new_mass >= self.threshold) | last)
        return leaves.float(), new_mass

    def loss(self, weight: Tensor, t: int | Tensor, n_loops: int | Tensor, last: bool) -> Tensor:
        """One loop's part of what halting costs, (): ponder_cost * expected loops + kl * KL(weights, prior), mean over
        tokens. weight (B, S'), loop t from 0 of n_loops, each for all or (B,).
        """
        like = weight.new_zeros(weight.shape[0], 1)
        t, n_loops = (like + (x.unsqueeze(1) if isinstance(x, Tensor) else x) for x in (t, n_loops))
        if self.prior is None:
            log_prior = -n_loops.log()  # uniform: Ouro's entropy, but for a constant
        else:
            log_prior = t * math.log1p(-self.prior) + (0.0 if last else math.log(self.prior))  # PonderNet's, cut off
        divergence = weight * (weight.clamp(min=1e-9).log() - log_prior)
        return (self.cost * weight * (t + 1) + self.kl * divergence).mean() / self.parts
