"""Export a checkpoint's weights for other programs: safetensors files with an index, as Hugging Face's loaders read.

The formats differ in the names of tensors (`model/pretrained.py`). `OpenMythos.load_state_dict` loads open_mythos,
except for its rotary tables and its head, which is tied to the embedding; hf has a class for transformers as well
(`hugging_face.py`). Every export carries the tokenizer. One tensor is in memory at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import check_free_space, group_by_size, new_output, tensor_blocks
from mythos_dist.checkpoint.hugging_face import write_hugging_face
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import config_of
from mythos_dist.checkpoint.tensor_file import ITEM_BYTES, write_tensors
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.data.tokenizer_files import ModelTokenizer, find_tokenizer, write_tokenizer
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, new_folder, reason, write_and_fsync
from mythos_dist.model.open_mythos import NOT_PARAMETERS, to_open_mythos, unsupported_loop_settings
from mythos_dist.model.pretrained import Format, exported_shapes
from mythos_dist.progress import Progress

FILE_BYTES = 5 << 30
Dtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
# Fields of our MythosConfig that theirs does not have.
_NOT_IN_OPEN_MYTHOS = ("mode", "rope_scaling", *BY_MODE["reference"])


@dataclass(frozen=True)
class _Plan:
    """What an export writes."""

    source: Checkpoint
    config: Config
    format: Format
    dtype: Dtype
    shapes: dict[str, dict[str, tuple[int, ...]]]  # our name -> the names and shapes to write
    progress: Progress

    def dtype_of(self, name: str) -> Dtype:
        """The dtype in the export of our tensor `name`. The class for transformers loads routers in fp32, so their file
        has them in fp32: a model that is loaded and saved again has the same bytes."""
        return "fp32" if self.format == "hf" and ".router." in name else self.dtype

    def size(self, name: str) -> int:
        """Bytes of our tensor `name`."""
        return ITEM_BYTES[_DTYPES[self.dtype_of(name)][0]] * sum(map(math.prod, self.shapes[name].values()))


def export(
    source: Checkpoint,
    out: Path,
    format: Format,
    *,
    dtype: Dtype = "fp32",
    tokenizer: Path | None = None,
    workers: int = 2,
    verify: bool = True,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[str], object] = lambda note: None,
    texts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write config.json, the tokenizer, and model.safetensors (or several files and an index) into the new folder
    `out`; and `texts`, by the names of their files.

    `tokenizer`: its file; None: that of the source. Without one the export has none, which is reported: shards may be
    on another cluster. `workers`: files written at once. `verify`: as in `write_canonical`. Returns the files of
    weights. Raises UserError if the source is damaged, or if `out` exists already or cannot be written.
    """
    out = new_output(source, out, verify)
    config = config_of(source)
    unsupported = unsupported_loop_settings(config.model) if format == "open_mythos" else []
    if format == "open_mythos" and config.model.rope_scaling:
        unsupported.append("model.rope_scaling")
    if unsupported:
        raise UserError(
            f"OpenMythos does not have {', '.join(unsupported)}; export with --format safetensors", str(source.folder)
        )
    tensors = source.manifest.tensors.items()
    shapes = {name: exported_shapes(format, name, tensor.shape, config.model) for name, tensor in tensors}
    plan = _Plan(source, config, format, dtype, shapes, progress)
    sizes = {name: plan.size(name) for name in shapes}
    model_tokenizer = find_or_report(source, config, tokenizer, report)
    with output_folder(out, sum(sizes.values())) as folder:
        files = _write_weights(plan, folder, group_by_size(sizes, file_bytes), workers)
        if model_tokenizer is not None and (note := write_tokenizer(folder, model_tokenizer, config.model.max_seq_len)):
            report(note)
        for name, text in (texts or {}).items():
            write_and_fsync(folder / name, text)
        if format == "hf":
            write_hugging_face(folder, source, config, dtype, model_tokenizer)
        else:
            fields = asdict(config.model)
            if format == "open_mythos":
                fields = {name: value for name, value in fields.items() if name not in _NOT_IN_OPEN_MYTHOS}
            write_and_fsync(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    return [out / file for file in files]


def find_or_report(
    source: Checkpoint, config: Config, tokenizer: Path | None, report: Callable[[str], object]
) -> ModelTokenizer | None:
    """The tokenizer in the file `tokenizer`, or that of the source; None, which is reported, if it is not available.

    Raises UserError if the given file cannot be used.
    """
    try:
        return find_tokenizer(source.folder, config.data, tokenizer)
    except UserError as error:
        if tokenizer is not None:
            raise
        report(f"the export has no tokenizer: {error}")
        return None


def _write_weights(plan: _Plan, folder: Path, groups: list[list[str]], workers: int) -> list[str]:
    """Write a file for each group of our names, and an index of several files. Returns the names of the files."""
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    # `start_from` reads step and tokens, for the lineage of a run that begins with these weights; inference needs the
    # settings, besides those of the model. transformers drops all but the format: for hf they are in config.json.
    manifest = plan.source.manifest
    metadata = {"format": "pt"}
    if plan.format != "hf":
        settings = {name: manifest.config[name] for name in ("act", "loops") if name in manifest.config}
        metadata |= {"step": str(manifest.step), "tokens": str(manifest.lineage.tokens)}
        metadata["settings"] = json.dumps(settings)

    def write_file(file: str, names: list[str]) -> None:
        shapes = {key: shape for name in names for key, shape in plan.shapes[name].items()}
        labels = {key: _DTYPES[plan.dtype_of(name)][0] for name in names for key in plan.shapes[name]}
        blocks = (block for name in names for block in _blocks(plan, name))
        write_tensors(folder / file, shapes, blocks, labels, metadata=metadata)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(write_file, files, groups))
    if len(files) > 1:
        weight_map = {}
        for file, names in zip(files, groups, strict=True):
            for name in names:
                weight_map |= dict.fromkeys(plan.shapes[name], file)
        index = {"metadata": {"total_size": sum(map(plan.size, plan.shapes))}, "weight_map": weight_map}
        write_and_fsync(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return files


@contextmanager
def output_folder(out: Path, size: int) -> Iterator[Path]:
    """`files.new_folder` with room for `size` bytes; an OSError becomes a UserError."""
    try:
        make_folders(out.parent)
        check_free_space(out.parent, size)
        with new_folder(out) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"cannot be written ({reason(error)}); name another folder or free some space", str(out)
        ) from None


def _blocks(plan: _Plan, name: str) -> Iterator[memoryview]:
    """The bytes to write for our tensor `name`."""
    source, dtype = plan.source, plan.dtype_of(name)
    kind = source.manifest.tensors[name].weights
    if plan.format != "open_mythos":
        for block in tensor_blocks(source, kind, name, plan.progress):
            yield _bytes_of(torch.frombuffer(block, dtype=torch.float32), dtype)
        return
    full_tensor = torch.from_numpy(source.full_tensor(kind, name))
    for exported_name, tensor in to_open_mythos({name: full_tensor}, plan.config.model).items():
        if exported_name not in NOT_PARAMETERS:
            yield _bytes_of(tensor, dtype)
    plan.progress(4 * full_tensor.numel())


def _bytes_of(tensor: Tensor, dtype: Dtype) -> memoryview:
    return tensor.to(_DTYPES[dtype][1]).contiguous().flatten().view(torch.uint8).numpy().data
