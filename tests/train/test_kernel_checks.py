"""One error lists all kernels that a config requests and this machine cannot run, before the model is built."""

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError
from mythos_dist.train.checks import check_kernels


def test_all_kernels_that_cannot_run_are_reported_at_once(settings, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    requested = ["experts.backend=megablocks", "train.attention=flash_attn", "train.compile=true"]
    with pytest.raises(UserError) as refused:
        check_kernels(load_config(settings[0], [*settings[1:], *requested]))
    for setting in (*requested, "no-such-compiler"):
        assert any(setting in problem for problem in refused.value.problems), setting


def test_default_kernels_run_on_any_machine(config):
    assert "experts: grouped" in check_kernels(config)
