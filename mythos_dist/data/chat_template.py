"""The chat template of a tokenizer, or a given one."""

from pathlib import Path

from mythos_dist.data.chat import ChatRenderer
from mythos_dist.data.manifest import ChatTemplate
from mythos_dist.data.tokenizer import Tokenizer, read_configuration, token_text
from mythos_dist.errors import UserError

PLAIN = "plain"  # the name of PLAIN_TEMPLATE
# For any tokenizer: its only special token is EOS, which ends an assistant's turn.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def find_renderer(tokenizer: Tokenizer, option: str | None) -> ChatRenderer:
    """A renderer with the template `option` (a file, or "plain"); None: that of the tokenizer's files.

    Raises UserError if there is none, or if it cannot be used.
    """
    renderer = ChatRenderer(_find_template(tokenizer, option), tuple(tokenizer.special_tokens))
    renderer.check()
    return renderer


def renderer_of(format: str, tokenizer: Tokenizer, option: str | None) -> ChatRenderer | None:
    """`find_renderer` for the format "chat"; None for others, which have no template (UserError)."""
    if format == "chat":
        return find_renderer(tokenizer, option)
    if option is not None:
        raise UserError("--template needs --format chat")
    return None


def special_token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a template uses, by name ("eos_token"): of the model, and of the files next to it."""
    tokens = {"eos_token": tokenizer.eos}
    if tokenizer.bos:
        tokens["bos_token"] = tokenizer.bos
    named = {name: token_text(read_configuration(tokenizer.path.parent, name)) for name in _NAMES}
    return tokens | {name: token for name, token in named.items() if token}


def own_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in the files next to a tokenizer; None if there is none."""
    folder = tokenizer.path.parent
    if (file := folder / "chat_template.jinja").is_file():
        return ChatTemplate(_read(file), special_token_names(tokenizer))
    template = read_configuration(folder, "chat_template")
    if isinstance(template, list):  # several by name
        texts = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = texts.get("default")
    return ChatTemplate(template, special_token_names(tokenizer)) if isinstance(template, str) else None


def _find_template(tokenizer: Tokenizer, option: str | None) -> ChatTemplate:
    if option == PLAIN:
        return ChatTemplate(PLAIN_TEMPLATE, special_token_names(tokenizer))
    if option is not None:
        return ChatTemplate(_read(Path(option)), special_token_names(tokenizer))
    own = own_template(tokenizer)
    if own is None:
        where = f"neither tokenizer_config.json nor chat_template.jinja in {tokenizer.path.parent} has one"
        raise UserError(
            f"no chat template ({where}); pass one with --template FILE, or --template {PLAIN} for a simple one",
            str(tokenizer.path),
        )
    return own


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"the chat template cannot be read ({reason}); name a Jinja file, or {PLAIN}", str(file)
        ) from None
