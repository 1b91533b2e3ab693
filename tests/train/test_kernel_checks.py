"""Kernels that a config asks for and this machine cannot run: all of them named in one refusal, before the model."""

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError
from mythos_dist.train.checks import check_kernels


def test_everything_that_cannot_run_is_named_at_once(settings, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    asked = ["experts.backend=megablocks", "train.attention=flash_attn", "train.compile=true"]
    with pytest.raises(UserError) as refused:
        check_kernels(load_config(settings[0], [*settings[1:], *asked]))
    for setting in (*asked, "no-such-compiler"):
        assert any(setting in problem for problem in refused.value.problems), setting


def test_defaults_run_anywhere(config):
    assert "experts: grouped" in check_kernels(config)
