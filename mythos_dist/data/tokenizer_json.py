"""A SentencePiece model as a tokenizer.json, which Hugging Face's fast tokenizers read: the same ids for the same text.

Three traps, and how they are avoided:
  U+2581 stands for a space in SentencePiece, so that converters take a literal one in a text for a space. Here pieces
  have plain spaces, and a literal U+2581 becomes its three byte pieces, as in our encoder.
  A tokenizer.json matches every entry of its vocabulary in text, also control and byte pieces such as `<0x41>`. Here
  the first character of those is replaced in texts and in the normal pieces, by a noncharacter of Unicode.
  Sums of scores are fp32 in SentencePiece and fp64 here, so two segmentations of a unigram model whose scores are equal
  up to rounding (runs of one character) may be ordered differently; they have the same text.

Decisions: HF-2.
"""

import base64
import json
from typing import Any

import numpy as np

from mythos_dist.data.tokenizer import PROBE, RARE, SentencePieceTokenizer
from mythos_dist.data.word_cache import SPACE, parse_sentencepiece

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never in a valid text for interchange
_UNUSED = _NONCHARACTERS.pop()  # begins pieces that must not match
_TEXTS = (PROBE, RARE, "a", " a", "a  b", "x <0x41> y", "if x < 3:\n    y\n", "<s> [INST]", "\u2581 a\u2581b", "")


def convert_sentencepiece(tokenizer: SentencePieceTokenizer) -> str | None:
    """The tokenizer.json; None if the model has rules that it cannot express, found by comparing ids of some texts."""
    model = parse_sentencepiece(tokenizer.path.read_bytes())
    if model.trainer_spec.model_type not in (model.trainer_spec.UNIGRAM, model.trainer_spec.BPE):
        return None
    for prefix in ("metaspace", "prepend") if model.normalizer_spec.add_dummy_prefix else ("",):
        text = json.dumps(_specification(model, prefix), ensure_ascii=False)
        if _is_faithful(text, tokenizer):
            return text
    return None


def _is_faithful(text: str, tokenizer: SentencePieceTokenizer) -> bool:
    import tokenizers

    try:
        converted = tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises no narrower type
        return False
    rendered = f"a b{tokenizer.eos}c d{tokenizer.eos}\n"
    pairs = [(one, tokenizer.encode(one)) for one in _TEXTS if not any(s in one for s in tokenizer.special_tokens)]
    pairs.append((rendered, tokenizer.encode_rendered(rendered, False)))
    for one, ids in pairs:
        got = converted.encode(one, add_special_tokens=False).ids
        # In a run of one character, divisions into the same pieces in another order have equal scores in a unigram
        # model: which one is chosen is rounding.
        same_pieces = sorted(got) == sorted(ids.tolist()) and converted.decode(got) == converted.decode(ids.tolist())
        if not (np.array_equal(got, ids) or same_pieces):
            return False
    return True


def _specification(model: Any, prefix: str) -> dict[str, Any]:
    """tokenizer.json as an object. prefix: how a dummy prefix is added, "metaspace" or "prepend"; empty: not at all."""
    kinds, normal = model.SentencePiece, model.SentencePiece.NORMAL
    reserved = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)]
    escapes = dict(zip(sorted({name[0] for name in reserved}), _NONCHARACTERS, strict=False))
    to_escaped = str.maketrans({SPACE: " ", **escapes})
    vocabulary, added = [], []
    for i, piece in enumerate(model.pieces):
        text = piece.piece.translate(to_escaped) if piece.type == normal else piece.piece
        if piece.type == kinds.UNUSED:
            text = _UNUSED + text
        if piece.type == kinds.USER_DEFINED:
            text = text.replace(SPACE, " ")
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED):
            added.append(_added_token(i, text, special=piece.type != kinds.USER_DEFINED))
        vocabulary.append((text, piece.score))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(model.normalizer_spec, escapes, prefix),
        "pre_tokenizer": _metaspace() if prefix == "metaspace" else None,
        "post_processor": None,
        "decoder": _decoder(escapes, bool(prefix)),
        "model": _unigram(model, vocabulary) if model.trainer_spec.model_type == 1 else _bpe(model, vocabulary),
    }


def _added_token(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": special}


def _normalizer(rules: Any, escapes: dict[str, str], prefix: str) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix == "prepend":
        steps.append({"type": "Prepend", "prepend": " "})
    steps += [{"type": "Replace", "pattern": {"String": one}, "content": other} for one, other in escapes.items()]
    return {"type": "Sequence", "normalizers": steps}


def _metaspace() -> dict[str, Any]:
    """Adds the dummy prefix to the beginning of a text only, not after each special token."""
    return {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}


def _decoder(escapes: dict[str, str], strips_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Replace", "pattern": {"String": other}, "content": one} for one, other in escapes.items()]
    if strips_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: Any, vocabulary: list[tuple[str, float]]) -> dict[str, Any]:
    scores = [piece.score for piece in model.pieces if piece.type == model.SentencePiece.NORMAL]
    # The score of an unknown character follows from the lowest score of all entries, in SentencePiece of normal ones.
    lowest = min(scores, default=0.0)
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [(text, max(score, lowest)) for text, score in vocabulary],
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _bpe(model: Any, vocabulary: list[tuple[str, float]]) -> dict[str, Any]:
    """SentencePiece merges two symbols if their joint text is a piece, best score first: each way to split a piece into
    two others is a merge."""
    normal = {
        text: score
        for (text, score), piece in zip(vocabulary, model.pieces, strict=True)
        if piece.type == model.SentencePiece.NORMAL
    }
    merges = []
    for text, score in normal.items():
        splits = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(-score, left, right) for left, right in splits if left in normal and right in normal]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores stay in the order of ids
    return {
        "type": "BPE",
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": {text: i for i, (text, _) in enumerate(vocabulary)},
        "merges": [(left, right) for _, left, right in merges],
    }
