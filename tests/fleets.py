"""What tests of the fleet share: a base of bare files, adapters that differ by one number, and passports that fit them."""

import json
import struct
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.shelf import content_digest
from lora_tune.model.dense import BaseFiles
from lora_tune.model.fingerprint import file_digest, fingerprint, tokenizer_digest, tokenizer_files
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import ServedBase
from lora_tune.serving.swap import Fleet
from tests.hostile import BASE as BASE_SHAPES
from tests.hostile import fitting
from tests.scripted_engine import ScriptedEngine, recorded_probe
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import PASSPORT

WEIGHTS_DIGEST = "ba5e" * 16


def bare_base(folder: Path, *, name: str = "tiny-base") -> ServedBase:
    """Return a base of config and weights only, in the tiny Llama's shapes: no torch, no tokenizer, no model."""
    folder.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for tensor, (rows, columns) in (BASE_SHAPES | {"model.embed_tokens.weight": (512, 64)}).items():
        header[tensor] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [end, end + 4 * rows * columns]}
        end += 4 * rows * columns
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512}))
    return served(folder, name=name)


def served(folder: Path, *, name: str = "tiny-base", tokenizer: object = None) -> ServedBase:
    """Return a base's folder as a server's base."""
    section = BaseSection(name=str(folder))
    return ServedBase(name, section, BaseFiles(str(folder), None, folder), tokenizer, (2,), 512, WEIGHTS_DIGEST)


def adapter(folder: Path, number: int) -> Path:
    """Write an adapter of the tiny Llama without a passport; another number is another content."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write(folder, {"lora_alpha": number}, fitting())


def with_passport(folder: Path, base: Path, *, probes: int = 2, content: str | None = None) -> Path:
    """Write the passport of an adapter on a tiny base, as if the scripted engine had trained it.

    Args:
        folder: the adapter.
        base: the tiny base, with its tokenizer.
        probes: how many.
        content: which adapter's answers its probes record; None is its own.
    """
    files = open_adapter(folder)
    digest = content_digest(files) if content is None else content
    passport = deepcopy(PASSPORT)
    passport |= {
        "weights_digest": file_digest(folder / WEIGHTS),
        "config_digest": file_digest(folder / CONFIG),
        "probes": [
            recorded_probe(digest, range(5, 15 + n), f"prompt {n}").model_dump(mode="json") for n in range(probes)
        ],
    }
    n_parameters = sum(info.shape[0] * info.shape[1] for info in files.tensors.values())
    passport["lora"] |= {"alpha": files.shape.alpha, "scaling": files.shape.scaling, "n_parameters": n_parameters}
    passport["base"] |= fingerprint(base).as_dict()
    passport["tokenizer"] |= _tokenizer_facts(base)
    (folder / FILE_NAME).write_text(json.dumps(passport))
    return folder


@cache
def _tokenizer_facts(base: Path) -> dict[str, str]:
    from lora_tune.model.load import load_tokenizer

    template = load_tokenizer(BaseFiles(str(base), None, base), template_text=None).chat_template
    return tokenizer_digest(tokenizer_files(base), chat_template=template)


def fill_registry(root: Path, work: Path, versions: dict[str, int]) -> None:
    """Add versions 1 to n of each name, no two with the same content."""
    number = 0
    for name, count in versions.items():
        for _ in range(count):
            number += 1
            registry.add(adapter(work / f"source-{number}", number), name, root=root)


@contextmanager
def opened(base: ServedBase, root: Path, state: Path | None = None, *, restore: bool = True, **engine):
    """Give a fleet on a scripted engine; both end with the block, and the engine must have nothing to complain of."""
    scripted = ScriptedEngine(**engine)
    fleet = Fleet(scripted, base, registry=root, state=state or root.parent / "state" / "server.jsonl")
    try:
        if restore:
            fleet.restore()
        yield fleet
        assert scripted.violations == []
    finally:
        fleet.close()
        scripted.close()
