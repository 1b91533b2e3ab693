"""What the fork server has imported before it forks a rank."""

import gc

import deepspeed  # noqa: F401
import pytest  # noqa: F401
import streaming  # noqa: F401
from helpers import parity  # noqa: F401

import mythos_dist.train.__main__
import mythos_dist.train.engine  # noqa: F401

# The collector of a forked rank would otherwise visit all of this, and so copy every page of it.
gc.collect()
gc.freeze()
