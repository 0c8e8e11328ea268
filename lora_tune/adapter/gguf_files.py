"""GGUF, llama.cpp's format: an adapter's file, and a whole (merged) model's. What a tokenizer becomes: gguf_words.py.

A family is written only where reading the file back gives the model that was written; everything else is refused.
Source: llama.cpp's convert_lora_to_gguf.py and conversion/{llama,qwen,gemma}.py; names from the `gguf` package.
"""

import errno
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_tune.adapter.convert import AdapterOnBase, GgufDtype, Matrix, as_float32
from lora_tune.adapter.gguf_words import add_vocabulary, read_vocabulary
from lora_tune.errors import CannotCreateError, DataError, MissingInputError, RefusedError, UsageError
from lora_tune.model.dense import quiet
from lora_tune.model.fingerprint import TensorInfo, read_header, weight_files
from lora_tune.model.resolve import refuse_unfit
from lora_tune.staging import translated

_OWN_SCRIPT = "convert it with llama.cpp's own convert_hf_to_gguf.py"
_FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32
"""Values that share a scale in q8_0; 34 bytes hold them."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of one of transformers' model types."""

    architecture: str
    """Its name there."""
    rotated: bool
    """Rows of q and k are kept in pairs (2i, 2i + 1) that turn together; transformers keeps them in halves."""
    activation: str
    """The only one that it computes."""
    norm_offset: float
    """Added to every norm's weight, which the model's own code adds when it runs."""
    whole_models: bool
    """Whether a whole model's file is proved here."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", True, "silu", 0.0, True),
    "mistral": Family("llama", True, "silu", 0.0, True),
    "qwen2": Family("qwen2", False, "silu", 0.0, True),
    "qwen3": Family("qwen3", False, "silu", 0.0, True),
    "gemma": Family("gemma", False, "gelu_pytorch_tanh", 1.0, False),
    "gemma2": Family("gemma2", False, "gelu_pytorch_tanh", 1.0, True),
    "gemma3_text": Family("gemma3", False, "gelu_pytorch_tanh", 1.0, False),
}


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    """gguf.GGMLQuantizationType."""
    n_bytes: int
    source: tuple[Path, TensorInfo] | Matrix
    heads: int
    """Heads whose rows are brought into llama.cpp's order; 0 leaves them."""
    offset: float


