"""Words that readers stopped at, and what the field says: they stay out of code, messages and docs."""

import re
import subprocess

import pytest
from helpers.small_run import REPOSITORY

# Word (a regular expression) and its replacement. Add one when a reader stops at a word.
REPLACEMENTS = {
    r"mend(s|ed|ing)?": "fix",
    r"(goes|went|go|going|gone) on(?! the)": "resumes, continues",
    r"behind ((a|an|each|every|its|the|last|first) )*(steps?|loops?|pass|passes|checkpoints?|blocks?)": "after",
    r"how manieth": "index",
    r"dearest": "slowest, most expensive",
    r"filled up": "padded",
    r"stretch(es)?": "range, span",
    r"left no word": "was killed, or its node failed",
    r"tensors without numbers": "fake tensors",
    r"(?<!~)(no|some)body(?![@/-])": "no rank, a user, or leave it out",
    r"told": "receives, is set to",
    r"hears?|speaks?": "receives, sends",
    r"undisturbed": "uninterrupted",
    r"torn": "truncated, damaged",
    r"(is|are|was|comes?) whole": "complete, intact, unsharded",
    r"fates?": "outcome",
    r"pictures?": "plot",
    r"whoever": "a process that, a user who, or leave it out",
    r"anew": "again, starts over",
    r"(?<!\.)learnt(?!:|=| <=)": "in the loss, learned",  # keys of manifest.json stay
    r"for ever": "forever",
    r"frozen (ranks?|loops?|process(es)?)": "suspended ranks, no-grad loops",
}
PATTERNS = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): text for word, text in REPLACEMENTS.items()}
ANY = re.compile("|".join(rf"\b(?:{word})\b" for word in REPLACEMENTS), re.IGNORECASE)
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
    problems = []
    for name in listed.stdout.splitlines():
        if not name.endswith(SUFFIXES) or name in EXEMPT or "/fixtures/" in name or not (REPOSITORY / name).exists():
            continue
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines() if ANY.search(text) else (), 1):
            for pattern, replacement in PATTERNS.items():
                for match in pattern.finditer(line):
                    problems.append(f"{name}:{number}: {match[0]!r}; write: {replacement}")
    assert not problems, "\n".join(problems)


def test_the_pattern_finds_words_and_not_parts_of_words():
    def is_refused(text: str) -> bool:
        return any(pattern.search(text) for pattern in PATTERNS)

    assert is_refused("this has to be mended") and not is_refused("recommended, amendment")
    assert is_refused("start 2 goes on behind step 40") and not is_refused("what goes on the wire, look-behind")


def test_no_variable_is_called_found():
    """A noun says what it is."""
    assigned = re.compile(
        r"^\s*(?:if |elif |while |for )?\(?found\b(?:: [^=]+)?(?: =| \|=| \+=| :=| in )|\bfound :=", re.MULTILINE
    )
    files = (REPOSITORY / "mythos_dist").rglob("*.py")
    assert [str(file.relative_to(REPOSITORY)) for file in files if assigned.search(file.read_text())] == []
