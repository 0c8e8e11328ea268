"""Will an adapter load in another engine, and answer right there? Said from its checked tensors, with the reason.

Every rule was read in the engine's own source, which the finding names; tests/integration/test_engine_validators_slow.py
asks the loaders of vLLM and PEFT themselves. What the door refuses (whole modules, biases, rank patterns) never comes here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lora_tune.adapter.door import AdapterFiles
from lora_tune.errors import UsageError

Engine = Literal["vllm", "sglang", "llamacpp", "peft"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Quantization = Literal["none", "nf4", "int8"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vLLM 0.32, vllm/config/lora.py, MaxLoRARanks)."""
VLLM_DEFAULT_RANK = 16
"""What it is when it is not given."""

_VLLM = "vLLM 0.32, vllm/lora/"
_SGLANG = "SGLang 0.5.23, sglang/srt/lora/"
_LLAMACPP = "llama.cpp, convert_lora_to_gguf.py"
_PEFT = "PEFT 0.21, peft/"
_NAMES: Mapping[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp", "peft": "PEFT"}
_HOLDS: Mapping[Engine, str] = {
    "vllm": "vLLM, vllm/model_executor/model_loader/bitsandbytes_loader.py",
    "sglang": "SGLang, sgl-project/sglang#4431: with bitsandbytes it loads no adapters",
    "llamacpp": "llama.cpp, convert_hf_to_gguf.py",
    "peft": "PEFT 0.21, peft/auto.py",
}
"""Where was read how the engine holds a base."""
_LLAMA_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED_LAYERS = frozenset({"qkv_proj", "gate_up_proj"})
_GPT2_LAYERS = frozenset({"c_attn", "c_fc", "c_proj"})
_VOCABULARY = frozenset({"embed_tokens", "lm_head", "wte", "embed_out"})
_WITHOUT_LORA = frozenset({"gpt2", "gptj", "bloom", "falcon", "stablelm"})
"""Model types whose class in vLLM 0.32 does not say SupportsLoRA (vllm/model_executor/models/)."""
GGUF_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"})
"""Model types of which `lora-tune export --to gguf` writes adapters."""
_MERGE = "merge it into the base and serve that: lora-tune merge NAME OUT"
MERGE_ONTO_TRAINED = "merge it onto the weights it was trained on: lora-tune merge NAME OUT --onto trained"
BY_TRANSFORMERS: Mapping[str, str] = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
}
"""What holds a base as while training, where transformers loads it."""


@dataclass(frozen=True)
class Finding:
    """One thing to know before an adapter goes to an engine."""

    level: Literal["refused", "wrong", "note"]
    """`refused`: it does not load; `wrong`: it loads and answers otherwise than it was trained; `note`: do this."""
    what: str
    why: str
    what_to_do: str
    source: str
    """Where the rule was read: the engine's version and file."""


@dataclass(frozen=True)
class Portability:
    """What an engine makes of an adapter."""

    engine: Engine
    loads: bool
    """Whether it loads at all, when the notes are followed."""
    reasons: tuple[Finding, ...]

    @property
    def verdict(self) -> Literal["loads", "wrong", "refused"]:
        """The worst of the findings; `wrong` is an adapter that loads and answers otherwise than it was trained."""
        levels = {finding.level for finding in self.reasons}
        return "refused" if not self.loads else "wrong" if "wrong" in levels else "loads"

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {"engine": self.engine, "verdict": self.verdict, **asdict(self)}


@dataclass(frozen=True)
class _Traits:
    """What the rules look at."""

    rank: int
    variant: str
    layers: frozenset[str]
    """Last parts of the adapted layers' names."""
    places: dict[str, set[str]]
    """A layer's path without its last part → the last parts that are adapted there."""
    model_type: str | None
    trained_on: Quantization
    """How the base was held while training; `none` too where no passport says it."""


def lint_for(
    adapter: AdapterFiles,
    engine: Engine,
    *,
    max_rank: int | None = None,
    model_type: str | None = None,
    held: Quantization = "none",
) -> Portability:
    """Return whether the engine loads the adapter and answers as it was trained, and if not, why and what to do.

    Args:
        adapter: checked by the door.
        engine: which one.
        max_rank: the `--max-lora-rank` that the server runs with; None: it can still be chosen.
        model_type: the base's `model_type`, when the base is at hand; None tells the family from the layers' names.
        held: how the engine holds the base; `none` is what every engine does unless told otherwise.

    Raises:
        UsageError: there is no such engine, or `max_rank` is no rank (exit 2).
    """
    rules = {"vllm": _for_vllm, "sglang": _for_sglang, "llamacpp": _for_llamacpp, "peft": _for_peft}
    if engine not in rules:
        raise UsageError(f"no engine {engine!r}; known: {', '.join(ENGINES)}", hint="name one of them with --for")
    if max_rank is not None and max_rank < 1:
        raise UsageError(
            f"max_rank is {max_rank}; expected a rank of at least 1", hint="give what the server runs with"
        )
    traits = _traits(adapter, model_type)
    findings = (*rules[engine](traits, max_rank), *_other_base(traits, engine, held))
    return Portability(engine, all(finding.level != "refused" for finding in findings), findings)


