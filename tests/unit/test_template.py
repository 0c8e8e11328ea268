"""The chat template that a recipe names: text in, or an error that says why not."""

import pytest

from lora_tune.errors import LoraTuneError
from lora_tune.model.load import PLAIN_TEMPLATE, read_template


def test_the_builtin_and_a_file_of_any_suffix(tmp_path):
    assert read_template("builtin:plain") == PLAIN_TEMPLATE
    (tmp_path / "chat.txt").write_text("{{ 'é' }}", encoding="utf-8")
    assert read_template(str(tmp_path / "chat.txt")) == "{{ 'é' }}"


@pytest.mark.parametrize(("content", "code", "said"), [
    (None, 66, "no chat template at"),
    (b"x" * (64 * 1024 + 1), 65, "larger than 64 KiB"),
    (b"caf\xe9", 65, "not UTF-8 text (byte 3)"),
])  # fmt: skip
def test_a_file_that_is_no_template(tmp_path, content, code, said):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoraTuneError) as caught:
        read_template(str(path))
    assert (caught.value.exit_code, caught.value.where) == (code, "data.chat_template")
    assert said in caught.value.message
    assert "builtin:plain" in caught.value.hint


@pytest.mark.parametrize(
    ("given", "code"), [("builtin:zzz", 65), ("{{ messages }}", 66), ("a\0b", 66), ("x" * 300, 66)]
)
def test_a_name_that_is_no_template(given, code):
    with pytest.raises(LoraTuneError) as caught:
        read_template(given)
    assert caught.value.exit_code == code
