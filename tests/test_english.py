"""Words that readers stopped at, and what the field says: they stay out of code, messages and docs."""

import re
import subprocess

import pytest
from helpers.small_run import REPOSITORY

# Word (a regular expression) and its replacement. Add one when a reader stops at a word.
REPLACEMENTS = {
    r"mend(s|ed|ing)?": "fix",
    r"(goes|went|go|gone) on (behind|from)": "resumes after",
    r"behind (step|the (step|last|first|loops?|checkpoint))": "after",
    r"how manieth": "index",
    r"dearest": "slowest, most expensive",
    r"filled up": "padded",
    r"stretch(es)?": "range, span",
    r"left no word": "was killed, or its node failed",
    r"tensors without numbers": "fake tensors",
    r"(?<!~)(no|some)body(?![@/-])": "no rank, a user, or leave it out",
    r"(who|which) (is|are|was|were) told": "receives",
    r"hears?|speaks?": "receives, sends",
}
PATTERNS = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): text for word, text in REPLACEMENTS.items()}
SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".yaml", ".toml")
EXEMPT = {"CHANGELOG.md", "tests/test_english.py"}


def test_no_file_uses_a_word_that_readers_stopped_at():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    found = []
    for name in listed.stdout.splitlines():
        if not name.endswith(SUFFIXES) or name in EXEMPT or "/fixtures/" in name or not (REPOSITORY / name).exists():
            continue
        for number, line in enumerate((REPOSITORY / name).read_text(encoding="utf-8").splitlines(), 1):
            for pattern, replacement in PATTERNS.items():
                for match in pattern.finditer(line):
                    found.append(f"{name}:{number}: {match[0]!r}; write: {replacement}")
    assert not found, "\n".join(found)


def test_the_pattern_finds_words_and_not_parts_of_words():
    def is_refused(text: str) -> bool:
        return any(pattern.search(text) for pattern in PATTERNS)

    assert is_refused("this has to be mended") and not is_refused("recommended, amendment")
    assert is_refused("start 2 goes on behind step 40") and not is_refused("training goes on for a day")
