"""A tokenizer in the words of a GGUF file: tokens, merges or scores, marks, chat template.

llama.cpp knows tokenizers by name and splits texts by rules of its own, so one is written only where its parts are those
that a name stands for: a name that is nearly right would split texts otherwise, without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tune_magic.errors import TuneError

_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LETTERS % "": ("qwen2", False), _LETTERS % "{1,3}": ("llama-bpe", True), _TEKKEN: ("tekken", True)}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNREACHED = -1e6
_HINT = "Export it with `--to merged`, or with `--to onnx`, and keep the tokenizer beside it."


@dataclass(frozen=True)
class _Kind:
    """How a tokenizer is called in the file.

    Attributes:
        model: ``gpt2`` for pairs of bytes, ``llama`` for pieces with scores.
        splits: llama.cpp's name of the rule that splits texts first; None for pieces.
        adds_space: Whether a text gets a space before it.
    """

    model: str
    splits: str | None
    adds_space: bool = False


def add_tokenizer(writer: Any, tokenizer: Any, num_rows: int, ends: Sequence[int]) -> None:
    """Add a tokenizer to what a file says of its model.

    Args:
        writer: A `gguf.GGUFWriter`.
        tokenizer: A fast tokenizer of Transformers.
        num_rows: Rows of the model's embeddings; those without a token are padding.
        ends: Tokens that end an answer.

    Raises:
        TuneError: llama.cpp has no such tokenizer.
    """
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(about)
    tokens, types = _tokens(tokenizer, about, num_rows)
    writer.add_tokenizer_model(kind.model)
    writer.add_tokenizer_pre(kind.splits or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in about["model"]["merges"]]
    if kind.splits is None:
        writer.add_token_scores(_scores(tokens, merges))
    else:  # llama.cpp refuses a list of none; these two are never side by side within a word
        writer.add_token_merges(merges or [" ".join(tokens[:2])])
    writer.add_add_space_prefix(kind.adds_space)
    _add_marks(writer, tokenizer, ends)


def _kind(about: dict[str, Any]) -> _Kind:
    model = about["model"]
    if model["type"] != "BPE":
        raise TuneError(f"A tokenizer of kind `{model['type']}` is not written as GGUF.", hint=_HINT)
    if model.get("byte_fallback"):
        return _Kind("llama", None, _adds_space(about))
    splits, ignores_merges = _split_rule(about.get("pre_tokenizer") or {})
    normalizer = (about.get("normalizer") or {"type": "NFC"})["type"]
    if splits is None or bool(model.get("ignore_merges")) != ignores_merges or normalizer != "NFC":
        raise TuneError("llama.cpp has no name for how this tokenizer splits texts.", hint=_HINT)
    return _Kind("gpt2", splits)


def _split_rule(rule: dict[str, Any]) -> tuple[str | None, bool]:
    """Return llama.cpp's name of a rule, None where it has none, and whether whole words skip the merges there."""
    parts = rule.get("pretokenizers", [rule])
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None, False
    uses_own = last.get("use_regex", True)
    if not before:
        return ("gpt-2" if uses_own else None), False
    first = before[0]
    if len(before) == 1 and first["type"] == "Digits" and first["individual_digits"] and uses_own:
        return "smollm", False
    if len(before) == 1 and first["type"] == "Split" and first["behavior"] == "Isolated" and not uses_own:
        return _SPLITS.get(first["pattern"].get("Regex", ""), (None, False))
    return None, False


def _adds_space(about: dict[str, Any]) -> bool:
    """Return whether a tokenizer of pieces puts a space before texts."""
    normalizer, splitter = about.get("normalizer") or {}, about.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Prepend" for part in parts) or splitter.get("prepend_scheme") in ("first", "always")


def _tokens(tokenizer: Any, about: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Return each row's token and what kind of token it is."""
    from gguf import TokenType

    known = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in about["added_tokens"]}
    whole = next((token["content"] for token in about["added_tokens"] if token["single_word"]), None)
    if whole is not None:
        raise TuneError(
            f"The token `{whole}` stands for whole words alone; llama.cpp would find it inside of words, too.",
            hint=_HINT,
        )
    unknown = about["model"].get("unk_token")
    tokens, types = [], []
    for number in range(num_rows):
        text = known.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        if text is None:
            types.append(TokenType.UNUSED)
        elif text == unknown:
            types.append(TokenType.UNKNOWN)
        elif number in added:
            types.append(TokenType.CONTROL if added[number] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return scores by which pieces join in the order of the merges: the sooner a merge, the higher what it makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else _UNREACHED for token in tokens]


def _add_marks(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    """Add the tokens that mean something, whether texts begin and end with some, and the chat template."""
    marks = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id,
    }  # fmt: skip
    others = [token for token in ends if token != tokenizer.eos_token_id]
    marks["eot"] = others[0] if others else None
    for name, number in marks.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and encoded[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
