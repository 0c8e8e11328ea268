"""A tokenizer → what GGUF says of it: words, their kinds, merges or scores, special ids, how text is split before.

Only tokenizers that llama.cpp splits as `tokenizers` does are written. It does not normalize text (Qwen's NFC).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.fence import fence_template
from lora_tune.data.messages import Message
from lora_tune.data.rendering import LossMaskError, render
from lora_tune.data.tokens import end_of_turn_ids
from lora_tune.errors import MissingInputError, RefusedError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
_HINT = "convert it with llama.cpp's own convert_hf_to_gguf.py"
_WORDS_THEN_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = (_WORDS_THEN_DIGITS.replace("DIGITS", digits) for digits in (r"\p{N}{1,3}", r"\p{N}"))
"""How Llama 3 and Qwen 2 cut text before merging, as their tokenizer.json says it."""


@dataclass(frozen=True)
class Vocabulary:
    """All that GGUF holds of a tokenizer."""

    model: str
    """`gpt2` for byte-level BPE, `llama` for SentencePiece's."""
    pre: str
    """llama.cpp's name for how text is cut before merging."""
    words: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    """`left right`, best first; none for `llama`, where scores say the same."""
    scores: tuple[float, ...]
    special_ids: Mapping[str, int]
    """bos, eos, unk, pad, eot → id."""
    adds_bos: bool
    """Whether llama.cpp puts bos in front: as the chat template does, which then leaves it out there."""
    adds_space: bool
    """Whether a text gets a space in front."""
    template: str | None