def write_adapter_gguf(on_base: AdapterOnBase, path: Path) -> None:
    """Write the adapter as one GGUF file, in fp32, for `llama-cli --lora` or an Ollama Modelfile's ADAPTER.

    llama.cpp adds alpha / rank · B · A to the weight of the same name, so rsLoRA's √rank goes into alpha, and rows of B
    are put into the order of the weight's rows.

    Raises:
        RefusedError: llama.cpp's file of this base has no such layers, or holds them otherwise (exit 77).
    """
    import gguf

    config, adapter = _full_config(on_base.base.folder), on_base.files
    family = _family(config)
    names = _names(family, config)
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.shape.scaling * adapter.shape.rank)
    writer.add_name(adapter.manifest.name if adapter.manifest else "adapter")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for pair in on_base.pairs:
        name = names.get_name(pair.module)
        if name is None:
            raise RefusedError(
                f"{pair.module} has no counterpart in llama.cpp's {family.architecture}",
                hint=f"merge it into its base (lora-tune merge ADAPTER OUT) and {_OWN_SCRIPT}",
            )
        b = in_pairs(pair.b, _rotated_heads(family, config, pair.module))
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(pair.a))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(b))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def model_to_gguf(folder: Path, out: Path, *, dtype: GgufDtype, tokenizer: Any = None) -> Path:
    """Write a whole model (a folder that transformers loads, merged or not) as one GGUF file and return its path.

    Tensors are read, turned and written one by one; the file appears whole or not at all.

    Args:
        folder: config, tokenizer and safetensors.
        out: the file to write; it is never overwritten.
        dtype: of the matrices; a matrix whose rows do not divide into q8_0's blocks of 32 is held in f16.
        tokenizer: whose words and chat template are written; None reads the folder's.

    Raises:
        RefusedError: a model or tokenizer that llama.cpp would not run as transformers does (exit 77).
        DataError: a value does not fit into `dtype` (exit 65).
        MissingInputError: the folder is not a whole model (exit 66).
        UsageError: an unknown `dtype` (exit 2).
        CannotCreateError, CannotWriteError: `out` exists, or the disk is full (exit 73, 74).
    """
    import gguf

    if dtype not in _FILE_TYPES:
        raise UsageError(f"--dtype is {dtype!r}; known: {', '.join(_FILE_TYPES)}")
    refuse_unfit(folder)
    config = _full_config(folder)
    family = _family(config)
    _refuse_unproven(family, config)
    pieces = _pieces(folder, family, config, dtype)
    words = read_vocabulary(folder, tokenizer, rows=config["vocab_size"])
    with _staged_file(out) as stage:
        writer = gguf.GGUFWriter(stage, family.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(folder.name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, family, config)
        add_vocabulary(writer, words)
        for piece in pieces:
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.n_bytes, raw_dtype=piece.kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for piece in pieces:
                writer.write_tensor_data(_values(piece))
        finally:
            writer.close()
    return out


def window_note(folder: Path) -> str | None:
    """Return what a model's file leaves out of its context, in words; None when that is nothing."""
    config = _full_config(folder)
    context = config.get("max_position_embeddings")
    if context is None or _context(config) == context:
        return None
    return (
        f"its context is {_context(config)} tokens instead of {context}: beyond that the model sees a window only, "
        "which llama.cpp does not compute for it"
    )


def held_dtype(folder: Path) -> GgufDtype:
    """Return bf16 where every tensor of the model is held so, which then loses nothing, and f16 otherwise."""
    held = {info.dtype for path in weight_files(folder) for info in read_header(path).values()}
    return "bf16" if held == {"BF16"} else "f16"


def in_pairs(rows: Matrix, heads: int) -> Matrix:
    """Return rows of q or k in llama.cpp's order: transformers turns row i with row i + D/2 of a head, it turns 2i with 2i + 1.

    Args:
        rows: [heads · D, …].
        heads: how many; 0 gives the rows as they are.
    """
    if heads == 0:
        return rows
    halves: Matrix = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_rope_factors(rope: Mapping[str, Any], head_dim: int) -> Matrix:
    """Return what Llama 3.1's scaling divides each rotary frequency by, [head_dim / 2].

    Source: transformers 5.23, modeling_rope_utils._compute_llama3_parameters.
    """
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    trained, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: Matrix = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _family(config: Mapping[str, Any]) -> Family:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise RefusedError(
            f"bases of type {kind} are not written as GGUF; known: {', '.join(FAMILIES)}",
            hint=f"merge the adapter into its base (lora-tune merge ADAPTER OUT) and {_OWN_SCRIPT}",
        )
    return FAMILIES[kind]


def _names(family: Family, config: Mapping[str, Any]) -> Any:
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])


def _rotated_heads(family: Family, config: Mapping[str, Any], name: str) -> int:
    if not family.rotated or not name.endswith((".q_proj", ".k_proj")):
        return 0
    heads = config["num_attention_heads"]
    return int(heads if name.endswith(".q_proj") else config.get("num_key_value_heads") or heads)


def _full_config(folder: Path) -> dict[str, Any]:
    """Return the config with every default that the file leaves out."""
    from transformers import AutoConfig

    try:
        with quiet():
            values: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise MissingInputError(
            f"{folder} has no config that transformers knows: {str(err)[:200]}", where=str(folder)
        ) from err
    return values


def _refuse_unproven(family: Family, config: Mapping[str, Any]) -> None:
    """Refuse what this family's file cannot say, or llama.cpp computes otherwise."""
    rope = config.get("rope_parameters") or {}
    kinds = ("default", "llama3") if family.architecture == "llama" else ("default",)
    objections = {
        f"a whole {family.architecture} model cannot be read back to prove it": not family.whole_models,
        "its attention has biases": family.architecture != "qwen2" and bool(config.get("attention_bias")),
        "its MLP has biases": bool(config.get("mlp_bias")),
        f"its activation is not {family.activation}": (config.get("hidden_activation") or config.get("hidden_act"))
        != family.activation,
        f"its rotary positions are scaled ({rope.get('rope_type')})": rope.get("rope_type", "default") not in kinds,
        "only a part of each head is rotated": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "some of its layers see a window only": family.architecture.startswith("qwen")
        and bool(config.get("use_sliding_window")),
        "it attends to later tokens": bool(config.get("use_bidirectional_attention")),
    }
    if family.architecture == "gemma2":
        window = [i % 2 == 0 for i in range(config["num_hidden_layers"])]
        objections |= {
            "its attention is scaled by something else than its head size": config["query_pre_attn_scalar"]
            != config["head_dim"],
            "its layers do not take turns between window and full attention": window
            != [kind == "sliding_attention" for kind in config["layer_types"]],
            "it caps no logits": not (config["attn_logit_softcapping"] and config["final_logit_softcapping"]),
        }
    found = next((reason for reason, holds in objections.items() if holds), None)
    if found is not None:
        raise RefusedError(f"this {config['model_type']} model is not written as GGUF: {found}", hint=_OWN_SCRIPT)


