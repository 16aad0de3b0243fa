"""A tokenizer as llama.cpp wants it: tokens, their kinds, merges or scores, and how text is split before all that.

llama.cpp knows ways of splitting by name only (`tokenizer.ggml.pre`), so a way that has no name here is refused: under
another name, words would come out as other tokens than the model was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimtune.errors import FormatError

DIGITS = r"\p{N}"
GPT2 = "gpt-2"  # stands for the expression that is built into ByteLevel
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (WORDS + r"|\p{N}{1,3}" + REST,): "llama-bpe",
    (WORDS + r"|\p{N}" + REST,): "qwen2",
    (TEKKEN,): "tekken",
}
"""llama.cpp's name for each way of splitting: the expressions that are applied one after the other."""

UNMERGED = -1e6
"""The score of a token that no merge makes: whatever a merge makes is preferred."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. `merges` is empty for a `llama` one, `scores` for a `gpt2` one."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of `tokenizer` for a model with `size` embeddings.

    Raises `FormatError` where the tokenizer is none that llama.cpp has a name for, or has more tokens than `size`.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FormatError("GGUF needs a tokenizer of the tokenizers package", got=type(tokenizer).__name__)
    facts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = facts["model"]
    if model["type"] != "BPE":
        raise FormatError("GGUF export knows byte-pair tokenizers", where="tokenizer.json", got=model["type"])
    names: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in facts["added_tokens"]}
    names.update({number: token["content"] for number, token in added.items()})
    if max(names) >= size:
        raise FormatError("the tokenizer has more tokens than the model", got=max(names) + 1, wanted=f"at most {size}")
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [_kind(number, token, names, added, model) for number, token in enumerate(tokens)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    parts = _parts(facts["pre_tokenizer"])
    if not merges:
        raise FormatError("llama.cpp cannot read a tokenizer without merges", where="tokenizer.json")
    if any(part["type"] == "ByteLevel" for part in parts):
        return Vocabulary("gpt2", _split(parts), tokens, kinds, merges, [], False)
    if not model["byte_fallback"]:
        raise FormatError("a tokenizer that is neither byte-level nor falls back to bytes", where="tokenizer.json")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks[token]) if token in ranks else UNMERGED for token in tokens]
    prefix = any(
        part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for part in (*parts, *_parts(facts["normalizer"]))
    )
    return Vocabulary("llama", "default", tokens, kinds, [], scores, prefix)


def add_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, stops: tuple[int, ...] = ()
) -> None:
    """Give `writer` everything about `tokenizer`; `stops` are the model's own ends of a reply."""
    words = vocabulary(tokenizer, size)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_prefix)
    ids: Any = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    special: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": next((stop for stop in stops if stop != tokenizer.eos_token_id), None),
    }
    for name, number in special.items():
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", int(number))
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:  # the marks around what a model learns are transformers' own; other engines do not parse them
        writer.add_chat_template(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", str(template)))


def _kind(
    number: int, token: str, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]
) -> TokenType:
    if number not in names:
        return TokenType.UNUSED
    if token == model["unk_token"]:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a sequence of normalizers or pre-tokenizers, in order."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [part for one in inner for part in _parts(one)] if inner else [step]


def _split(parts: list[Mapping[str, Any]]) -> str:
    """llama.cpp's name for the way of splitting of these pre-tokenizers."""
    ways: list[str] = []
    for part in parts:
        if part["type"] == "Digits" and part["individual_digits"]:
            ways.append(DIGITS)
        elif part["type"] == "Split" and part["behavior"] in ("Isolated", "Removed"):
            ways.append(str(part["pattern"].get("Regex", part["pattern"])))
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            ways.extend([GPT2] if part["use_regex"] else [])
        else:
            ways.append(json.dumps(part))
    name = SPLITS.get(tuple(ways))
    if name is None:
        raise FormatError(
            "llama.cpp has no known name for how the tokenizer splits text",
            where="tokenizer.json, pre_tokenizer",
            got=" then ".join(ways)[:300] or "nothing",
            remedy="export safetensors, and convert the folder with llama.cpp's own convert_hf_to_gguf.py",
        )
    return name
