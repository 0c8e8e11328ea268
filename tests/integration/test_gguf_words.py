"""A tokenizer in a GGUF file: read back it gives the same ids, and llama.cpp's own way of joining does too."""

import itertools
import json

import gguf
import pytest
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lora_tune.adapter.gguf_files import model_to_gguf
from lora_tune.adapter.gguf_words import read_vocabulary
from lora_tune.errors import RefusedError
from lora_tune.model.dense import quiet
from tests.tiny import CHATML, WORDS, tiny_model, tiny_tokenizer


def _fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


TEXTS = [
    "turn on the lights in the kitchen",
    "Hello, wor1d! 12345 it's <|im_start|>user\nhi<|im_end|>\n",
    "naïve — 你好 🙂\t\n\n  x",
]


def test_the_tokenizer_read_back_gives_the_same_ids(tmp_path, tiny_bases):
    path = model_to_gguf(tiny_bases("llama"), tmp_path / "m.gguf", dtype="f16")
    with quiet():
        again = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    own = tiny_tokenizer()
    for text in TEXTS:
        assert again(text)["input_ids"] == own(text)["input_ids"]
    assert again.chat_template == CHATML
    assert (again.bos_token, again.eos_token, again.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
    fields = _fields(path)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    # 400 or so words; the embedding's other rows are filled up
    assert len(fields["tokenizer.ggml.tokens"]) == 512 == len(set(fields["tokenizer.ggml.tokens"]))
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5


def _pieces_tokenizer(*, space_in_front):
    """A SentencePiece-like tokenizer (BPE with byte fallback, as Llama 2, Mistral and Gemma have), built in code."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spelled = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spelled]) if space_in_front else spelled
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(
        [*WORDS * 3, "the cat sat on the mat and that was that, not the other thing"], trainer
    )
    stated = json.loads(tokenizer.to_str())
    stated["added_tokens"] = [token for token in stated["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(stated))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )


def _joined(text, fields):
    """llama.cpp's own way (llama-vocab.cpp, llm_tokenizer_spm): join the two neighbours whose word scores best, leftmost first."""
    words = fields["tokenizer.ggml.tokens"]
    ids = {word: number for number, word in enumerate(words)}
    scores, kinds = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    text = (" " if fields["tokenizer.ggml.add_space_prefix"] else "") + text
    symbols = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[ids[a + b]], n) for n, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not found:
            break
        _, n = min(found)
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    given = []
    for symbol in symbols:
        as_bytes = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        given += [ids[symbol]] if symbol in ids else as_bytes
    assert {kinds[ids["<0x00>"]], kinds[ids["<0xFF>"]]} == {6}
    assert [kinds[n] for n in range(3)] == [2, 3, 3]
    return given


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Return (tokenizer, the fields of a GGUF file with it) for both ways to begin a text."""
    found = []
    for space_in_front in (True, False):
        folder = tmp_path_factory.mktemp("pieces")
        tokenizer = _pieces_tokenizer(space_in_front=space_in_front)
        tiny_model("mistral").save_pretrained(folder / "m")
        tokenizer.save_pretrained(folder / "m")
        path = model_to_gguf(folder / "m", folder / "m.gguf", dtype="f16")
        found.append((tokenizer, _fields(path)))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(st.sampled_from("thea tonsi cm,\n"), min_size=1, max_size=40),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15),
    )
)
def test_scores_make_llama_cpp_join_as_the_merges_do(pieces, text):
    for tokenizer, fields in pieces:
        assert fields["tokenizer.ggml.model"] == "llama"
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            assert _joined(text, fields) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(tmp_path):
    cutters = {
        "words": pre_tokenizers.Whitespace(),
        "a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "another pattern": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]),
    }  # fmt: skip
    for name, cutter in cutters.items():
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = cutter
        with pytest.raises(RefusedError, match="cut text"):
            read_vocabulary(tmp_path / name, tokenizer, rows=512)
    tokenizer = _pieces_tokenizer(space_in_front=True)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    with pytest.raises(RefusedError, match="spaces"):
        read_vocabulary(tmp_path, tokenizer, rows=512)
    with pytest.raises(RefusedError, match="rows"):
        read_vocabulary(tmp_path, tiny_tokenizer(), rows=100)


CUTS = {
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "llama-bpe": ([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], True),
    "dbrx": ([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["dbrx"]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], False),
    "qwen2": ([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], False),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_the_ways_that_families_cut_text_have_their_names(tmp_path, name):
    """The patterns are transformers' own, by llama.cpp's names."""
    cutters, ignores_merges = CUTS[name]
    tokenizer = tiny_tokenizer()
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    stated["model"]["ignore_merges"] = ignores_merges
    backend = Tokenizer.from_str(json.dumps(stated))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    built = hf.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML)
    assert read_vocabulary(tmp_path, built, rows=512).pre == name
