"""What the drills share: a figure of each in the summary of the tests."""

import pytest

_recoveries: list[str] = []


@pytest.fixture
def recovery(request):
    """Call it with seconds and words: they are shown when all tests are done."""

    def note(seconds: float, words: str) -> None:
        _recoveries.append(f"{request.node.name}: {seconds:.0f} s {words}")

    return note


def pytest_terminal_summary(terminalreporter):
    if _recoveries:
        terminalreporter.section("time to recover")
        for line in _recoveries:
            terminalreporter.write_line(line)
