"""The model card: `README.md` beside an adapter, written from its passport, or from its tensors when it has none.

Names, recipes and figures may be a stranger's words: each is escaped for the place it stands in.
"""

import json
import shlex
import string
from collections.abc import Iterable, Mapping
from typing import Any

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest
from lora_tune.adapter.portability import least_vllm_rank

_HERE = "THIS_FOLDER"
_BASE_HERE = "FOLDER OF THE BASE"
_VARIANTS = {"lora": "LoRA", "rslora": "rank-stabilised LoRA", "dora": "DoRA"}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_MARKDOWN = frozenset("\\`*_[]<>|&~$@#")
_MAX_SHOWN_CHARS = 2_000
_RECIPE_KEYS = {
    "data": ("train_on", "max_seq_tokens", "too_long"),
    "lora": ("rank", "alpha", "dropout", "targets", "variant"),
    "train": ("method", "epochs", "max_steps", "learning_rate", "schedule", "warmup_ratio", "weight_decay",
              "micro_batch_sequences", "gradient_accumulation_steps", "batching", "seed"),
}  # fmt: skip
"""What the card repeats of a recipe; the whole of it is in the passport."""


def model_card(manifest: AdapterManifest, *, repo: str | None = None) -> str:
    """Return the card of an adapter with a passport.

    Args:
        manifest: the passport.
        repo: the hub repository that it is pushed to; None for a folder on this machine.
    """
    lora, base = manifest.lora, manifest.base
    kind = _VARIANTS[lora.variant]
    return "\n".join([
        front_matter(_hub_base(manifest), _tags(lora.variant, base.quantization)),
        f"# {plain(manifest.name)}",
        "",
        f"A {kind} adapter (rank {lora.rank}, alpha {lora.alpha:g}, {lora.n_parameters:,} numbers) for "
        f"{code(base.name)}{f' at {code(base.revision)}' if base.revision else ''}, {_deed(manifest)} with lora_tune {plain(manifest.versions.get('lora_tune', 'of an unknown version'))}.",
        "",
        *_figures(manifest.figures),
        *_origin(manifest),
        *_use(manifest, repo),
        *_limits(manifest),
    ])  # fmt: skip


def unverified_card(adapter: AdapterFiles, *, name: str, repo: str | None = None) -> str:
    """Return the card of an adapter without a passport: only what its own tensors say.

    Args:
        adapter: checked by the door.
        name: what to call it.
        repo: the hub repository that it is pushed to; None for a folder on this machine.
    """
    shape, place = adapter.shape, repo or _HERE
    base = adapter.base_name
    return "\n".join([
        front_matter(hub_id(base), _tags(shape.variant, "none")),
        f"# {plain(name)}",
        "",
        f"A {_VARIANTS[shape.variant]} adapter (rank {shape.rank}, alpha {shape.alpha:g}) for "
        f"{code(base) if base else 'a base that it does not name'}.",
        "",
        "It was made elsewhere and has no passport: which data, recipe and base it comes from is **unverified**. "
        "Its files were checked for structure only.",
        "",
        *_table(("", ""), [("layers", ", ".join(map(code, shape.targets))), ("sha256 of the weights", code(adapter.weights_digest)),
                           ("sha256 of the config", code(adapter.config_digest))]),
        "## Use it",
        "",
        *_fence("python", _peft_lines(base if hub_id(base) else _BASE_HERE, place)),
    ])  # fmt: skip


def front_matter(base_model: str | None, tags: Iterable[str]) -> str:
    """Return a card's YAML head, which names the base when the hub knows it; the licence is left to the user."""
    named = [f"base_model: {yaml_text(base_model)}", "base_model_relation: adapter"] if base_model else []
    lines = ["---", *named, "library_name: peft", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {yaml_text(tag)}" for tag in tags), "---", ""])


def hub_id(name: str) -> str | None:
    """Return the name if it is written as a hub's `owner/name`, else None."""
    owner, slash, rest = name.partition("/")
    allowed = set(string.ascii_letters + string.digits + "-_.")
    fits = bool(slash) and all(part and set(part) <= allowed and part[0] not in "-." for part in (owner, rest))
    return name if fits and len(name) <= 96 and not name.endswith(".gguf") else None


def yaml_text(words: str) -> str:
    """Return the words as one double-quoted YAML 1.2 scalar, whatever they are (YAML 1.2.2, section 7.3.1)."""
    kept = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in words)
    return f'"{"".join(kept)}"'


def plain(words: str) -> str:
    """Return the words as text of one Markdown line that is nothing but text: no markup, link, HTML or table cell."""
    escaped = "".join(f"\\{c}" if c in _MARKDOWN else c for c in _one_line(words))
    # What GFM makes a link without any bracket: `https://…`, `www.…`.
    escaped = escaped.replace("://", ":\\//").replace("www.", "www\\.")
    # A line that begins so is a heading, list or rule, or code; the words may stand first in theirs.
    if escaped.startswith(" "):
        return f"&#32;{escaped[1:]}"
    return f"\\{escaped}" if escaped[:1] in "-+=!>" and escaped else escaped


