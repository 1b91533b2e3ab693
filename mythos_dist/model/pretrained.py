"""Exports (`checkpoint/export.py`) as folders to read: their settings, the names of their tensors, the model.

    safetensors   our names
    open_mythos   the names of OpenMythos' class (open_mythos.py)
    hf            our names after `model.`, as transformers saves them; config.json has a model_type

Nothing of a folder is run: config.json is parsed, and tensors are safetensors.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mythos_dist.config.schema import BY_MODE, ActConfig, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError, first_line
from mythos_dist.model.open_mythos import NOT_PARAMETERS, from_open_mythos, open_mythos_shapes
from mythos_dist.model.rope import from_hugging_face
from mythos_dist.urls import RemotePath

Format = Literal["safetensors", "open_mythos", "hf"]
MODEL_TYPE = "mythos"  # of config.json in exports for transformers
HF_PREFIX = "model."
HEAD, HF_HEAD = "unembed.weight", "lm_head.weight"  # transformers does not save a head that is tied
_THEIRS = "recurrent.block.ffn.router_bias"  # a name that only exports for OpenMythos' class have
_SETTINGS = {"act": ActConfig, "loops": LoopsConfig}


@dataclass(frozen=True)
class ExportSettings:
    """What an export records besides weights."""

    model: MythosConfig
    sections: dict[str, dict[str, Any]]  # the settings of `act` and `loops`; none in exports of earlier versions
    step: int  # of training
    tokens: int  # trained until then

    @property
    def act(self) -> ActConfig:
        """Halting, with the defaults where it is not recorded."""
        return ActConfig(**self.sections.get("act", {}))


def is_export(path: Path) -> bool:
    """Whether a folder has the files of an export."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def format_of(names: Collection[str]) -> Format:
    """The format of an export, from the names of its tensors."""
    if f"{HF_PREFIX}embed.weight" in names:
        return "hf"
    return "open_mythos" if _THEIRS in names else "safetensors"


def exported_shapes(
    format: Format, name: str, shape: tuple[int, ...], config: MythosConfig
) -> dict[str, tuple[int, ...]]:
    """The names and shapes that one of our tensors has in an export."""
    if format == "open_mythos":
        return open_mythos_shapes(name, shape, config)
    if format == "hf":
        return {HF_HEAD if name == HEAD else HF_PREFIX + name: shape}
    return {name: shape}


def our_state(state: dict[str, Tensor], config: MythosConfig) -> dict[str, Tensor]:
    """The tensors of an export of any format, or some of them, by our names. Raises UserError if one is missing."""
    if any(name.startswith(HF_PREFIX) or name == HF_HEAD for name in state):
        ours = {name.removeprefix(HF_PREFIX): value for name, value in state.items() if name != HF_HEAD}
        if HF_HEAD in state and not config.tie_embeddings:
            ours[HEAD] = state[HF_HEAD]
        return ours
    return from_open_mythos(state, config)  # changes only names that are OpenMythos'


def read_settings(folder: Path, metadata: dict[str, str]) -> ExportSettings:
    """The settings of the export in `folder`, whose safetensors files have `metadata`. Raises UserError if they cannot
    be read, or are another model's."""
    file = folder / "config.json"
    return parse_settings(file.read_bytes, file, metadata)


def parse_settings(read: Callable[[], bytes], file: Path | RemotePath, metadata: dict[str, str]) -> ExportSettings:
    """As `read_settings`; `read` returns the content of `file`."""
    try:
        content = json.loads(read())
        recorded = content.pop("mythos_dist", None) or {}
        if "model_type" in content:
            _check_model_type(content, file)
            names = {one.name for one in fields(MythosConfig)}
            content = {name: value for name, value in content.items() if name in names}
            content["rope_scaling"] = from_hugging_face(content.get("rope_scaling"))
        else:
            recorded = {**metadata, **json.loads(metadata.get("settings", "{}"))}
        # OpenMythos' class has no fields for what `model.mode` decides.
        model = MythosConfig(**{"mode": "reference", **BY_MODE["reference"], **content})
        sections = {name: asdict(cls(**recorded[name])) for name, cls in _SETTINGS.items() if name in recorded}
        step, tokens = (_number(recorded.get(key)) for key in ("step", "tokens"))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot be read as an export's settings ({first_line(error)})", str(file)) from None
    return ExportSettings(model, sections, step, tokens)


def _check_model_type(content: dict[str, Any], file: Path | RemotePath) -> None:
    if content["model_type"] == MODEL_TYPE:
        return
    classes = content.get("architectures")
    name = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
    raise UserError(
        f"model_type={content['model_type']!r:.60}{name:.100} is another model; give a folder that "
        "`mythos export --format hf` wrote, or one saved by its class",
        str(file),
    )


def _number(value: Any) -> int:
    text = str(value)
    return int(text) if text.isdecimal() and len(text) <= 15 else 0


def check_head(state: Mapping[str, Tensor], config: MythosConfig, folder: Path | RemotePath) -> None:
    """Raises UserError if a tied head was trained apart from the embedding; transformers saves one only then."""
    embedding = f"{HF_PREFIX}embed.weight"
    if config.tie_embeddings and HF_HEAD in state and not torch.equal(state[HF_HEAD], state[embedding]):
        raise UserError(
            f"{HF_HEAD} differs from {embedding}, but in this model they are tied; train with tie_word_embeddings=True",
            str(folder),
        )


def load_pretrained(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    """`Mythos.from_pretrained`."""
    from safetensors import safe_open

    from mythos_dist.model.mythos import Mythos  # which has a method that calls this function

    if not is_export(folder):
        raise UserError(
            "is not an export: it needs config.json and .safetensors files, as `mythos export` writes them",
            str(folder),
        )
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt", device=str(device)) as opened:
                metadata |= opened.metadata() or {}
                state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 — not a mapping
    except Exception as error:  # safetensors raises its own types
        raise UserError(f"cannot be read as weights ({first_line(error)})", str(folder)) from None
    settings = read_settings(folder, metadata)
    check_head(state, settings.model, folder)
    with torch.device("meta"):
        model = Mythos(settings.model, act=settings.act)
    unused = set(NOT_PARAMETERS) - ({HF_HEAD} if not settings.model.tie_embeddings else set())
    state = our_state({name: value for name, value in state.items() if name not in unused}, settings.model)
    kept = {name for name, _ in model.named_buffers()}  # the router's bias stays fp32
    state = {name: value.to(torch.float32 if name in kept else dtype) for name, value in state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"its weights do not fit its config.json: {' '.join(str(error).split())}", str(folder)
        ) from None
    return model.eval()
