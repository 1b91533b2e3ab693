"""Messages between the watchdog of each rank and the watchdog server of rank 0: one JSON object per line.

`authentication.Channel` signs the lines. Fields that equal their default are not sent.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=20_000)]


@dataclass(frozen=True)
class WatchdogLimits:
    """In seconds."""

    hang_after: float  # in one phase of training, such as a step
    lost_after: float  # without a message from the other end


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CollectiveState(_Strict):
    """The collectives that a rank has called, from its `CollectiveRecorder`."""

    calls: dict[str, int]  # number of calls by group
    last: Text  # description of the last call
    group: Text  # of the last call
    members: list[int]  # ranks of that group
    at: Text  # where the main thread is: file, line, function

    def check(self, world_size: int) -> None:
        """Raises ValueError if `find_blocking_ranks` could not use it."""
        if not all(0 <= rank < world_size for rank in self.members):
            raise ValueError(f"members {self.members[:8]} with world size {world_size}")
        if self.members and self.group not in self.calls:
            raise ValueError(f"no call is counted for the last group, {self.group[:80]!r}")


class RankMessage(_Strict):
    """From a rank to rank 0."""

    phase: Text | None = None
    age: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # seconds since the phase began
    bye: bool = False  # the rank is done; its connection may close
    failed: Text | None = None  # the error that ends the rank
    cause: bool = False  # of `failed`: not a consequence of another rank's exit
    report: CollectiveState | None = None


class ServerMessage(_Strict):
    """From rank 0 to a rank."""

    ok: int = 0  # reply to `phase`
    send_state: Text = ""  # reason why the rank must send its CollectiveState
    end: Text = ""  # reason why the rank must exit
