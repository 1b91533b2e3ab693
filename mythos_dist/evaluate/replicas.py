"""A model in full on every rank; the ranks share the batches of a round."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.evaluate.requests import (
    Prompt,
    ScoreRequest,
    TokenScores,
    num_scored,
    padded_batch,
    plan_batches,
    split_scores,
)
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.generate.text import TextStream
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import device

R = TypeVar("R")
T = TypeVar("T")


class Replicas:
    """The backend of `mythos evaluate`. Results do not depend on the number of ranks: it decides only which rank
    computes a batch."""

    def __init__(self, model: Mythos, tokenizer: Tokenizer, batch_tokens: int = 8192):
        """model: in eval mode, on this rank's device. tokenizer: its EOS ends generated text. batch_tokens: the most
        tokens of a batch, with padding."""
        self.max_length = model.config.max_seq_len
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens

    def plan(self, requests: Sequence[ScoreRequest]) -> Iterator[list[list[int]]]:
        """As `Backend.plan`: a batch for each rank."""
        yield from _rounds(plan_batches([len(request.inputs) for request in requests], self._batch_tokens))

    def plan_prompts(self, prompts: Sequence[Prompt]) -> Iterator[list[list[int]]]:
        """As `plan`; the prompts of a batch have one length, and the same limit of new tokens."""
        groups = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[len(prompt.tokens), prompt.max_new_tokens].append(i)
        batches = []
        for (length, new), indices in sorted(groups.items(), reverse=True):
            size = max(1, self._batch_tokens // (length + new))
            batches += [indices[first : first + size] for first in range(0, len(indices), size)]
        yield from _rounds(batches)

    def score(self, batches: Sequence[Sequence[ScoreRequest]], n_loops: int) -> list[list[TokenScores]]:
        """As `Backend.score`."""
        return _share(batches, lambda batch: self._score(batch, n_loops))

    def generate(self, batches: Sequence[Sequence[Prompt]], n_loops: int) -> list[list[list[int]]]:
        """As `Backend.generate`."""
        return _share(batches, lambda batch: self._generate(batch, n_loops))

    @torch.no_grad()
    def _score(self, requests: Sequence[ScoreRequest], n_loops: int) -> list[TokenScores]:
        batch, to = padded_batch(requests), device()
        # Without seeds, a random initial state would depend on the row.
        loops = Loops(n_loops, seeds=torch.zeros(len(requests), dtype=torch.int64))
        documents = batch.document_ids.to(to) if any(request.documents is not None for request in requests) else None
        losses = self._model(batch.input_ids.to(to), labels=batch.labels.to(to), document_ids=documents, loops=loops)
        scored = batch.columns >= 0
        scores = torch.zeros(2, num_scored(requests), dtype=torch.float64)
        scores[0, batch.columns[scored]] = -losses["token_losses"].cpu()[scored].double()
        scores[1, batch.columns[scored]] = losses["correct"].cpu()[scored].double()
        return split_scores(scores, requests)

    def _generate(self, prompts: Sequence[Prompt], n_loops: int) -> list[list[int]]:
        engine = DecodingEngine(self._model, None, n_loops=n_loops, max_batch=len(prompts), copy_weights=False)
        answers = {}
        for prompt in prompts:
            stops = (self._tokenizer.eos_id,)
            sampling = Sampling(max_new_tokens=prompt.max_new_tokens, temperature=0, stop_tokens=stops)
            request = engine.submit(prompt.tokens, sampling)
            # Not the engine's own stop strings: lm_eval cuts the text of these tokens alone, without the prompt's.
            answers[id(request)] = _Answer(TextStream(self._tokenizer.decode, stop=prompt.stop))
        while updated := engine.step():
            for request in updated:
                if answers[id(request)].add(request.tokens, self._tokenizer.eos_id):
                    engine.cancel(request)
        return [answer.tokens for answer in answers.values()]


@dataclass
class _Answer:
    """What a prompt has got so far."""

    stream: TextStream
    tokens: list[int] = field(default_factory=list)  # up to the one that completes a stop text, without EOS

    def add(self, tokens: Sequence[int], eos: int) -> bool:
        """Append those of `tokens` that are new. Returns whether a stop text is complete."""
        for token in tokens[len(self.tokens) :]:
            if token != eos and not self.stream.stopped:
                self.tokens.append(token)
                self.stream.add(token)
        return self.stream.stopped


def _rounds(batches: list[list[int]]) -> Iterator[list[list[int]]]:
    """A batch for each rank."""
    for first in range(0, len(batches), dist.get_world_size()):
        yield batches[first : first + dist.get_world_size()]


def _share(batches: Sequence[Sequence[R]], compute: Callable[[Sequence[R]], list[T]]) -> list[list[T]]:
    """Each batch computed by one rank; the results of all, on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    of_ranks: list[list[list[T]]] = [[]] * world_size
    dist.all_gather_object(of_ranks, [compute(batch) for batch in batches[rank::world_size]])
    return [of_ranks[i % world_size][i // world_size] for i in range(len(batches))]
