"""What one rank holds of a run's state, by canonical name: views into model and optimizer, to read and to fill."""

from dataclasses import dataclass

from torch import Tensor

from mythos_dist.checkpoint.pieces import Index, Piece


@dataclass(frozen=True)
class LocalShard:
    """A piece of a named tensor, for each of its kinds a flat fp32 view of `piece.last - piece.first` numbers."""

    piece: Piece
    whole: Index  # shape of the whole tensor
    values: dict[str, Tensor]  # parameter, exp_avg, exp_avg_sq; or buffer
    writes: bool  # of the ranks that hold the same piece, one writes it


State = dict[str, LocalShard]
