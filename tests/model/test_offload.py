"""Hidden states that recomputed loops save in host memory: the same bits, back one loop ahead, freed on the device."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_dist.config.schema import ActConfig
from mythos_dist.model import Mythos, MythosConfig, recompute
from mythos_dist.model.recompute import Recompute


def train(config: MythosConfig, act: ActConfig, recompute: Recompute, backprop: int | None = None) -> dict[str, Tensor]:
    """The objective and all gradients of one pass."""
    model = Mythos(config, act=act, recompute=recompute)
    ids = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = model(ids, labels=ids, backprop=backprop)
    losses["objective"].backward()
    return {"objective": losses["objective"], **{name: p.grad for name, p in model.named_parameters()}}


class RecordedCopies:
    """Replaces `HostCopy` and records what is copied out and back, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[tuple[str, int]] = []
        self.states: list[weakref.ref] = []  # storages of the tensors on the device
        record = self

        class Recorded(recompute.HostCopy):
            def __init__(self, x: Tensor):
                super().__init__(x)
                self.index = len(record.states)
                record.events.append(("out", self.index))
                record.states.append(weakref.ref(x.untyped_storage()))

            def begin(self) -> tuple[Tensor, Any]:
                record.events.append(("back", self.index))
                return super().begin()

        monkeypatch.setattr(recompute, "HostCopy", Recorded)

    @property
    def on_device(self) -> list[bool]:
        return [state() is not None for state in self.states]


@pytest.mark.parametrize("mode", ["off", "safe"])
@pytest.mark.parametrize(("every", "backprop"), [(1, None), (2, None), (1, 2)])
def test_offloaded_states_change_no_bit(mode, every, backprop, tiny):
    config, act = tiny(max_loop_iters=5), ActConfig(mode=mode)
    expected = train(config, act, Recompute("loop", every), backprop)
    offloaded = train(config, act, Recompute("loop", every, offload=True), backprop)
    for name, value in expected.items():
        assert torch.equal(offloaded[name], value), name


def test_shared_keys_and_values_stay_on_the_device(tiny, monkeypatch):
    """The same bits, and one tensor of each loop is copied: its hidden state."""
    config = tiny(max_loop_iters=4, kv_sharing="every:2")
    expected = train(config, ActConfig(mode="off"), Recompute("loop"))
    copies = RecordedCopies(monkeypatch)
    offloaded = train(config, ActConfig(mode="off"), Recompute("loop", offload=True))
    assert [event for event in copies.events if event[0] == "out"] == [("out", t) for t in range(4)]
    assert all(torch.equal(offloaded[name], value) for name, value in expected.items())


def test_a_loops_states_come_back_while_the_loop_after_it_is_recomputed(tiny, monkeypatch):
    """The last loop's are still on the device. When its backward begins, the copy of those before it begins, and so on;
    nothing is copied back twice."""
    copies = RecordedCopies(monkeypatch)
    recomputed: list[int] = []
    original = Mythos(tiny()).recurrent._loop.__func__

    def loop(self, t, *arguments):
        if torch._C._current_graph_task_id() != -1:
            recomputed.append(t)
            copies.events.append(("recompute", t))
        return original(self, t, *arguments)

    monkeypatch.setattr("mythos_dist.model.recurrence.Recurrent._loop", loop)
    train(tiny(max_loop_iters=4), ActConfig(mode="off"), Recompute("loop", offload=True))
    out = [("out", t) for t in range(4)]
    back = [
        ("back", 2),
        ("recompute", 3),
        ("back", 1),
        ("recompute", 2),
        ("back", 0),
        ("recompute", 1),
        ("recompute", 0),
    ]
    assert copies.events == out + back


def test_only_the_newest_state_stays_on_the_device(tiny, monkeypatch):
    """After the forward pass the last loop's is there, and the first loop's, which is the prelude's output too."""
    copies = RecordedCopies(monkeypatch)
    config = tiny(max_loop_iters=5)
    model = Mythos(config, act=ActConfig(mode="off"), recompute=Recompute("loop", offload=True))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    losses = model(ids, labels=ids)
    assert copies.on_device[1:] == [False, False, False, True]
    del losses
    assert not any(copies.on_device), "a pass whose results are dropped frees all"


def test_without_gradient_nothing_is_copied(tiny, monkeypatch):
    copies = RecordedCopies(monkeypatch)
    model = Mythos(tiny(), recompute=Recompute("loop", offload=True))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert copies.events == []
