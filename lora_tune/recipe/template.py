"""The chat template that a recipe names → its text. A template the base brings itself is not read here."""

from pathlib import Path

from lora_tune.errors import MissingInputError, RecipeError
from lora_tune.recipe.schema import BUILTIN_TEMPLATES

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'][0] | upper + message['role'][1:] + ':\\n' + message['content'] | trim -}}"
    "{{- eos_token + '\\n\\n' if message['role'] == 'assistant' else '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}"
)
"""`builtin:plain`: headings for the roles, and the base's own eos token after each answer."""

MAX_TEMPLATE_BYTES = 64 * 1024
_HINT = "set data.chat_template to a Jinja file, or to builtin:plain"


def read_template(given: str) -> str:
    """Return the text of the template that a recipe names: `builtin:plain` or a file.

    Raises:
        MissingInputError: there is no such file, or it cannot be read (exit 66).
        RecipeError: an unknown built-in, a file larger than 64 KiB, or not UTF-8 text (exit 65).
    """
    if given.startswith("builtin:"):
        if given not in BUILTIN_TEMPLATES:
            raise _wrong(f"no built-in template {given!r}; known: {', '.join(BUILTIN_TEMPLATES)}")
        return PLAIN_TEMPLATE
    try:
        with Path(given).open("rb") as stream:
            content = stream.read(MAX_TEMPLATE_BYTES + 1)
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise MissingInputError(
            f"no chat template at {given}: {reason}", hint=_HINT, where="data.chat_template"
        ) from err
    if len(content) > MAX_TEMPLATE_BYTES:
        raise _wrong(f"{given} is larger than {MAX_TEMPLATE_BYTES // 1024} KiB; a chat template is a short text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise _wrong(f"{given} is not UTF-8 text (byte {err.start}); a chat template is Jinja text") from err


def _wrong(message: str) -> RecipeError:
    return RecipeError(message, hint=_HINT, where="data.chat_template")