def least_vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that takes an adapter of this rank; None when there is none."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def _traits(adapter: AdapterFiles, model_type: str | None) -> _Traits:
    places: dict[str, set[str]] = {}
    for module in adapter.shape.modules:
        parent, _, last = module.rpartition(".")
        places.setdefault(parent, set()).add(last)
    layers = frozenset().union(*places.values())
    trained_on = adapter.manifest.base.quantization if adapter.manifest else "none"
    return _Traits(adapter.shape.rank, adapter.shape.variant, layers, places, model_type, trained_on)


def _other_base(traits: _Traits, engine: Engine, held: Quantization) -> Iterator[Finding]:
    trained_on = traits.trained_on
    if trained_on in ("none", held):
        return
    takes = "takes the base's original weights unless told otherwise" if held == "none" else f"holds the base in {held}"
    ways: dict[Engine, str] = {"peft": f"load the base with quantization_config={BY_TRANSFORMERS[trained_on]}, or "}
    if trained_on == "nf4":
        ways["vllm"] = "start vLLM with --quantization bitsandbytes, which holds the base in nf4, or "
    then = ", and that as GGUF: lora-tune export OUT MODEL.gguf --to gguf" if engine == "llamacpp" else ""
    yield Finding(
        "wrong",
        f"it was trained on a base held in {trained_on}",
        f"{_NAMES[engine]} {takes}; the adapter learnt to correct the rounding of {trained_on}, and answers otherwise there",
        f"{ways.get(engine, '')}{MERGE_ONTO_TRAINED}{then}",
        f"base.quantization in the adapter's passport; {_HOLDS[engine]}",
    )


def _for_vllm(traits: _Traits, max_rank: int | None) -> Iterator[Finding]:
    if traits.variant == "dora":
        yield Finding("refused", "it is a DoRA adapter", "vLLM does not support DoRA",
                      _MERGE, _VLLM + "peft_helper.py, _validate_features")  # fmt: skip
    yield from _vllm_rank(traits.rank, max_rank)
    if max_rank is not None and max_rank not in VLLM_RANKS and traits.rank <= max_rank <= VLLM_RANKS[-1]:
        yield Finding("note", f"vLLM takes no --max-lora-rank {max_rank}", f"it takes {', '.join(map(str, VLLM_RANKS))}",
                      f"start vLLM with --max-lora-rank {least_vllm_rank(max_rank)}", "vLLM 0.32, vllm/config/lora.py, MaxLoRARanks")  # fmt: skip
    family = _family(traits)
    if family in _WITHOUT_LORA:
        yield Finding("refused", f"its base is of the {family} family", "vLLM's class for it does not support LoRA",
                      _MERGE, "vLLM 0.32, vllm/model_executor/models/ (no SupportsLoRA)")  # fmt: skip
    elif family is None:
        yield Finding("note", "its base's family cannot be told from its layers' names",
                      "vLLM loads an adapter whose layers are linear layers of a model class that supports LoRA",
                      "look for the base in vLLM's list of supported models, column LoRA", _VLLM + "utils.py, get_supported_lora_modules")  # fmt: skip
    touched = sorted(traits.layers & _VOCABULARY)
    if touched and family not in _WITHOUT_LORA:
        yield Finding("note", f"it changes {', '.join(touched)}",
                      "only model classes with embedding_modules take that (Llama, Mistral, Qwen3; not Qwen2 or Gemma), and a vocabulary of at most 258048",
                      f"try it, or {_MERGE}", "vLLM 0.32, vllm/model_executor/models/llama.py and vllm/lora/layers/logits_processor.py")  # fmt: skip


def _vllm_rank(rank: int, max_rank: int | None) -> Iterator[Finding]:
    least, source = least_vllm_rank(rank), _VLLM + "peft_helper.py, validate_legal"
    if least is None:
        yield Finding("refused", f"its rank is {rank}", f"vLLM takes ranks up to {VLLM_RANKS[-1]}",
                      f"make it smaller (lora-tune adapters resize NAME --rank {VLLM_RANKS[-1]}), or {_MERGE}", source)  # fmt: skip
    elif max_rank is not None and rank > max_rank:
        yield Finding("refused", f"its rank is {rank}", f"the server takes ranks up to {max_rank}",
                      f"start vLLM with --max-lora-rank {least}, or lora-tune adapters resize NAME --rank {max_rank}", source)  # fmt: skip
    elif max_rank is None and rank > VLLM_DEFAULT_RANK:
        yield Finding("note", f"its rank is {rank}", f"vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless told otherwise",
                      f"start vLLM with --enable-lora --max-lora-rank {least}", source)  # fmt: skip


