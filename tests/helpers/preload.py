"""What the fork server has imported before it forks a rank: all that a run imports, and what tests begin with."""

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

# The collector of a forked rank would otherwise visit all of this, and so copy every page of it.
gc.collect()
gc.freeze()