def read_vocabulary(folder: Path, tokenizer: Any, *, rows: int) -> Vocabulary:
    """Return what GGUF says of the tokenizer.

    Args:
        folder: where it is read from when none is given.
        tokenizer: a fast tokenizer, or None.
        rows: of the model's embedding; ids that the tokenizer leaves free are filled up.

    Raises:
        MissingInputError: there is no fast tokenizer (exit 66).
        RefusedError: llama.cpp would split text otherwise (exit 77).
    """
    tokenizer = tokenizer if tokenizer is not None else _read_tokenizer(folder)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise RefusedError(f"a tokenizer of type {model.get('type')} is not written as GGUF", hint=_HINT)
    words, kinds = _words(tokenizer, described, rows)
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    pieces = bool(model["byte_fallback"])
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_tokenizer(described),
        words=words,
        kinds=kinds,
        merges=() if pieces else tuple(" ".join(pair) for pair in merges),
        scores=_scores(words, kinds, merges) if pieces else (),
        special_ids=_special_ids(tokenizer),
        adds_bos=_adds_bos(tokenizer),
        adds_space=pieces and _adds_space(described),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def add_vocabulary(writer: Any, words: Vocabulary) -> None:
    """Write it into a gguf.GGUFWriter."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.words))
    writer.add_token_types(list(words.kinds))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    for name, number in words.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.adds_space)
    if words.template:
        writer.add_chat_template(words.template)


def template_begins_with_bos(tokenizer: Any) -> bool | None:
    """Return whether the chat template writes bos itself; None without a template or a bos."""
    if not tokenizer.bos_token or not isinstance(tokenizer.chat_template, str):
        return None
    try:
        text = render(tokenizer, [Message("user", "a")], add_generation_prompt=True)
    except LossMaskError:
        return None
    # A turn may begin with the token that also is the tokenizer's bos (ChatML's <|im_start|>).
    return text.startswith(tokenizer.bos_token) and text.count(tokenizer.bos_token) == 1


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise MissingInputError(f"no tokenizer can be read from {folder}: {err}", where=str(folder)) from err
    if not tokenizer.is_fast:
        raise MissingInputError(f"{folder} has no fast tokenizer (tokenizer.json)", where=str(folder))
    # A folder on this machine may hold anyone's template; it is rendered to see how it begins and ends.
    return fence_template(tokenizer)


def _words(tokenizer: Any, described: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return every id's word and kind, as many as the embedding has rows."""
    by_id = {number: word for word, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise RefusedError(
            f"the tokenizer knows id {max(by_id)}, but the model's embedding has {rows} rows",
            hint="take the tokenizer that belongs to this model",
        )
    added = {token["id"]: _CONTROL if token["special"] else _USER_DEFINED for token in described["added_tokens"]}
    unknown = described["model"].get("unk_token")
    fallback = bool(described["model"]["byte_fallback"])
    words, kinds = [], []
    for number in range(rows):
        word = by_id.get(number)
        if word is None:
            kind, word = _UNUSED, f"[PAD{number}]"
        elif fallback and word == unknown:
            kind = _UNKNOWN
        elif number in added:
            kind = added[number]
        elif fallback and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kind = _BYTE
        else:
            kind = _NORMAL
        words.append(word)
        kinds.append(kind)
    return tuple(words), tuple(kinds)


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how this byte-level tokenizer cuts text before merging."""
    normalizer = (described["normalizer"] or {}).get("type")
    stated = described["pre_tokenizer"] or {}
    steps = stated.get("pretokenizers", []) if stated.get("type") == "Sequence" else [stated]
    shape = tuple(_step(step) for step in steps)
    ignores_merges = bool(described["model"].get("ignore_merges"))
    known: dict[tuple[tuple[str, object], ...], tuple[str, bool, str | None]] = {
        (("ByteLevel", True),): ("gpt-2", False, None),
        (("Digits", True), ("ByteLevel", True)): ("smollm", False, None),
        (("Split", _LLAMA3), ("ByteLevel", False)): ("llama-bpe" if ignores_merges else "dbrx", ignores_merges, None),
        (("Split", _QWEN2), ("ByteLevel", False)): ("qwen2", False, "NFC"),
    }
    name, wants_ignore, allowed = known.get(shape, ("", False, None))
    if not name or ignores_merges != wants_ignore or normalizer not in (None, allowed):
        raise RefusedError(
            "llama.cpp may cut text otherwise than this tokenizer does before it merges; known: GPT-2's, SmolLM's, "
            "Llama 3's and Qwen 2's way",
            hint=_HINT,
        )
    return name


def _step(step: Mapping[str, Any]) -> tuple[str, object]:
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, (step.get("pattern") or {}).get("Regex")
    return kind, None


def _scores(words: tuple[str, ...], kinds: tuple[int, ...], merges: list[list[str]]) -> tuple[float, ...]:
    """Return scores under which llama.cpp, which joins the best-scored word first, joins in the order of the merges.

    Raises:
        RefusedError: a word is never merged into, which llama.cpp would join all the same.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    lonely = [
        word for word, kind in zip(words, kinds, strict=True) if kind == _NORMAL and len(word) > 1 and word not in ranks
    ]
    if lonely:
        raise RefusedError(
            f"the tokenizer never makes its word {ascii(lonely[0])[:60]}, but llama.cpp would", hint=_HINT
        )
    return tuple(-float(ranks.get(word, 0)) for word in words)


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Return whether a SentencePiece-like tokenizer puts a space before each text between special tokens, as llama.cpp can.

    Raises:
        RefusedError: it puts one before the first text only, or spells spaces otherwise.
    """
    normalizer = described["normalizer"] or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    spelled = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    cutter = described["pre_tokenizer"] or {}
    cuts = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if steps == [spelled] and cutter in ({}, cuts):
        return False
    if steps == [{"type": "Prepend", "prepend": "▁"}, spelled] and not cutter:
        return True
    if (
        not normalizer
        and cutter.get("type") == "Metaspace"
        and cutter.get("replacement") == "▁"
        and not cutter["split"]
    ):
        scheme = cutter.get("prepend_scheme")
        if scheme in ("always", "never"):
            return bool(scheme == "always")
    raise RefusedError("llama.cpp would put spaces before words otherwise than this tokenizer does", hint=_HINT)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    try:
        ends = end_of_turn_ids(tokenizer)
    except LossMaskError:
        ends = []
    if ends and ends[0] != tokenizer.eos_token_id:
        ids["eot"] = ends[0]
    return {name: int(number) for name, number in ids.items() if number is not None}


def _adds_bos(tokenizer: Any) -> bool:
    written = template_begins_with_bos(tokenizer)
    if written is not None:
        return written
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
