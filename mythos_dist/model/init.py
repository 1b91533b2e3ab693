"""Initial values that depend on (seed, parameter's canonical name, block of rows), never on layout or rank.

A parameter is cut into blocks of rows along its flattened leading dims, and each block has a generator of its own:
whoever holds a slice draws only the blocks that the slice touches, and gets the numbers that everybody gets.
Scheme: OpenMythos', N(0, 0.02) for every matrix and table, ones for norms, 0 / 0 / 0.1 for the injection.
"""

import hashlib

import torch
from torch import Tensor, nn

STD = 0.02
_BLOCK_NUMBERS = 1 << 20  # about how many numbers one generator draws


def normal_block(seed: int, name: str, block: int, rows: int, columns: int) -> Tensor:
    """The values of one block, (rows, columns) fp32, N(0, 0.02)."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rows, columns, generator=generator) * STD


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` that is not on the meta device."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            _fill(parameter, name, seed)


def _fill(parameter: Tensor, name: str, seed: int) -> None:
    parent, _, leaf = name.rpartition(".")
    if parent.endswith("norm"):
        parameter.fill_(1.0)
    elif parent.endswith("injection"):
        parameter.fill_(0.1 if leaf == "B" else 0.0)
    elif leaf == "bias":
        parameter.zero_()
    else:
        rows = parameter.view(-1, parameter.shape[-1])
        step = max(1, _BLOCK_NUMBERS // rows.shape[1])
        for block, start in enumerate(range(0, rows.shape[0], step)):
            part = rows[start : start + step]
            part.copy_(normal_block(seed, name, block, *part.shape))
