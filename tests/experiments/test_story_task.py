"""Stories with questions of several hops: the answers are those of a reader of the text, and shards hold them."""

import re

import numpy as np
import pytest

from experiments.depth_task import EOS
from experiments.story_task import NAMES, VERBS, WORDS, Stories, build_stories, make_story_task, text_of
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.prepare.verify import verify

FORMS = dict(VERBS)
IGNORED = -100


def read_answers(text: str, people: int) -> list[list[str]]:
    """The answers of each question, by a reader of the text that has neither tokens nor the generator's order."""
    sentences = [sentence.split() for sentence in re.findall(r"[^.]+", text)]
    facts = {(who, FORMS[verb]): whom for who, verb, whom in sentences[:people]}
    answers = []
    for who, *words in sentences[people:]:
        verbs = words[0::2]
        assert words[1::2] == ["someone"] * len(verbs)
        path = []
        for i, verb in enumerate(verbs):
            who = facts[who, FORMS[verb] if i == 0 else verb]
            path.append(who)
        answers.append(path)
    return answers


def answers_of(stories: Stories, i: int) -> list[str]:
    return [WORDS[answer] for answer in stories.answers[i][stories.hops > 0]]


@pytest.mark.parametrize(("people", "questions", "hops"), [(10, 6, 4), (10, 1, 8), (2, 2, 1), (12, 12, 11)])
def test_answers_are_those_of_a_reader_of_the_text(people, questions, hops):
    stories = build_stories(np.random.default_rng(people), 50, people, questions, hops)
    for i, tokens in enumerate(stories.tokens):
        expected = read_answers(text_of(tokens), people)
        assert len(expected) == questions and {len(path) for path in expected} == {hops}
        assert answers_of(stories, i) == [name for path in expected for name in path]
        read = [sentence.split()[0] for sentence in text_of(tokens).split(".")[:people]]
        assert [WORDS[answer] for answer in stories.answers[i] if answer != EOS] == read + answers_of(stories, i)


def test_every_question_begins_elsewhere_and_no_hop_returns():
    """So an answer of fewer hops is never right for more, and all names but the first are possible answers."""
    stories = build_stories(np.random.default_rng(0), 400, people=10, questions=6, hops=8)
    for i, tokens in enumerate(stories.tokens):
        questions = [sentence.split() for sentence in text_of(tokens).split(".")[10:16]]
        starts = [words[0] for words in questions]
        assert len(set(starts)) == 6
        answers = np.array(answers_of(stories, i)).reshape(6, 8)
        for start, path in zip(starts, answers, strict=True):
            assert len({start, *path}) == 9
    assert set(np.unique([answers_of(stories, i) for i in range(400)])) == set(NAMES)


def test_the_order_of_sentences_and_names_says_nothing_about_answers():
    """Guesses from the place of the sentence or from the name of the asked person are right as often as chance."""
    stories = build_stories(np.random.default_rng(1), 4000, people=10, questions=1, hops=4)
    last = stories.answers[:, stories.hops == 4].ravel()
    for place in (1, 3, 37, 39):  # subject and object of the first and of the last sentence
        assert np.mean(stories.tokens[:, place] == last) == pytest.approx(0.1, abs=0.02)
    asked = stories.tokens[:, 41]
    for name in np.unique(asked):
        counts = np.unique(last[asked == name], return_counts=True)[1] / np.sum(asked == name)
        assert len(counts) == 11 and counts.max() < 0.2


def test_shards_hold_a_row_of_targets_per_hop(tmp_path):
    """The verifier accepts them; row t has the answers of at most t hops, and the same seed gives the same shards."""
    out = tmp_path / "stories"
    settings = {"people": 6, "questions": 2, "hops": 3, "stories": 20, "heldout": 4}
    manifest = make_story_task(out, **settings)
    assert verify(out).ok
    assert manifest.seq_len == 1 + 6 * 4 + 2 * 8 and manifest.vocab_size == len(WORDS)
    stream = ReplicaStream(
        str(out), "train", seq_len=manifest.seq_len, vocab_size=manifest.vocab_size, global_batch=4, micro_batch=4,
        replica=0, num_replicas=1, seed=0,
    )  # fmt: skip
    (batch,) = stream.step(0)
    assert batch.labels.shape == (4, 3, manifest.seq_len)
    for tokens, labels in zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
        expected = read_answers(text_of(tokens), 6)
        for t, row in enumerate(labels, 1):
            asked = [WORDS[label] for label in row[25:] if label != IGNORED]
            assert asked == [name for path in expected for name in path[:t]]
            assert (row[:25] != IGNORED).sum() == 6
    assert make_story_task(tmp_path / "again", **settings).fingerprint == manifest.fingerprint
    assert make_story_task(tmp_path / "other", **settings, seed=1).fingerprint != manifest.fingerprint


def test_sizes_that_no_story_can_have_are_refused(tmp_path):
    for settings, message in (
        ({"people": 13}, "people=13 must be from 2 to 12"),
        ({"people": 5, "hops": 5}, "hops=5 must be from 1 to 4"),
        ({"people": 5, "questions": 6}, "questions=6 must be from 1 to people=5"),
    ):
        with pytest.raises(UserError, match=message):
            make_story_task(tmp_path / "stories", **settings)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists"):
        make_story_task(tmp_path)
