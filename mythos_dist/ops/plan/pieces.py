"""Sizes of the pieces that layers work in (model/pieces.py), and the rows that each exchanges."""

from collections import Counter

from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.routing import ExpertRows, expected_rows
from mythos_dist.parallel.context import local_tokens, most_local_tokens
from mythos_dist.parallel.mesh import Mesh


def piece_sizes(config: Config, mesh: Mesh) -> list[int]:
    """Tokens that the mixture works on, one piece after the other, in a loop of one micro-batch (model/pieces.py);
    over all ranks of a tensor group."""
    train, ranks = config.train, mesh.tensor.size if mesh.sequence else 1
    tokens = train.micro_batch * local_tokens(train.seq_len, mesh) // ranks
    if not config.piece_tokens:
        return [tokens * ranks]
    most = train.micro_batch * most_local_tokens(train.seq_len, mesh)
    count = -(-most // max(1, config.piece_tokens // ranks))
    each, more = divmod(tokens, count)
    return [(each + 1) * ranks] * more + [each * ranks] * (count - more)


def rows_of_pieces(config: Config, mesh: Mesh, imbalance: float = 1.0) -> tuple[ExpertRows, ExpertRows]:
    """`expected_rows` of a loop of one micro-batch: all pieces together, and the largest piece."""
    c, sizes = config.model, piece_sizes(config, mesh)
    settings = c.n_experts_per_tok, c.n_experts, mesh.expert.size, imbalance
    total: Counter[str] = Counter()
    for size, times in Counter(sizes).items():
        for name, rows in expected_rows(size, *settings)._asdict().items():
            total[name] += times * rows
    return ExpertRows(**{name: total[name] for name in ExpertRows._fields}), expected_rows(sizes[0], *settings)
