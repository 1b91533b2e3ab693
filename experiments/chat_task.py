"""Conversations of a toy task: reverse four letters. Random answers are right once in 450,000 times.

The tokenizer encodes bytes and has a chat template, so a model of any size can be tuned in minutes on a CPU.
"""

import json
import random
import string
from pathlib import Path

from mythos_dist.data.manifest import read_json
from mythos_dist.errors import UserError
from mythos_dist.files import new_folder

LETTERS = 4
EOS, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_byte_tokenizer(folder: Path, template: str | None = TEMPLATE, special: tuple[str, ...] = ()) -> Path:
    """Write a tokenizer.json whose tokens are bytes, and its tokenizer_config.json. Returns the former's path.

    `special`: more special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = [EOS, USER, ASSISTANT, END, *special]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder.mkdir(parents=True, exist_ok=True)
    config = {"eos_token": EOS, **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_chat_task(out: Path, *, conversations: int = 10_000, prompts: int = 200, seed: int = 0) -> None:
    """Write the new folder `out`: a tokenizer, train.jsonl with conversations, and prompts.json with other words.

    Raises UserError if `out` exists, or if there are not as many words.
    """
    if out.exists():
        raise UserError("exists; name a new folder, or delete it", str(out))
    total = conversations + prompts
    if total > len(string.ascii_lowercase) ** LETTERS:
        raise UserError(f"{total:,} words of {LETTERS} letters do not exist; ask for fewer conversations or prompts")
    draw = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < total:
        words["".join(draw.choices(string.ascii_lowercase, k=LETTERS))] = None
    train, heldout = list(words)[:conversations], list(words)[conversations:]
    with new_folder(out) as folder:
        write_byte_tokenizer(folder)
        lines = [json.dumps({"prompt": word, "completion": answer(word)}) + "\n" for word in train]
        (folder / "train.jsonl").write_text("".join(lines))
        (folder / "prompts.json").write_text(json.dumps(heldout) + "\n")


def read_prompts(folder: Path) -> list[str]:
    """The words that no conversation has."""
    return read_json((folder / "prompts.json").read_bytes())


def answer(word: str) -> str:
    """What the assistant says."""
    return word[::-1]
