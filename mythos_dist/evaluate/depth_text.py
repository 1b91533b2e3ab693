"""How many loops each token of a text needs: what every loop would predict, and when a criterion would stop.

One pass reads out every loop as if it were the last (`Loops.readouts`). The criteria:

latent: ||h_t - h_(t-1)|| / ||h_t|| is below the threshold, from the second loop on.
kl: KL(p_t || p_(t-1)) of the predictions, in nats, is below it, from the second loop on (Huginn, Geiping et al. 2025).
halting: the cumulative weight of the loops reaches it, from the first loop on; for the `act.mode`s that have weights.
"""

# T loops, S tokens, V vocabulary, K predictions shown.

from typing import NamedTuple

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.exits import kl_divergence, latent_change
from mythos_dist.generate.sampling import EXIT_THRESHOLDS
from mythos_dist.model.activations import Activations
from mythos_dist.model.halting import NoHalting
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.mesh import SINGLE

TOP = 3  # K


class TextDepths(NamedTuple):
    """The loops of each token of a text, on the CPU."""

    pieces: list[str]  # the text of each token
    measures: dict[str, Tensor]  # by criterion (T, S): what is compared with the threshold after each loop
    top_tokens: Tensor  # (T, S, K) int64: the most likely next tokens
    top_probabilities: Tensor  # (T, S, K)
    thresholds: dict[str, float]  # defaults by criterion
    tokens_left_out: int  # at the end, beyond the context

    @property
    def agreement(self) -> list[float]:
        """By loop: the share of tokens with the deepest loop's most likely next token."""
        first = self.top_tokens[..., 0]
        return (first == first[-1]).double().mean(1).tolist()

    def exits(self, criterion: str, threshold: float) -> list[int]:
        """The loop, from 1, after which each token would stop; the last one if the criterion is never met."""
        measure = self.measures[criterion]
        stops = measure >= threshold if criterion == "halting" else measure < threshold
        stops[-1] = True
        return (stops.int().argmax(0) + 1).tolist()


class _TokenRecorder(LoopRecorder):
    """Records the relative change of each token's hidden state and its halting weight, in a pass of one sequence."""

    def __init__(self):
        super().__init__(SINGLE)
        self.changes: list[Tensor] = []  # (S,) by loop
        self.weights: list[Tensor] = []  # (S,) by loop

    def record(self, t: int, before: Tensor, after: Tensor, weight: Tensor, seq_len: int) -> None:
        """Record loop t: the states before and after it (1, S, D), and the halting weight of `after` (1, S)."""
        self.changes.append(latent_change(after[0], before[0]).cpu())
        self.weights.append(weight[0].float().cpu())

    def estimate_gain(self, update, h: Tensor, positions: Tensor) -> None:
        """Not needed here."""


@torch.no_grad()
def measure_text(model: Mythos, tokenizer: Tokenizer, text: str, n_loops: int) -> TextDepths:
    """Run `n_loops` loops over a text, or over as much of it as fits in the context.

    model: unsharded, in eval mode. Raises UserError for a text without tokens.
    """
    assert 1 <= n_loops <= MAX_LOOPS
    tokens = tokenizer.encode(text).tolist()
    if not tokens:
        raise UserError("the text is empty; give a file with text to --text")
    longest = model.config.max_seq_len
    ids = torch.tensor([tokens[:longest]], device=next(model.parameters()).device)
    recorder = _TokenRecorder()
    model.recurrent.recorder = recorder
    try:
        loops = Loops(n_loops, readouts=True)
        activations, _ = model.run(Activations(ids), range(n_loops), loops, model.context(ids))
    finally:
        model.recurrent.recorder = None
    top_tokens, top_probabilities, divergences = [], [], []
    before: Tensor | None = None
    for h in activations.h.chunk(n_loops):  # (T * 1, S, D): the logits of all loops at once may not fit in memory
        now = model.head.gather_logits(model.head.logits(h))[0].float().log_softmax(-1)  # (S, V)
        best = now.exp().topk(min(TOP, now.shape[-1]))
        top_tokens.append(best.indices.cpu())
        top_probabilities.append(best.values.cpu())
        unknown = torch.full((now.shape[0],), float("inf"))
        divergences.append(unknown if before is None else kl_divergence(now, before).cpu())
        before = now
    recorder.changes[0] = torch.full_like(recorder.changes[0], float("inf"))  # a change needs two loops
    measures = {"latent": torch.stack(recorder.changes), "kl": torch.stack(divergences)}
    if not isinstance(model.recurrent.act, NoHalting):
        measures["halting"] = torch.stack(recorder.weights).cumsum(0)
    return TextDepths(
        token_texts(tokenizer, tokens[:longest]),
        measures,
        torch.stack(top_tokens),
        torch.stack(top_probabilities),
        {**EXIT_THRESHOLDS, "halting": model.config.act_threshold},
        max(0, len(tokens) - longest),
    )


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The text that each token adds; of a character of several tokens, the last one has it."""
    pieces, text = [], ""
    for i in range(len(tokens)):
        longer = tokenizer.decode(tokens[: i + 1])
        if longer.endswith("\ufffd") and i + 1 < len(tokens):  # the character may not be complete
            pieces.append("")
            continue
        pieces.append(longer[len(text) :])
        text = longer
    return pieces
