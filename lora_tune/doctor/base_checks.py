"""A base that the user names: can its files be read, and does its chat template let the right words be trained.

Nothing is fetched or converted; what is not on this machine is left out and said.
"""

from lora_tune.doctor.finding import Finding
from lora_tune.doctor.mask_checks import base_template
from lora_tune.errors import LoraTuneError
from lora_tune.model.dense import BaseFiles
from lora_tune.model.fingerprint import fingerprint, read_shapes, tokenizer_digest, tokenizer_files, weight_files
from lora_tune.model.load import load_tokenizer, read_template
from lora_tune.model.resolve import locate
from lora_tune.recipe.schema import BaseSection, DataSection

FILES, TEMPLATE = "base's files", "base's chat template"
MAX_HASHED_BYTES = 4 * 1024**3
"""Past this the weights' digest is left to training: it would take longer than everything else."""


def examine_base(base: BaseSection, data: DataSection | None) -> list[Finding]:
    """Return what is found about a base: its files, then its chat template, or the one that the recipe puts in its place.

    Args:
        base: the base.
        data: the recipe's; None for a base without a recipe.
    """
    try:
        located = locate(base)
        if not located.present:
            told = f"{base.name} is not on this machine yet, and the doctor fetches nothing"
            hint = "`lora-tune train RECIPE --dry-run` fetches it; then run this again"
            return [Finding(name, "skipped", told, hint=hint) for name in (FILES, TEMPLATE)]
        files = BaseFiles(base.name, None, located.path)
        found = [_files(files)]
        named = data.chat_template if data else None
        tokenizer = load_tokenizer(files, template_text=None if named is None else read_template(named))
        tokenizer_digest(tokenizer_files(files.folder), chat_template=tokenizer.chat_template)
    except LoraTuneError as err:
        return [Finding(FILES, "failed", err.message, hint=err.hint)]
    return [*found, base_template(tokenizer, train_on=data.train_on if data else "assistant")]


def _files(files: BaseFiles) -> Finding:
    n_bytes = sum(path.stat().st_size for path in weight_files(files.folder))
    n_tensors = len(read_shapes(files.folder))
    told = f"{files.name}: {n_tensors} tensors, {n_bytes / 2**30:.2f} GiB; their headers are whole"
    if n_bytes <= MAX_HASHED_BYTES:
        told += f", fingerprint {fingerprint(files.folder).weights[:12]}"
    return Finding(FILES, "ok", told)
