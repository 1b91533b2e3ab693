"""What an export for Hugging Face's transformers has besides weights: settings, the class's code, and the model card.

transformers is not needed to write it. The code is `mythos_dist/huggingface`, which runs in a user's process only if
that user passes trust_remote_code=True.

Decisions: HF-1.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mythos_dist
from mythos_dist.checkpoint.model_card import model_card
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.tokenizer_files import ModelTokenizer
from mythos_dist.files import valid_unicode, write_and_fsync
from mythos_dist.model.pretrained import MODEL_TYPE
from mythos_dist.model.rope import to_hugging_face

CODE = Path(mythos_dist.__file__).parent / "huggingface"
CODE_FILES = ("configuration_mythos.py", "layers_mythos.py", "modeling_mythos.py")
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def write_hugging_face(
    folder: Path, source: Checkpoint, config: Config, dtype: str, files: ModelTokenizer | None
) -> None:
    """Write config.json, generation_config.json, the code and README.md into `folder`; weights and tokenizer are the
    caller's."""
    tokenizer = None if files is None else files.tokenizer
    write_and_fsync(folder / "config.json", _json(class_settings(source, config, dtype, tokenizer)))
    write_and_fsync(folder / "generation_config.json", _json(_token_ids(tokenizer)))
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
    write_and_fsync(folder / "README.md", valid_unicode(model_card(source, config, dtype, files)))


def class_settings(source: Checkpoint, config: Config, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json: the fields of `MythosPretrainedConfig`, and where transformers finds the classes."""
    manifest = source.manifest
    sections = {name: asdict(getattr(config, name)) for name in ("act", "loops") if name in manifest.config}
    return {
        "architectures": ["MythosForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mythos.MythosPretrainedConfig",
            "AutoModel": "modeling_mythos.MythosModel",
            "AutoModelForCausalLM": "modeling_mythos.MythosForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": _TORCH_NAMES[dtype],
        **asdict(config.model),
        "rope_scaling": to_hugging_face(config.model.rope_scaling),
        "tie_word_embeddings": config.model.tie_embeddings,
        "act_mode": config.act.mode_of(config.model),
        "num_loops": config.loops.mean_of(config.model),
        **_token_ids(tokenizer),
        "mythos_dist": {"step": manifest.step, "tokens": manifest.lineage.tokens, **sections},
    }


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    if tokenizer.bos in tokenizer.special_tokens:
        ids["bos_token_id"] = tokenizer.special_tokens[tokenizer.bos]
    return ids


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
