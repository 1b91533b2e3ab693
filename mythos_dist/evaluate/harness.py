"""Our models for lm-evaluation-harness: log-likelihoods of continuations and of texts, and greedy answers.

Texts begin after EOS, which separates documents in training; no BOS is added, since training has none. So
`hf` on the export gives the same scores with `prefix_token_id` set to the id of EOS.

The trap: lm_eval wants to divide the requests itself where `world_size` is above 1. Here it sees one process, rank 0,
and the requests are divided below it (scorer.py).
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.evaluate.requests import Prompt, continuation_request
from mythos_dist.evaluate.scorer import Scorer

MAX_NEW_TOKENS = 256  # where a task does not set max_gen_toks: lm_eval's own default
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """lm_eval's interface to a scorer, at one number of loops."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, n_loops: int):
        super().__init__()
        self._scorer, self._tokenizer, self._n_loops = scorer, tokenizer, n_loops
        self.max_length = scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """EOS, which also comes before a text without a context."""
        return self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm_eval's own caches."""
        return self._tokenizer.sha256[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, without special ones."""
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy continuation) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        wanted = [continuation_request(context, text, self.max_length) for _, context, text in requests]
        return [(one.total, all(one.correct)) for one in self._scorer.score(wanted, self._n_loops)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text. One that is longer than the context is scored in windows: every token once,
        those of the last window with as much context as there is."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for text in (str(request.args[0]) for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            disjoint = [make_disjoint_window(pair) for pair in pairs]
            windows += [(None, context, scored) for context, scored in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The greedy answer to each prompt, up to a stop text, which ends its generation. A prompt loses its beginning
        where the context has no room for it. Raises UserError for sampling."""
        prompts, stops = [], []
        for request in requests:
            arguments: tuple[Any, ...] = request.args
            text, settings = arguments
            new, until = _generation_settings(settings, request.task_name or "a task", self.max_length)
            tokens = self.tok_encode(text)[-(self.max_length - new) :] or [self.eot_token_id]
            prompts.append(Prompt(tokens, new, tuple(text for text in until if text)))
            stops.append(until)
        answers = self._scorer.generate(prompts, self._n_loops)
        texts = [self._tokenizer.decode(tokens) for tokens in answers]
        return [postprocess_generated_text(text, until, None) for text, until in zip(texts, stops, strict=True)]


def _generation_settings(settings: dict[str, Any], task: str, max_length: int) -> tuple[int, list[str]]:
    """(maximum of new tokens, stop texts) of a request. Raises UserError."""
    if settings.get("do_sample") or settings.get("temperature"):
        raise UserError(
            f"{task} samples (generation_kwargs: do_sample={settings.get('do_sample')}, "
            f"temperature={settings.get('temperature')}); only greedy generation is supported: set do_sample: false"
        )
    new = next((int(settings[key]) for key in _LENGTH_KEYS if settings.get(key)), MAX_NEW_TOKENS)
    if not 1 <= new < max_length:
        raise UserError(
            f"{task} generates up to {new} tokens, and the context has {max_length}; set generation_kwargs: "
            f"max_gen_toks to at most {max_length - 1}"
        )
    until = settings.get("until") or []
    return new, [until] if isinstance(until, str) else list(until)
