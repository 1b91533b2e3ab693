"""The tensors of an export in a store: by name, or the pieces of them that a rank needs."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mythos_dist.checkpoint.pieces import Index, Piece, Region, overlaps
from mythos_dist.checkpoint.range_plan import Copy, FilePlan, merge_ranges, plan_file
from mythos_dist.checkpoint.reader import Wanted
from mythos_dist.checkpoint.sources import named, read_headers, read_plans
from mythos_dist.checkpoint.strict_json import shorten
from mythos_dist.checkpoint.tensor_file import ITEM_BYTES
from mythos_dist.errors import UserError
from mythos_dist.progress import Progress
from mythos_dist.store.folder import list_folder, version_of
from mythos_dist.urls import RemotePath

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_RAW = {2: np.uint16, 4: np.float32, 8: np.float64}  # numpy has no bfloat16


class RemoteTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files. Reading one downloads it."""

    def __init__(self, folder: RemotePath):
        """Raises UserError if a file cannot be read, or if two have a tensor of the same name."""
        self._folder = folder
        sizes = {name: size for name, size in list_folder(folder).files.items() if name.endswith(".safetensors")}
        self._headers = read_headers(folder, dict(sorted(sizes.items())), any_float=True)
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, str] = {}
        for file, header in self._headers.items():
            self.metadata |= header.metadata
            for name in header.entries:
                if name in self._file_of:
                    problem = f"{shorten(name)} is also in {self._file_of[name]}; keep one set"
                    raise UserError(problem, str(folder / file))
                self._file_of[name] = file

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry(name)
        full = Piece.full(entry.shape)
        raw = np.empty(full.last, _RAW[ITEM_BYTES[entry.dtype]])
        self._read([(name, source, raw, target) for source, target in overlaps(full, full, entry.shape)])
        return torch.from_numpy(raw).view(_DTYPES[entry.dtype]).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def described(self) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes, without their elements."""
        entries = {name: self._entry(name) for name in self}
        return {name: torch.zeros((), dtype=_DTYPES[one.dtype]).expand(one.shape) for name, one in entries.items()}

    def versions(self) -> dict[str, str]:
        """For each file a text that changes if the file does."""
        return {name: version_of(self._folder / name) for name in self._headers}

    def read_pieces(self, wanted: Sequence[tuple[str, Index, Wanted]], progress: Progress) -> None:
        """Read pieces of tensors, given with the name and the shape that they have in the files, as fp32."""
        copies: list[tuple[str, Region, np.ndarray, Region]] = []
        to_convert: list[tuple[np.ndarray, Region, Wanted]] = []
        for name, shape, one in wanted:
            entry = self._entry(name)
            raw = one.out if entry.dtype == "F32" else np.empty(len(one.out), _RAW[ITEM_BYTES[entry.dtype]])
            for source, target in overlaps(Piece.full(shape), one.piece, shape):
                copies.append((name, source, raw, target))
                if raw is not one.out:
                    to_convert.append((raw, target, one._replace(name=name)))
        self._read(copies, progress)
        for raw, target, one in to_convert:  # not the padding
            values = torch.from_numpy(raw).view(_DTYPES[self._entry(one.name).dtype])
            of_target = slice(target.offset, target.offset + int(np.prod(target.shape)))
            box = one.out[of_target].reshape(target.shape)
            box[target.slices] = values[of_target].view(target.shape)[target.slices].float().numpy()

    def _read(
        self, copies: Sequence[tuple[str, Region, np.ndarray, Region]], progress: Progress = lambda size: None
    ) -> None:
        plans: list[FilePlan] = []
        for file, header in self._headers.items():
            of_file = [Copy(*one) for one in copies if self._file_of[one[0]] == file]
            if of_file:
                with named(self._folder / file):
                    begins = [header.check_region(one.tensor, one.source) for one in of_file]
                plans.append(plan_file(file, of_file, begins))
        merge_ranges(plans)
        read_plans(self._folder, [(plan, None) for plan in plans], progress)

    def _entry(self, name: str):
        return self._headers[self._file_of[name]].entries[name]
