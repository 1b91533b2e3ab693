"""What a rank holds of a run's tensors, by canonical name: views into model and optimizer, to save and to load."""

from dataclasses import dataclass

from torch import Tensor

from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER
from mythos_dist.checkpoint.pieces import Index, Piece


@dataclass(frozen=True)
class LocalShard:
    """A rank's piece of a named tensor: for each kind a flat fp32 view of `piece.last - piece.first` elements."""

    piece: Piece
    full_shape: Index  # of the unsharded tensor
    values: dict[str, Tensor]  # by kind: parameter and moments, or buffer; and its average
    writes: bool  # whether this rank saves it: of the ranks that hold the same piece, one does

    @property
    def weights(self) -> Tensor:
        """The current values of the parameter (its fp32 master copy) or of the buffer."""
        return self.values[PARAMETER if PARAMETER in self.values else BUFFER]


LocalShards = dict[str, LocalShard]
