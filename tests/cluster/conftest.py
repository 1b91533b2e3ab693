"""Recovery times of the drills, in the test summary."""

import pytest

_recoveries: list[str] = []


@pytest.fixture
def recovery(request):
    """Call it with seconds and a description, which the test summary shows."""

    def note(seconds: float, description: str) -> None:
        _recoveries.append(f"{request.node.name}: {seconds:.0f} s {description}")

    return note


def pytest_terminal_summary(terminalreporter):
    if _recoveries:
        terminalreporter.section("time to recover")
        for line in _recoveries:
            terminalreporter.write_line(line)
