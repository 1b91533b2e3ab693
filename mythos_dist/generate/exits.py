"""When a token's loops end: after `n_loops`, or earlier by a criterion that looks at the last loop.

latent: ||h[t] - h[t-1]|| / ||h[t]|| is below the threshold. Costs two norms.
kl: KL(p[t] || p[t-1]) of the distributions of the next token is below it. Costs coda and head after every loop.
halting: the cumulative halting probability has reached it (act.mode other than off). Costs nothing.

Decisions: DECODE-5.
"""

# D model, V vocabulary.

from torch import Tensor

from mythos_dist.config.schema import MythosConfig
from mythos_dist.generate.sampling import EXIT_THRESHOLDS, Sampling


def exit_threshold(sampling: Sampling, config: MythosConfig) -> float:
    """The threshold of a request with an exit criterion."""
    if sampling.exit_threshold is not None:
        return sampling.exit_threshold
    return config.act_threshold if sampling.exit == "halting" else EXIT_THRESHOLDS[sampling.exit or "latent"]


def latent_change(h: Tensor, earlier: Tensor) -> Tensor:
    """||h - earlier|| / ||h|| of hidden states (..., D): (...) fp32."""
    h = h.float()
    return (h - earlier.float()).norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-30)


def kl_divergence(logits: Tensor, earlier: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(earlier)) of rows (..., V): (...)."""
    log_p, log_q = logits.log_softmax(-1), earlier.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
