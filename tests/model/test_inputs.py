"""Invalid arguments from Python raise a UserError instead of giving wrong logits."""

import pytest
import torch

from mythos_dist.config.schema import ActConfig
from mythos_dist.errors import UserError
from mythos_dist.model import Mythos

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def made() -> dict[str, Mythos]:
    return {}


@pytest.fixture
def model(made, tiny) -> Mythos:
    return made.setdefault("model", Mythos(tiny()))  # of 40 tokens and a context of 64


@pytest.mark.parametrize(
    ("input_ids", "more", "said"),
    [
        (torch.tensor([[1, 40]]), {}, "token id 40 is out of range for model.vocab_size=40"),
        (torch.tensor([[-1, 3]]), {}, "token id -1 is out of range"),
        (torch.tensor([[2**40]]), {}, f"token id {2**40} is out of range"),
        (IDS.float(), {}, "input_ids has dtype torch.float32; expected torch.int64"),
        (IDS.bool(), {}, "input_ids has dtype torch.bool"),
        (IDS[0], {}, "input_ids has shape (4,); expected (batch, tokens)"),
        (IDS[None], {}, "input_ids has shape (1, 1, 4)"),
        (IDS[:, :0], {}, "input_ids has shape (1, 0); give at least one"),
        (IDS[:0], {}, "input_ids has shape (0, 4); give at least one"),
        ([[1, 2]], {}, "input_ids is a list; expected a tensor"),
        ("text", {}, "input_ids is a str; expected a tensor"),
        (torch.zeros(1, 65, dtype=torch.int64), {}, "65 tokens is longer than the context model.max_seq_len=64"),
        (IDS, {"n_loops": 0}, "n_loops=0 must be at least 1"),
        (IDS, {"n_loops": -2}, "n_loops=-2 must be at least 1"),
        (IDS, {"n_loops": 10**9}, "n_loops=1000000000 must be at least 1 and at most 512"),
        (IDS, {"n_loops": True}, "n_loops=True: expected a whole number"),
        (IDS, {"n_loops": 2.0}, "n_loops=2.0: expected a whole number"),
        (IDS, {"n_loops": "2"}, "n_loops='2': expected a whole number"),
        (IDS, {"labels": IDS, "backprop": -1}, "backprop=-1 must be at least 1"),
        (IDS, {"labels": IDS + 40}, "labels: token id 44 is out of range"),
        (IDS, {"labels": IDS - 4}, "labels: token id -3 is out of range"),
        (IDS, {"labels": IDS[:, :3]}, "labels has shape (1, 3), input_ids (1, 4)"),
        (IDS, {"labels": IDS.float()}, "labels has dtype torch.float32"),
        (IDS, {"document_ids": IDS[:, :2]}, "document_ids has shape (1, 2), input_ids (1, 4)"),
    ],
)
def test_invalid_tokens_and_loops_are_rejected(model, input_ids, more, said):
    with pytest.raises(UserError) as raised:
        model(input_ids, **more)
    assert said in str(raised.value)


def test_valid_inputs_are_accepted(model):
    """int32, a full context, ignored labels, labels by loop; generation refuses a list as the forward pass does."""
    expected = model(IDS, 2)
    assert torch.equal(model(IDS.int(), 2), expected)
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 40)
    ignored = IDS.masked_fill(IDS == 2, -100)
    assert torch.isfinite(model(IDS, 2, labels=ignored)["objective"])
    assert torch.isfinite(model(IDS, 2, labels=ignored[:, None].expand(1, 2, 4))["objective"])
    with pytest.raises(UserError, match="input_ids is a list"):
        model.generate([[1, 2]])  # pyright: ignore[reportArgumentType]


def test_one_error_lists_all_problems_of_the_tokens(model):
    with pytest.raises(UserError) as raised:
        model(torch.tensor([[1, 99]]), labels=IDS[:, :2] + 90, document_ids=IDS)
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"dim": 8}}, "config is a dict; expected a MythosConfig"),
        ({"act": "off"}, "act is a str; expected a ActConfig"),
        ({"experts": ActConfig()}, "experts is a ActConfig; expected a ExpertsConfig"),
        ({"attention": "flash"}, "attention='flash': expected 'auto', 'flash_attn' or 'sdpa'"),
    ],
)
def test_constructor_arguments_are_checked(change, said, tiny):
    config = change.pop("config", None) or tiny()
    with pytest.raises(UserError) as raised:
        Mythos(config, **change)
    assert said in str(raised.value)
