"""A short soak: `tests/soak.py` does the same for longer."""

import pytest
from helpers.soak import Soak, remove_shared_memory


@pytest.mark.launch
def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(settings, tmp_path, seed):
    """Twelve kills at random points; 900 s is the limit for a run that never reaches them."""
    try:
        soak = Soak(settings, tmp_path, seed)
        soak.run(kills=12, seconds=900, at_random=0.2)
    finally:
        remove_shared_memory(tmp_path)
    assert len(soak.kills) == 12 and soak.runs
