"""Threads that download shards before they are needed, on one rank of each node.

Training does not depend on them: a rank whose shard is missing downloads it itself, or waits for the download that is
in progress. So a prefetch that fails is only logged; the rank that needs the shard tries again, and raises.

Decisions: DATA-29.
"""

import logging
import threading
import time

from mythos_dist.data.lookahead import Lookahead, Need
from mythos_dist.data.shard_cache import NoRoom, ShardCache
from mythos_dist.errors import UserError, first_line

log = logging.getLogger(__name__)

THREADS = 8  # downloads at once: a connection to a store often has 20 to 80 MB/s
RETRY_SECONDS = 30.0  # after a failed prefetch


class _Stopped(Exception):
    """The prefetcher is closed."""


class Prefetcher:
    """Downloads what `lookahead` says is needed next."""

    def __init__(self, cache: ShardCache, lookahead: Lookahead, ahead: int):
        """`ahead`: shards after those of the step in progress."""
        self._cache, self._lookahead, self._ahead = cache, lookahead, ahead
        self._changed = threading.Condition()
        self._in_progress: set[str] = set()
        self._not_before: dict[str, float] = {}  # by key; of failed ones, and of those without room
        self._closed = False
        for i in range(THREADS if ahead else 0):
            threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True).start()

    def advance(self, step: int) -> None:
        """All steps before `step` are over on every rank."""
        self._lookahead.advance(step)
        with self._changed:
            self._not_before = {key: when for key, when in self._not_before.items() if when < float("inf")}
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; a download in progress ends with its process, or when it is complete."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while need := self._next():
                self._download(need)
        except _Stopped:
            pass
        except Exception as error:  # a rank that needs a shard downloads it itself
            log.exception("prefetching of shards ended: %s", first_line(error))

    def _next(self) -> Need | None:
        """The next shard to download, as soon as there is one; None: closed."""
        while True:
            needs = self._lookahead.upcoming(self._ahead)
            with self._changed:
                if self._closed:
                    return None
                now = time.monotonic()
                missing = next((need for need in needs if self._is_missing(need, now)), None)
                if missing is None:
                    self._changed.wait(RETRY_SECONDS)
                elif self._lookahead.next_use(missing.key) == missing.time:
                    self._in_progress.add(missing.key)
                    return missing
                # else its step is over since `upcoming` was called, and it may have been removed already

    def _is_missing(self, need: Need, now: float) -> bool:
        """Whether a shard is neither here, nor being downloaded, nor to be tried again later."""
        waits = self._not_before.get(need.key, 0.0) > now or need.key in self._in_progress
        return not waits and not self._cache.has(need.shard)

    def _download(self, need: Need) -> None:
        not_before = 0.0
        try:
            self._cache.download(need.shard, needed=need.time, wait=self._wait)
        except NoRoom:
            not_before = float("inf")  # until the next step
        except UserError as error:
            log.warning("%s could not be downloaded in advance: %s", need.shard.name, first_line(error))
            not_before = time.monotonic() + RETRY_SECONDS
        finally:
            with self._changed:
                self._in_progress.discard(need.key)
                if not_before:
                    self._not_before[need.key] = not_before
                else:
                    self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        """Sleep between attempts, but not after `close`."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._closed and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                raise _Stopped