def _for_sglang(traits: _Traits, max_rank: int | None) -> Iterator[Finding]:
    if traits.variant == "dora":
        yield Finding("refused", "it is a DoRA adapter", "SGLang does not support DoRA",
                      _MERGE, _SGLANG + "lora_manager.py, validate_new_adapter")  # fmt: skip
    if traits.variant == "rslora":
        factor = traits.rank**0.5
        yield Finding("wrong", "it is a rank-stabilised adapter (use_rslora)",
                      f"SGLang does not read use_rslora: it applies the update {factor:.3g} times too weak, without a word",
                      "fold it into plain LoRA first, which is exact: lora-tune export NAME OUT --to peft",
                      _SGLANG + "lora.py, LoRAAdapter.scaling (issue 40835)")  # fmt: skip
    if max_rank is not None and traits.rank > max_rank:
        yield Finding("refused", f"its rank is {traits.rank}", f"the server takes ranks up to {max_rank}",
                      f"start SGLang with --max-lora-rank {traits.rank}, or lora-tune adapters resize NAME --rank {max_rank}",
                      _SGLANG + "mem_pool.py, can_support")  # fmt: skip
    yield from _sglang_stacks(traits)


def _sglang_stacks(traits: _Traits) -> Iterator[Finding]:
    """What SGLang takes for granted when it stacks q, k, v and gate, up into one layer each."""
    source, train = _SGLANG + "lora.py, normalize_qkv_proj and normalize_gate_up_proj", "train it on both, or "
    unknown = sorted(traits.layers - _LLAMA_LAYERS - _FUSED_LAYERS - _VOCABULARY)
    if _family(traits) == "gpt2":
        yield Finding("refused", "its base is of the gpt2 family", "SGLang's class for it does not tell the widths of its layers (get_hidden_dim)",
                      _MERGE, "SGLang 0.5.23, sglang/srt/models/gpt2.py and " + "lora/utils.py, get_default_hidden_dim")  # fmt: skip
    elif unknown:
        yield Finding("note", f"it changes {', '.join(unknown)}",
                      "SGLang knows the widths of such a layer only where the base's class tells them (get_hidden_dim)",
                      f"try it; if it does not start, {_MERGE}", _SGLANG + "utils.py, get_default_hidden_dim")  # fmt: skip
    for has, needs in (({"q_proj"}, "v_proj"), ({"k_proj", "v_proj"}, "q_proj"), ({"up_proj"}, "gate_proj")):
        alone = sorted(set().union(*(found & has for found in traits.places.values() if needs not in found)))
        if alone:
            yield Finding("refused", f"{' and '.join(alone)} changed without {needs}",
                          f"SGLang stacks them with {needs} and stops when it is not there", train + _MERGE, source)  # fmt: skip


def _for_llamacpp(traits: _Traits, _: int | None) -> Iterator[Finding]:
    way_out = "merge it into the base (lora-tune merge NAME OUT) and convert that to GGUF"
    if traits.variant == "dora":
        yield Finding("refused", "it is a DoRA adapter", "a GGUF adapter holds A and B only; the magnitudes would be lost",
                      way_out, _LLAMACPP)  # fmt: skip
    family = _family(traits)
    outside = sorted(traits.layers - _LLAMA_LAYERS)
    if outside or family not in GGUF_FAMILIES | {"llama-like"}:
        yield Finding("refused", f"it changes {', '.join(outside) or f'a base of the {family} family'}",
                      "GGUF adapters are written for Llama, Mistral, Qwen and Gemma: "
                      f"their layers are {', '.join(sorted(_LLAMA_LAYERS))}", way_out, _LLAMACPP)  # fmt: skip
    elif traits.variant != "dora":
        folded = " with its scale folded in, as the converter of llama.cpp itself does not" if traits.variant == "rslora" else ""  # fmt: skip
        yield Finding("note", "it is in PEFT's format", "llama.cpp reads GGUF",
                      f"lora-tune export NAME OUT --to gguf writes it{folded}; then llama-server -m BASE.gguf --lora OUT", _LLAMACPP)  # fmt: skip


def _for_peft(traits: _Traits, _: int | None) -> Iterator[Finding]:
    yield Finding("note", "its config may name settings newer than the PEFT at hand", "PEFT before 0.14 stops at a setting that it does not know; later ones pass over it",
                  "use PEFT 0.14 or later; for an older one, lora-tune export NAME OUT --to peft", _PEFT + "config.py, from_peft_type (huggingface/peft#2038)")  # fmt: skip


def _family(traits: _Traits) -> str | None:
    """Return the base's model type; from the layers' names only `llama-like` or `gpt2`; None when they do not tell."""
    if traits.model_type is not None:
        return traits.model_type
    inner = traits.layers - _VOCABULARY
    if inner and inner <= _LLAMA_LAYERS | _FUSED_LAYERS:
        return "llama-like"
    is_gpt2 = any(".h." in f".{parent}." for parent in traits.places)
    return "gpt2" if inner and inner <= _GPT2_LAYERS and is_gpt2 else None
