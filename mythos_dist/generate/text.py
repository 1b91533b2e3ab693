"""Text from tokens that arrive one by one: whole characters, up to a stop string."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes of a character that is not complete decode to
_CONTEXT = 5  # tokens of the prompt that are decoded with the first new one


class TextStream:
    """The text of tokens so far. A token may hold a part of a character, or of a stop string: what may still become
    something else is not part of `text` yet.

    Only the last tokens are decoded again for each new one: those since the last whole character, after some earlier
    ones that a decoder may need (SentencePiece drops the first token's space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """decode: token ids -> text. prompt: tokens before the stream. stop: texts that end it."""
        self._decode, self._stop = decode, stop
        self._tokens = list(prompt[-_CONTEXT:])
        self._window, self._decoded = 0, len(self._tokens)  # decoding starts at one and has reached the other
        self._all = ""  # with what may become a stop string
        self.stopped = False

    def add(self, token: int) -> None:
        """Append a token. After a stop string, nothing may follow."""
        assert not self.stopped
        self._tokens.append(token)
        before = self._decode(self._tokens[self._window : self._decoded])
        after = self._decode(self._tokens[self._window :])
        if after.endswith(INCOMPLETE):
            return
        self._append(after[len(before) :])
        self._window, self._decoded = self._decoded, len(self._tokens)

    def _append(self, text: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self._all) - longest)
        self._all += text
        ends = [i for stop in self._stop if (i := self._all.find(stop, start)) >= 0]
        if ends:
            self._all, self.stopped = self._all[: min(ends)], True

    @property
    def text(self) -> str:
        """The text so far, without an end that a stop string begins with."""
        return self._all if self.stopped else self._all[: len(self._all) - self._open_end()]

    @property
    def full_text(self) -> str:
        """The text if no token follows."""
        return self._all

    def _open_end(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        lengths = range(min(len(self._all), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._all[-n:]) for stop in self._stop)), 0)
