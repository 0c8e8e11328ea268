"""The text of an answer, whatever the tokens: the tokenizer's own decoding is the oracle."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.serving.text import AnswerText, token_bytes
from tests.tiny import SPECIAL, tiny_tokenizer

TEXTS = ["naïve café — 東京 🙂👩‍👩‍👧 done", "a  b   c\n\n\td", "stop <|im_end|> here", "ends with half: 🙂"]


def _falling_back_to_bytes():
    """A tokenizer as Llama 2's: spaces as ▁, unknown characters as bytes, one space dropped at the beginning."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        *map(chr, range(97, 123)),
        "▁the",
        "▁a",
        "ing",
        "▁▁",
    ]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁", "▁the", "▁a", "b", "é", "🙂", "\ufffd", "▁▁"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": tiny_tokenizer(), "byte fallback": _falling_back_to_bytes(), "metaspace": _metaspace()}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text, stops):
    """The text before the stop string that is complete first, by definition."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def pieces(tokenizer, ids, stops=()):
    text = AnswerText(tokenizer, stops)
    return text, [*(text.feed(token) for token in ids), text.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_joined_are_what_the_tokenizer_decodes(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=40))
    text, given_ = pieces(tokenizer, ids)
    assert "".join(given_) == decoded(tokenizer, ids)
    assert not text.stopped
    assert text.n_given == text.n_decoded == len(decoded(tokenizer, ids))


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_it_ends_before_the_stop_string_that_is_complete_first(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    whole = decoded(tokenizer, ids)
    starts = st.integers(0, max(0, len(whole) - 1))
    inside = st.tuples(starts, st.integers(1, 12)).map(lambda cut: whole[cut[0] : cut[0] + cut[1]]).filter(bool)
    stops = data.draw(
        st.lists(st.one_of(inside, st.text(min_size=1, max_size=3)) if whole else st.just("x"), min_size=1, max_size=4)
    )
    text, given_ = pieces(tokenizer, ids, stops)
    expected, stopped = cut(whole, stops)
    assert "".join(given_) == expected
    assert text.stopped is stopped


@pytest.mark.parametrize("words", TEXTS)
def test_no_piece_holds_half_a_character(words):
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    _, given_ = pieces(tokenizer, ids)
    assert all("\ufffd" not in piece for piece in given_)
    assert "".join(given_) == decoded(tokenizer, ids)


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("turn on the lights", add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer, ["zebra"])
    for n, token in enumerate(ids, start=1):
        text.feed(token)
        assert text.n_given == len(decoded(tokenizer, ids[:n]))


def test_what_may_begin_a_stop_string_is_held_until_it_is_known():
    tokenizer = TOKENIZERS["byte level"]
    text = AnswerText(tokenizer, ["ab!"])
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "xab?ab!"]
    assert [text.feed(token) for token in ids] == ["x", "", "", "ab?", "", "", ""]
    assert text.stopped
    assert text.finish() == ""


def test_a_long_answer_costs_a_little_for_each_token():
    """The decoded window stays short: no token is decoded again and again."""
    tokenizer = TOKENIZERS["byte level"]
    text, generator = AnswerText(tokenizer), random.Random(0)
    longest = 0
    for _ in range(2_000):
        text.feed(generator.randrange(len(SPECIAL), len(tokenizer)))
        longest = max(longest, len(text._window))
    assert longest < 64


@settings(max_examples=100, deadline=None)
@given(words=st.text(max_size=40))
def test_the_bytes_of_the_tokens_joined_are_the_bytes_of_the_text(words):
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == words.encode()
    assert token_bytes(tokenizer, 10**6) == b""
