"""Initial values that depend on (seed, parameter's canonical name, block of rows), never on layout or rank.

A parameter is divided into blocks of rows along its flattened leading dims, and each block has its own generator: a
rank draws only the blocks that overlap its shard, and gets the values of the unsharded tensor.
Scheme: OpenMythos', N(0, 0.02) for every matrix and table, ones for norms, 0 / 0 / 0.1 for the injection; or Huginn's
for the matrices of blocks (`model.init`), and Parcae's for its injection.

Decisions: LOOPS-13.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.parallel.tensor import ParameterShard, shard_of

STD = 0.02
_BLOCK_ELEMENTS = 1 << 20  # about how many values one generator draws
DECAY = 0.447  # initial A of Parcae's injection
_OUTPUTS = ("attn.wo.weight", ".down.weight", "experts.w2")  # matrices that add to the residual stream


def normal_block(seed: int, name: str, block: int, rows: int, columns: int) -> Tensor:
    """The values of one block, (rows, columns) fp32, N(0, 1)."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rows, columns, generator=generator)


def init_std(config: MythosConfig, name: str) -> float:
    """Initial standard deviation of a matrix or table, by its canonical name."""
    of_layer = name.startswith(("prelude.", "coda.", "recurrent.block.", "recurrent.blocks."))
    if config.init == "reference" or not of_layer or name.endswith("router.weight"):
        return STD
    std = math.sqrt(2 / (5 * config.dim))
    scaled_in_forward = name.startswith("recurrent.") and config.residual_scale != "init"
    if not name.endswith(_OUTPUTS) or scaled_in_forward:
        return std
    layers = config.prelude_layers + config.max_loop_iters * config.loop_layers + config.coda_layers
    return std / math.sqrt(2 * layers)


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int, config: MythosConfig) -> None:
    """Initialize every parameter of `model` that is not on the meta device."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            _fill(parameter, name, config, seed)


@torch.no_grad()
def initial_value(name: str, shape: tuple[int, ...], config: MythosConfig, seed: int) -> Tensor:
    """The initial value of an unsharded parameter, fp32."""
    value = torch.empty(shape)
    _fill(value, name, config, seed)
    return value


def _fill(parameter: Tensor, name: str, config: MythosConfig, seed: int) -> None:
    parent, _, leaf = name.rpartition(".")
    if parent.endswith("norm"):
        parameter.fill_(1.0)
    elif parent.endswith("injection"):
        # softplus(delta) = -log(DECAY), and exp(log_A) = 1
        values = {"B": 0.0 if config.injection == "difference" else 0.1, "delta": math.log(1 / DECAY - 1)}
        parameter.fill_(values.get(leaf, 0.0))
    elif parent.endswith("injection.B"):
        _fill_identity(parameter, shard_of(parameter))
    elif leaf == "bias":
        parameter.zero_()
    else:
        _fill_normal(parameter, shard_of(parameter), name, init_std(config, name), seed)


def _fill_identity(parameter: Tensor, part: ParameterShard) -> None:
    rows = torch.arange(part.start[0], part.stop[0])
    columns = torch.arange(part.start[1], part.stop[1])
    parameter.zero_()
    parameter[: len(rows), : len(columns)] = (rows.unsqueeze(1) == columns).to(parameter)


def _fill_normal(parameter: Tensor, part: ParameterShard, name: str, std: float, seed: int) -> None:
    parameter.zero_()  # padding after the shard stays zero
    total = math.prod(part.full_shape[:-1])  # rows
    step = max(1, _BLOCK_ELEMENTS // part.full_shape[-1])

    @functools.lru_cache(maxsize=1)  # consecutive runs share a block
    def drawn(block: int) -> Tensor:
        return normal_block(seed, name, block, min(step, total - block * step), part.full_shape[-1]) * std

    for local, row, length in _runs(part):
        target = parameter[local[:-1]].narrow(0, local[-1], length).narrow(1, 0, part.shape[-1])
        for block in range(row // step, (row + length - 1) // step + 1):
            start, stop = max(row, block * step), min(row + length, (block + 1) * step)
            values = drawn(block)[start - block * step : stop - block * step]
            target[start - row : stop - row] = values[:, part.start[-1] : part.stop[-1]]


def _runs(part: ParameterShard) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Runs of contiguous rows of a shard: index in the parameter, first row in the unsharded tensor, number of rows."""
    *outer, length = part.shape[:-1]
    if length == 0:
        return
    for index in product(*(range(n) for n in outer)):
        row = 0
        for offset, start, size in zip((*index, 0), part.start, part.full_shape[:-1], strict=False):
            row = row * size + start + offset
        yield (*index, 0), row, length
