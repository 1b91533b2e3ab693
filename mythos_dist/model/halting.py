"""Halting: the weight that each loop's hidden state h has in the output of the loops, by `act.mode`.

off: the last loop's h is the output. reference and safe: the sum of all h, weighted by halting probabilities (ACT,
Graves 2016). ponder: a distribution over loops (PonderNet, Banino et al. 2021; Ouro, Zhu et al. 2025).

Decisions: MODEL-2, MODEL-15, LOOPS-3.
"""

# B batch, S' tokens of each sequence on this rank, D model.

import math

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, MythosConfig
from mythos_dist.model.activations import Activations, Readout
from mythos_dist.model.loops import Loops, where_active
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import replicated


class Halting(nn.Module):
    """The halting layer and what the modes have in common. Every mode has the layer, so that checkpoints do not depend
    on the mode."""

    def __init__(self, config: MythosConfig, act: ActConfig, mesh: Mesh):
        super().__init__()
        self.mode = act.mode_of(config)
        self.cost, self.kl, self.prior = act.ponder_cost, act.kl, act.prior
        self.halt = replicated(nn.Linear(config.dim, 1), mesh)
        self.threshold = config.act_threshold

    def forward(self, h: Tensor, cum_halting: Tensor, t: int, loops: Loops) -> tuple[Tensor, Tensor]:
        """h (B, S', D) after loop t, cum_halting (B, S') fp32 before it -> weight of h (B, S') fp32, cum_halting after.

        Sequences that have not started have weight 0.
        """
        weight, new_cum_halting = self.weigh(h, cum_halting, loops.is_last(t))
        active = loops.active(t)
        return where_active(active, weight, 0.0), where_active(active, new_cum_halting, cum_halting)

    def weigh(self, h: Tensor, cum_halting: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """`forward` of sequences that have started."""
        raise NotImplementedError

    def accumulate(self, output: Tensor, h: Tensor, weight: Tensor, t: int, loops: Loops) -> Tensor:
        """The output (B, S', D) fp32 before loop t -> after it, with its h and the weight of h."""
        return torch.addcmul(output, weight.unsqueeze(-1), h.float())

    def sums_states(self, loops: Loops) -> bool:
        """Whether `accumulate` returns another output after each loop."""
        return True

    def readout(self, before: Activations, h: Tensor, weight: Tensor, t: int, loops: Loops) -> Readout | None:
        """What is read out after loop t, with its h and the weight of h; None: nothing."""
        if not loops.reads_out(t):
            return None
        output = self.output_at(before.output, h, before.cum_halting, weight)
        return output, self.readout_weight(weight, loops.active(t), loops)

    def output_at(self, output: Tensor, h: Tensor, cum_halting: Tensor, weight: Tensor) -> Tensor:
        """The output (B, S', D) if the loop with this h were the last. output, cum_halting: before that loop."""
        return h

    def final(self, before: Activations, after: Activations) -> Tensor:
        """The loops' output (B, S', D) if the loop between `before` and `after` is the last, in decoding."""
        return after.h

    def readout_weight(self, weight: Tensor, active: Tensor | None, loops: Loops) -> Tensor:
        """The weight (B, S') fp32 of the loss of a loop's readout: 1 / (loops with gradient) for `active` sequences."""
        return loops.even_weight(active, like=weight)

    def all_halted(self, cum_halting: Tensor) -> bool:
        """Whether all further loops have weight zero. Waits for the GPU."""
        return bool((cum_halting >= self.threshold).all())

    def use_all_parameters(self, aux_loss: Tensor, h: Tensor) -> Tensor:
        """`aux_loss`, made to depend on the halting layer where the loops have not applied it: ZeRO needs a gradient of
        every parameter. h (B, S', D)."""
        return aux_loss

    def probability(self, h: Tensor, cum_halting: Tensor) -> Tensor:
        """The halting layer's output for h (B, S', D), a probability (B, S') in fp32."""
        return torch.sigmoid(self.halt(h.flatten(0, 1)).float()).view_as(cum_halting)

    def add_loss(self, aux_loss: Tensor, weight: Tensor, t: int, loops: Loops, token_share: float) -> Tensor:
        """Add loop t's part of ponder_cost * E[loops] + kl * KL(weights, prior), mean over tokens.

        weight (B, S'), which are `token_share` of the sequences' tokens: this rank's term of the sum over ranks.
        """
        if self.cost == 0 and self.kl == 0:
            return aux_loss
        if loops.depths is None:
            index, depths = weight.new_full((1, 1), t), weight.new_full((1, 1), loops.n_loops)
        else:  # (B, 1)
            zeros = weight.new_zeros(weight.shape[0], 1)
            index = zeros + torch.as_tensor(loops.own_index(t)).unsqueeze(1)
            depths = zeros + loops.depths.unsqueeze(1)
        if self.prior is None:
            log_prior = -depths.log()  # uniform: Ouro's entropy up to a constant
        else:  # PonderNet's geometric prior, truncated
            log_prior = index * math.log1p(-self.prior) + (0.0 if loops.is_last(t) else math.log(self.prior))
        divergence = weight * (weight.clamp(min=1e-9).log() - log_prior)
        return aux_loss + (self.cost * weight * (index + 1) + self.kl * divergence).mean() * token_share


class NoHalting(Halting):
    """The output is the last loop's h."""

    def weigh(self, h: Tensor, cum_halting: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """Weight 1 for the last loop, 0 for the others."""
        return torch.full_like(cum_halting, float(is_last)), cum_halting

    def accumulate(self, output: Tensor, h: Tensor, weight: Tensor, t: int, loops: Loops) -> Tensor:
        """The last h."""
        return h.float() if loops.is_last(t) else output

    def sums_states(self, loops: Loops) -> bool:
        """False: readouts are not weighted sums of states."""
        return False

    def add_loss(self, aux_loss: Tensor, weight: Tensor, t: int, loops: Loops, token_share: float) -> Tensor:
        """`aux_loss` unchanged."""
        return aux_loss

    def all_halted(self, cum_halting: Tensor) -> bool:
        """False: no token halts before the last loop."""
        return False

    def use_all_parameters(self, aux_loss: Tensor, h: Tensor) -> Tensor:
        """Adds a zero: the layer applied to no token. It gets gradients of zeros, and ZeRO-3 gathers its weights in the
        module's forward."""
        return aux_loss + self.halt(h.new_zeros(0, h.shape[-1])).float().sum()


class WeightedHalting(Halting):
    """The output is the sum of all h, weighted by halting probabilities.

    A token halts where its cumulative probability reaches the threshold, and that loop gets the remainder of 1. In the
    last loop `safe` also gives the remainder to tokens that have not halted, so weights sum to 1 at any number of
    loops; `reference` loses that mass (0.45 of it at one loop).
    """

    def __init__(self, config: MythosConfig, act: ActConfig, mesh: Mesh, safe: bool):
        super().__init__(config, act, mesh)
        self.safe = safe

    def weigh(self, h: Tensor, cum_halting: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """The halting probability of tokens that still run; of those that halt now, the remainder of 1."""
        running = cum_halting < self.threshold
        p = self.probability(h, cum_halting) * running
        remainder = (1.0 - cum_halting) * running  # positive for running tokens: they are below the threshold
        new_cum_halting = cum_halting + p
        # The halting layer is applied in the last loop too: a pipeline stage that runs no other needs its gradient.
        halts = torch.ones_like(running) if is_last and self.safe else new_cum_halting >= self.threshold
        return torch.where(halts, remainder, p), new_cum_halting

    def output_at(self, output: Tensor, h: Tensor, cum_halting: Tensor, weight: Tensor) -> Tensor:
        """The sum so far plus h with the weight that the last loop would give it."""
        if self.safe:
            weight = (1.0 - cum_halting) * (cum_halting < self.threshold)
        return torch.addcmul(output, weight.unsqueeze(-1), h.float()).to(h.dtype)

    def final(self, before: Activations, after: Activations) -> Tensor:
        """The sum of all h; `safe` gives the last one the remainder of 1."""
        if not self.safe:
            return after.output.to(after.h.dtype)
        return self.output_at(before.output, after.h, before.cum_halting, before.cum_halting)


class PonderHalting(Halting):
    """Weights are a distribution over loops: a token halts after a loop with the layer's probability, if not before.

    In training every loop's readout has its probability as weight. Otherwise the output is the h of the first loop at
    which the cumulative probability reaches the threshold.
    """

    def weigh(self, h: Tensor, cum_halting: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """The probability of halting after this loop; without gradient 1 or 0."""
        p = self.probability(h, cum_halting)
        # The last loop gets the remainder whatever p is; 0 * p is for a pipeline stage that runs no other loop.
        weight = (1.0 - cum_halting) * (1.0 + 0.0 * p if is_last else p)
        new_cum_halting = cum_halting + weight
        if torch.is_grad_enabled() and self.training:
            return weight, new_cum_halting
        exits = (cum_halting < self.threshold) & ((new_cum_halting >= self.threshold) | is_last)
        return exits.float(), new_cum_halting

    def final(self, before: Activations, after: Activations) -> Tensor:
        """The h at which the token halted, or the last."""
        halted = (before.cum_halting >= self.threshold).unsqueeze(-1)
        return torch.where(halted, before.output.to(after.h.dtype), after.h)

    def accumulate(self, output: Tensor, h: Tensor, weight: Tensor, t: int, loops: Loops) -> Tensor:
        """As the base's; unchanged if loops are read out, which then replace the output."""
        return output if loops.readouts else super().accumulate(output, h, weight, t, loops)

    def sums_states(self, loops: Loops) -> bool:
        """Unless loops are read out."""
        return not loops.readouts

    def readout_weight(self, weight: Tensor, active: Tensor | None, loops: Loops) -> Tensor:
        """The probability of halting after the loop."""
        return weight


def build_halting(config: MythosConfig, act: ActConfig, mesh: Mesh) -> Halting:
    """The halting of `act.mode`."""
    mode = act.mode_of(config)
    if mode == "off":
        return NoHalting(config, act, mesh)
    if mode == "ponder":
        return PonderHalting(config, act, mesh)
    return WeightedHalting(config, act, mesh, safe=mode == "safe")