def _add_shape(writer: Any, family: Family, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])


def _context(config: Mapping[str, Any]) -> int:
    context: int = config["max_position_embeddings"]
    if config["model_type"] == "mistral" and config.get("sliding_window"):
        # llama.cpp's Llama has no window: inside one, it computes the same.
        context = min(context, config["sliding_window"])
    return context


def _pieces(folder: Path, family: Family, config: Mapping[str, Any], dtype: GgufDtype) -> list[_Piece]:
    import gguf

    names = _names(family, config)
    pieces = []
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        factors = llama3_rope_factors(rope, head_dim)
        pieces.append(
            _Piece("rope_freqs.weight", factors.shape, gguf.GGMLQuantizationType.F32, factors.nbytes, factors, 0, 0.0)
        )
    for path in weight_files(folder):
        for tensor, info in read_header(path).items():
            if tensor.endswith("rotary_emb.inv_freq") or (tensor == "lm_head.weight" and config["tie_word_embeddings"]):
                continue
            name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise RefusedError(
                    f"{tensor} has no counterpart in llama.cpp's {family.architecture}", hint=_OWN_SCRIPT
                )
            kind, n_bytes = _held_as(info.shape, dtype)
            heads = _rotated_heads(family, config, tensor.removesuffix(".weight").removesuffix(".bias"))
            offset = family.norm_offset if tensor.endswith("norm.weight") else 0.0
            pieces.append(_Piece(name, info.shape, kind, n_bytes, (path, info), heads, offset))
    return pieces


def _held_as(shape: tuple[int, ...], dtype: GgufDtype) -> tuple[Any, int]:
    """Return gguf's type and the bytes of a tensor: vectors are fp32, and q8_0 wants rows of whole blocks."""
    from gguf import GGMLQuantizationType as Kind

    count = math.prod(shape)
    if len(shape) == 1:
        return Kind.F32, 4 * count
    if dtype == "q8_0" and shape[-1] % _Q8_BLOCK == 0:
        return Kind.Q8_0, count // _Q8_BLOCK * 34
    return (Kind.BF16 if dtype == "bf16" else Kind.F16), 2 * count


def _values(piece: _Piece) -> Any:
    """Return the bytes of one tensor as they stand in the file."""
    from gguf import quantize

    if isinstance(piece.source, tuple):
        path, info = piece.source
        with path.open("rb") as stream:
            stream.seek(info.start)
            content = stream.read(info.end - info.start)
        values = as_float32(content, TensorInfo(info.dtype, info.shape, 0, len(content)))
    else:
        values = piece.source
    values = np.ascontiguousarray(in_pairs(values, piece.heads) + np.float32(piece.offset))
    with np.errstate(over="ignore"):
        written = quantize(values, piece.kind)
    if written.dtype == np.float16 and not bool(np.isfinite(written).all()):
        raise DataError(f"{piece.name} holds values that f16 does not reach", hint="write it in bf16")
    return written


@contextmanager
def _staged_file(final: Path) -> Iterator[Path]:
    """Give a path beside `final` that becomes it when the block ends, and vanishes when the block fails."""
    if final.exists():
        raise CannotCreateError(f"{final} exists already and is never overwritten", hint="give another name")
    stage: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name}-", dir=final.parent)
        os.close(descriptor)
        stage = Path(name)
        yield stage
        with stage.open("rb") as stream:
            os.fsync(stream.fileno())
        stage.chmod(0o644)
        _put_in_place(stage, final)
    except OSError as err:
        raise translated(err, final) from err
    finally:
        if stage is not None:
            with suppress(OSError):
                stage.unlink(missing_ok=True)


def _put_in_place(stage: Path, final: Path) -> None:
    try:
        os.link(stage, final)  # unlike a rename, it replaces nothing
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        stage.rename(final)
