"""The matrices that a parameter consists of: what Muon orthogonalizes one by one.

They are the matrices of the unfused model, OpenMythos': each expert of a stack, each shared expert of their fused FFN,
and MLA's up-projection of queries without RoPE beside the one with RoPE, whose rows alternate by head.
"""

# E experts, F hidden width, D model.

from typing import NamedTuple

from mythos_dist.config.schema import MythosConfig

Index = tuple[int, ...]


class MatrixBlock(NamedTuple):
    """A box of the unsharded parameter: consecutive rows of a matrix."""

    start: Index
    shape: Index


class Matrix(NamedTuple):
    """A matrix; its blocks are stacked along the rows."""

    rows: int
    columns: int
    blocks: tuple[MatrixBlock, ...]


def matrices_of(name: str, shape: Index, config: MythosConfig) -> list[Matrix]:
    """The matrices of a parameter, by its canonical name and unsharded shape."""
    if len(shape) == 3:  # a stack, such as experts (E, F, D)
        _, rows, columns = shape
        return [Matrix(rows, columns, (MatrixBlock((i, 0, 0), (1, rows, columns)),)) for i in range(shape[0])]
    rows, columns = shape
    if name.endswith("attn.q_up.weight"):
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        starts = range(0, rows, nope + rope)  # of each head
        return [
            Matrix(nope * len(starts), columns, tuple(MatrixBlock((start, 0), (nope, columns)) for start in starts)),
            Matrix(
                rope * len(starts), columns, tuple(MatrixBlock((start + nope, 0), (rope, columns)) for start in starts)
            ),
        ]
    width = config.expert_dim * config.n_experts_per_tok  # of one shared expert
    if name.endswith("ffn.shared.down.weight"):
        return [Matrix(rows, width, (MatrixBlock((0, start), (rows, width)),)) for start in range(0, columns, width)]
    if ".ffn.shared." in name:
        return [Matrix(width, columns, (MatrixBlock((start, 0), (width, columns)),)) for start in range(0, rows, width)]
    return [Matrix(rows, columns, (MatrixBlock((0, 0), shape),))]
