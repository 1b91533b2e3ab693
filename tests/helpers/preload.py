"""Modules that the fork server imports before it forks a rank: those of a training run, and those that tests use."""

import gc
import importlib

MODULES = (
    "deepspeed",
    "deepspeed.comm.mori",
    "helpers.parity",
    "mythos_dist.ops.hooks",
    "mythos_dist.ops.session",
    "mythos_dist.train.__main__",
    "mythos_dist.train.console",
    "mythos_dist.train.engine",
    "mythos_dist.train.loop",
    "pytest",
    "streaming",
    "torch._dynamo",  # an optimizer imports it
)

for module in MODULES:
    importlib.import_module(module)

# Without this the garbage collector of a forked rank would visit all of these objects, and so copy their memory pages.
gc.collect()
gc.freeze()