def code(words: str) -> str:
    """Return the words as one Markdown code span, in which nothing is markup; also within a table."""
    shown = _one_line(words).replace("|", "\\|")
    ticks = "`" * (_longest_run(shown, "`") + 1)
    pad = " " if shown[:1] in "` " or shown[-1:] in "` " else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}" if shown else "` `"


def _one_line(words: str) -> str:
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in words[:_MAX_SHOWN_CHARS])


def _longest_run(words: str, of: str) -> int:
    longest = run = 0
    for c in words:
        run = run + 1 if c == of else 0
        longest = max(longest, run)
    return longest


def _quoted(words: str) -> str:
    """The words as a Python literal; they hold no control characters."""
    return json.dumps(words, ensure_ascii=False)


def _block(words: str) -> list[str]:
    """The words as lines of a fenced block that they cannot end."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in words[:_MAX_SHOWN_CHARS])
    fence = "`" * max(3, _longest_run(shown, "`") + 1)
    cut = ["", f"… and so on: the whole of it is in `{FILE_NAME}`."] if len(words) > _MAX_SHOWN_CHARS else []
    return [fence, *shown.split("\n"), fence, *cut, ""]


def _fence(language: str, lines: Iterable[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body, ""] if body else []


def _deed(manifest: AdapterManifest) -> str:
    made = manifest.made_from
    if made is None:
        return "trained"
    parents = (f"{one.weight:g} × {code(one.name)} ({one.digest[:12]})" for one in made.parents)
    return f"made by {made.method} from {', '.join(parents)}"


def _hub_base(manifest: AdapterManifest) -> str | None:
    return manifest.base.name if manifest.base.revision else None


def _tags(variant: str, quantization: str) -> list[str]:
    qlora = ["qlora"] if quantization == "nf4" else []
    return ["lora", *([variant] if variant != "lora" else []), *qlora, "lora_tune"]


def _figures(figures: Mapping[str, float]) -> list[str]:
    """What was measured, the base beside the adapter where both were."""
    if not figures:
        return ["Nothing was measured on held-out rows.", ""]
    rows = []
    for name, value in sorted(figures.items()):
        if name.startswith("base_") and name.removeprefix("base_") in figures:
            continue
        beside = figures.get(f"base_{name}")
        rows.append((plain(name.replace("_", " ")), "" if beside is None else f"{beside:.4g}", f"{value:.4g}"))
    return ["## Figures", "", *_table(("measured", "base alone", "with the adapter"), rows)]


def _origin(manifest: AdapterManifest) -> list[str]:
    base, data = manifest.base, manifest.data
    held = "full precision" if base.quantization == "none" else base.quantization
    system = data.system_message
    facts = [
        ("base", f"{code(base.name)}, held in {held}, computed in {base.dtype}"),
        ("layers", ", ".join(map(code, manifest.lora.targets))),
        ("data", f"{data.rows:,} rows, {data.tokens:,} tokens, {data.trained_tokens:,} of them trained ({plain(data.train_on)})"),
        ("recipe", _short_recipe(manifest.recipe)),
    ]  # fmt: skip
    digests = [
        ("weights", manifest.weights_digest), ("config", manifest.config_digest), ("base's weights", base.weights),
        ("base's config", base.config), ("tokenizer", manifest.tokenizer.tokenizer),
        ("chat template", manifest.tokenizer.chat_template), ("data", data.digest), ("recipe", manifest.recipe_digest),
    ]  # fmt: skip
    versions = ", ".join(f"{plain(name)} {plain(number)}" for name, number in sorted(manifest.versions.items()))
    return [
        "## Where it comes from", "",
        *_table(("", ""), facts),
        *(["Every row had this system message; without it, answers differ:", "", *_block(system)] if system else []),
        *_table(("sha256 of", ""), [(name, code(digest)) for name, digest in digests]),
        *([f"Versions: {versions}.", ""] if versions else []),
        f"The data is not here. `{FILE_NAME}` beside this file is the adapter's passport: the resolved recipe, these digests, "
        "and golden probes, with which anyone can check that the adapter behaves as when it was made.", "",
    ]  # fmt: skip


def _short_recipe(recipe: Mapping[str, Any]) -> str:
    """Return the settings of a recipe that decide most, each as a word of code."""
    shown = []
    for section, keys in _RECIPE_KEYS.items():
        said = recipe.get(section)
        values: dict[str, Any] = said if isinstance(said, dict) else {}
        for key in keys:
            value = values.get(key)
            if value not in (None, "", []):
                words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                shown.append(code(f"{section}.{key}: {words}"))
    return "; ".join(shown) or "in the passport"


def _use(manifest: AdapterManifest, repo: str | None) -> list[str]:
    folder = f"./{repo.rpartition('/')[2]}" if repo else _HERE
    base = f" --base {shlex.quote(manifest.base.name)}" if _hub_base(manifest) else ""
    fetch = [f"hf download {shlex.quote(repo)} --local-dir {shlex.quote(folder)}"] if repo else []
    return [
        "## Use it", "",
        "With lora_tune, which compares base, tokenizer and template with the passport first:", "",
        *_fence("sh", [*fetch, f"lora-tune adapters verify {shlex.quote(folder)}{base}", f"lora-tune chat {shlex.quote(folder)}{base}"]),
        "With PEFT:", "",
        *_fence("python", _python(manifest, repo or _HERE)),
        *([f"`AutoPeftModelForCausalLM.from_pretrained(\"{repo or _HERE}\")` is shorter, and takes the newest commit of the base "
           "instead of the one it was trained on.", ""] if _hub_base(manifest) else []),
        *_vllm(manifest, repo or _HERE),
    ]  # fmt: skip


def _python(manifest: AdapterManifest, place: str) -> list[str]:
    """The lines that load and ask it with PEFT alone."""
    base, own, system = manifest.base, manifest.tokenizer.own_template, manifest.data.system_message
    name = base.name if base.revision else _BASE_HERE
    revision = f", revision={_quoted(base.revision)}" if base.revision else ""
    quantized = base.quantization != "none"
    passport = bool(own) or bool(system)
    return [
        *(["import json", "from pathlib import Path", ""] if passport else []),
        *(["from huggingface_hub import hf_hub_download"] if passport and place != _HERE else []),
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantized else ''}",
        "",
        *_peft_body(base.quantization, base.dtype, name, revision, place),
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)}{revision})",
        *([_passport_line(place)] if passport else []),
        *(['tokenizer.chat_template = passport["tokenizer"]["own_template"]'] if own else []),
        'messages = [{"role": "user", "content": "Hello!"}]',
        *(['messages.insert(0, {"role": "system", "content": passport["data"]["system_message"]})'] if system else []),
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _peft_body(quantization: str, dtype: str, name: str, revision: str, place: str) -> list[str]:
    compute = _TORCH_NAMES[dtype]
    held = {
        "none": "",
        "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        "nf4": ", quantization_config=held",
    }[quantization]
    nf4 = (
        'held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        f'bnb_4bit_compute_dtype="{compute}")'
    )
    loaded = f"AutoModelForCausalLM.from_pretrained({_quoted(name)}{revision}, dtype={_quoted(compute)}{held})"
    if not revision:
        return [
            *([nf4] if quantization == "nf4" else []),
            f"model = PeftModel.from_pretrained({loaded}, {_quoted(place)})",
        ]
    return [
        *([nf4] if quantization == "nf4" else []),
        f"base = {loaded}",
        f"model = PeftModel.from_pretrained(base, {_quoted(place)})",
    ]


def _passport_line(place: str) -> str:
    path = (
        f'Path({_quoted(place)}, "{FILE_NAME}")'
        if place == _HERE
        else f'Path(hf_hub_download({_quoted(place)}, "{FILE_NAME}"))'
    )
    return f'passport = json.loads({path}.read_text(encoding="utf-8"))'


def _peft_lines(base: str, place: str) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({_quoted(base)}), {_quoted(place)})",
    ]


def _vllm(manifest: AdapterManifest, place: str) -> list[str]:
    base, lora = manifest.base, manifest.lora
    rank = least_vllm_rank(lora.rank)
    if lora.variant == "dora" or rank is None or base.quantization == "int8":
        why = (
            "DoRA"
            if lora.variant == "dora"
            else f"rank {lora.rank}"
            if rank is None
            else "a base in bitsandbytes' int8"
        )
        merge = [f"lora-tune merge {shlex.quote(place)} MERGED", "vllm serve MERGED"]
        return [f"vLLM does not load {why}; merge it into the base first:", "", *_fence("sh", merge)]
    name = base.name if base.revision else _BASE_HERE
    revision = f" --revision {base.revision}" if base.revision else ""
    allowed = set(string.ascii_letters + string.digits + "-_.")
    called = "".join(c if c in allowed else "-" for c in manifest.name[:64]) or "adapter"
    own = manifest.tokenizer.own_template is not None
    template = " --chat-template template.jinja" if own else ""
    notes = [
        *([f"Its chat template is its own, not the base's: save `tokenizer.own_template` of `{FILE_NAME}` as `template.jinja`."] if own else []),
        *(["Send its system message with every request: it was never trained without it."] if manifest.data.system_message else []),
    ]  # fmt: skip
    held = " --quantization bitsandbytes" if base.quantization == "nf4" else ""
    if held:
        notes.append(
            "It was trained on the nf4 base, which `--quantization bitsandbytes` holds; without it, it answers otherwise than it was trained."
        )
    command = (
        f"vllm serve {shlex.quote(name)}{revision}{held} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(f'{called}={place}')}{template}"
    )
    return ["With vLLM:", "", *_fence("sh", [command]), *([" ".join(notes), ""] if notes else [])]


def _limits(manifest: AdapterManifest) -> list[str]:
    measured = "on the held-out rows of one data set" if manifest.figures else "on nothing"
    return [
        "## Limits", "",
        f"- It was measured {measured}: nothing is known of other tasks, languages or prompts, and nothing of its safety.",
        "- It changes the base that it was trained on, with that tokenizer and chat template. With others it may still load, "
        "and answer wrongly.",
        "- It knows and may say what the base knows and may say; the base's licence and limits hold for it too.",
        "",
    ]  # fmt: skip
