"""What the fork server does before it forks a rank: import the modules of a training run and those that tests use, and
let the gloo groups of a rank share one thread for their connections."""

import functools
import gc
import importlib
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

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


@functools.cache
def _gloo_device() -> Any:
    """Created after the fork, by the first group of the rank: it has a thread."""
    return ProcessGroupGloo.create_default_device()


def _create_gloo_group(options: Any, _: object) -> ProcessGroupGloo:
    """As torch does, which creates a device for each group: a thread that wakes up a hundred times a second and ends
    with the group, and a launch tests dozens of layouts."""
    gloo = ProcessGroupGloo._Options()
    gloo._devices, gloo._timeout = [_gloo_device()], options.timeout
    gloo.global_ranks_in_group, gloo.group_name = options.global_ranks_in_group, options.group_id
    return ProcessGroupGloo(options.store, options.group_rank, options.group_size, gloo)


dist.Backend.register_backend(
    dist.Backend.GLOO,
    _create_gloo_group,
    extended_api=True,
    devices=dist.Backend.backend_capability[dist.Backend.GLOO],
    _backend_type=dist.ProcessGroup.BackendType.GLOO,
)

# Without this the garbage collector of a forked rank would visit all of these objects, and so copy their memory pages.
gc.collect()
gc.freeze()
