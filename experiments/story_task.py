"""Shards of short stories with questions of several hops: text on which more loops help measurably.

    Dora calls Ben. Hugo visits Dora. Ben helps Cleo. … Hugo visits someone calling someone helping someone.

In a story every person does something to one other person; the sentences are shuffled, and together they are one cycle
of all people. A question begins with a person and follows k sentences: after its i-th "someone" the model predicts the
person that this is, so a question of k hops holds those of fewer. Names, verbs, order and questions are drawn for each
story, so the answers are in the text of the story alone. At the last name of each sentence of the story the target is
the sentence's first name, a target of reading: a lookup in the story compares with this name.

Each hop needs the answer of the hop before. Targets have one row per loop, as `reached` of experiments.depth_task:
after loop t the answers of the first t hops; the last row has all.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.depth_task import EOS, write_task
from mythos_dist.data.manifest import ShardManifest
from mythos_dist.errors import UserError

NAMES = ("Anna", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hugo", "Ida", "Jon", "Kim", "Leo")
VERBS = (("calls", "calling"), ("helps", "helping"), ("thanks", "thanking"), ("visits", "visiting"))
WORDS = ("<bos>", "<eos>", ".", "someone", *(form for verb in VERBS for form in verb), *NAMES)
_ID = {word: i for i, word in enumerate(WORDS)}
BOS, DOT, SOMEONE = _ID["<bos>"], _ID["."], _ID["someone"]
FIRST_VERB, FIRST_NAME = _ID[VERBS[0][0]], _ID[NAMES[0]]
MAX_PEOPLE = len(NAMES)


class Stories(NamedTuple):
    """Stories of one shape, with S tokens each."""

    tokens: np.ndarray  # (N, S): BOS, the sentences of the story, its questions
    # (N, S): the person's token at each "someone" of a question, and the first name at the last of each sentence of the
    # story; elsewhere EOS.
    answers: np.ndarray
    hops: np.ndarray  # (S,): number of hops of the answer at each position; 0 outside of questions


def build_stories(random: np.random.Generator, count: int, people: int, questions: int, hops: int) -> Stories:
    """`count` stories of `people` people, each with `questions` questions of `hops` hops about different people."""
    cycle = random.permuted(np.tile(np.arange(len(NAMES)), (count, 1)), axis=1)[:, :people] + FIRST_NAME
    verbs = FIRST_VERB + 2 * random.integers(len(VERBS), size=(count, people))  # the verb after each person
    order = random.permuted(np.tile(np.arange(people), (count, 1)), axis=1)
    sentence = [np.take_along_axis(column, order, 1) for column in (cycle, verbs, np.roll(cycle, -1, axis=1))]
    story = np.stack([*sentence, np.full_like(order, DOT)], -1).reshape(count, 4 * people)
    starts = random.permuted(np.tile(np.arange(people), (count, 1)), axis=1)[:, :questions]

    rows = np.arange(count)[:, None]
    path = (starts[:, :, None] + np.arange(hops + 1)) % people  # (N, Q, hops + 1): indices of people along the cycle
    person, verb = (column[rows[:, None], path] for column in (cycle, verbs))
    verb[:, :, 1:] += 1  # "calls someone calling someone"
    asked = np.full((count, questions, 2 * hops + 2), SOMEONE)
    asked[:, :, 0], asked[:, :, -1] = person[:, :, 0], DOT
    asked[:, :, 1:-1:2] = verb[:, :, :-1]
    answers = np.full_like(asked, EOS)
    answers[:, :, 2:-1:2] = person[:, :, 1:]
    of_question = np.zeros(2 * hops + 2, np.int64)
    of_question[2:-1:2] = np.arange(1, hops + 1)

    tokens = np.concatenate([np.full((count, 1), BOS), story, asked.reshape(count, -1)], axis=1)
    read = np.full((count, 1 + 4 * people), EOS)
    read[:, 3::4] = sentence[0]
    return Stories(
        tokens,
        np.concatenate([read, answers.reshape(count, -1)], axis=1),
        np.concatenate([np.zeros(1 + 4 * people, np.int64), np.tile(of_question, questions)]),
    )


def text_of(tokens: np.ndarray) -> str:
    """The text of one story (S,)."""
    return " ".join(WORDS[token] for token in tokens if token != BOS).replace(" .", ".")


def build_windows(stories: Stories, rows: int) -> np.ndarray:
    """(N, S + 1 + rows * S): tokens, EOS, and `rows` rows of targets: after loop t the answers of at most t hops.

    The targets of reading are in all rows, and the last row has all answers.
    """
    columns = [stories.tokens, np.full((len(stories.tokens), 1), EOS)]
    for t in range(1, rows):
        columns.append(np.where(stories.hops <= t, stories.answers, EOS))
    return np.concatenate([*columns, stories.answers], axis=1)


def make_story_task(
    out: Path,
    *,
    people: int = 10,
    questions: int = 6,
    hops: int = 4,
    stories: int = 50_000,
    heldout: int = 1_000,
    seed: int = 0,
    rows: int | None = None,
) -> ShardManifest:
    """Write shards to the new folder `out`, with `rows` rows of targets; None: one per hop.

    Held-out stories have their own random numbers. Raises UserError for sizes that no story can have,
    and if `out` exists.
    """
    _check(people, questions, hops)

    def windows(split: str) -> np.ndarray:
        size = heldout if split == "heldout" else stories
        built = build_stories(_random(seed, people, hops, split), size, people, questions, hops)
        return build_windows(built, rows or hops)

    return write_task(out, WORDS, windows, targets=rows or hops)


def ensure_story_task(out: Path, **settings: int) -> Path:
    """Write the shards if `out` does not exist; an existing folder is assumed to have the same settings."""
    if not out.exists():
        make_story_task(out, **settings)
    return out


def example_of(people: int, hops: int, seed: int = 0) -> str:
    """The text of a held-out story, with one question."""
    return text_of(build_stories(_random(seed, people, hops, "heldout"), 1, people, 1, hops).tokens[0])


def _random(seed: int, people: int, hops: int, split: str) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, people, hops, split == "heldout"]))


def _check(people: int, questions: int, hops: int) -> None:
    problems = []
    if not 2 <= people <= MAX_PEOPLE:
        problems.append(f"people={people} must be from 2 to {MAX_PEOPLE}, the names that there are")
    elif not 1 <= hops < people:
        problems.append(
            f"hops={hops} must be from 1 to {people - 1}: after people={people} hops the story repeats itself"
        )
    if not 1 <= questions <= people:
        problems.append(f"questions={questions} must be from 1 to people={people}: each begins with another person")
    if problems:
        raise UserError(problems)
