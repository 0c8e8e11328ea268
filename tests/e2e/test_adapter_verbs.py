"""The life of an adapter through the command line: promote, roll back, compose, resize, lint, export, pack, import, push."""

import json

import pytest

from lora_tune.cli.app import run
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_bases):
    """A registry with two adapters of one base."""
    folder = tmp_path_factory.mktemp("shelf")
    for number, seed in enumerate((0, 1)):
        recipe = write_recipe(
            folder / f"r{seed}",
            tiny_bases(),
            train={"seed": seed},
            lora={"rank": 4 + number},
            output={"name": f"tiny-{seed}"},
        )
        arguments = ["train", recipe, "--run-dir", folder / f"run{seed}", "--registry", folder / "registry"]
        assert run([*map(str, arguments)]) == 0
    return folder


@pytest.fixture
def ask(shelf, capsys):
    def asked(*arguments, registry=True):
        code = run([*map(str, arguments), *(["--registry", str(shelf / "registry")] if registry else []), "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return asked


def test_an_alias_is_promoted_rolled_back_and_protects_its_version(ask, shelf):
    assert ask("adapters", "promote", "tiny-0")[1]["adapter"] == "tiny-0@1"
    assert ask("adapters", "promote", "tiny-1@1", "prod")[1]["previous"] == "tiny-0@1"
    assert ask("adapters", "inspect", "prod")[1]["rank"] == 5
    assert ask("adapters", "rollback")[1]["adapter"] == "tiny-0@1"
    code, found = ask("adapters", "remove", "tiny-0@1")
    assert (code, "prod" in found["error"]["message"]) == (77, True)
    listed = {row["adapter"]: row["aliases"] for row in ask("adapters", "list")[1]["adapters"]}
    assert listed["tiny-0@1"] == ["prod"]


def test_adapters_are_composed_and_resized_with_a_passport_that_verifies(ask):
    code, made = ask("adapters", "compose", "tiny-0=0.5", "tiny-1", "--name", "both")
    assert code == 0, made
    assert (made["rank"], made["adapter"]) == (9, "both@1")
    assert [parent["weight"] for parent in made["made_from"]["parents"]] == [0.5, 1.0]
    assert ask("adapters", "verify", "both")[0] == 0
    code, small = ask("adapters", "resize", "both", "--rank", 3, "--name", "small")
    assert code == 0
    assert 0 < small["norm_kept"] < 1
    assert ask("adapters", "inspect", "small")[1]["made_from"]["method"] == "resize"
    assert ask("adapters", "fold", "tiny-0")[0] == 2


def test_two_adapters_are_merged_at_once(ask, tmp_path):
    code, receipt = ask("merge", "tiny-0", tmp_path / "m", "--also", "tiny-1=0.5")
    assert code == 0, receipt
    assert receipt["kl"] < 1e-6
    assert ask("merge", "tiny-0", tmp_path / "n", "--onto", "nf4")[0] == 2
    assert ask("merge", "tiny-0", tmp_path / "n", "--dtype", "int4")[0] == 2
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_is_written_in_the_dtype_that_was_asked_for(ask, tmp_path, dtype):
    code, told = ask("merge", "tiny-0", tmp_path / "m", "--dtype", dtype)
    assert code == 0, told
    header = (tmp_path / "m" / "model.safetensors").read_bytes()[:4000]
    assert (b'"BF16"' in header, b'"F32"' in header) == (dtype == "bf16", dtype == "fp32")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp", "peft"])
def test_an_engines_verdict_is_the_exit_code(ask, engine):
    code, found = ask("adapters", "lint", "tiny-0", "--for", engine)
    assert code == (0 if found["verdict"] == "loads" else 77)
    assert ask("adapters", "lint", "tiny-0", "--for", "abacus")[0] == 2


@pytest.mark.parametrize("engine", ["gguf", "mlx", "peft"])
def test_an_adapter_is_written_for_another_engine_or_refused(ask, tmp_path, engine):
    code, found = ask("export", "tiny-0", tmp_path / "out", "--to", engine)
    assert code in (0, 77), found
    assert (tmp_path / "out").exists() == (code == 0)


def test_a_version_travels_as_a_tar(ask, shelf, tmp_path, capsys):
    code, packed = ask("adapters", "export", "tiny-0", tmp_path / "a.tar")
    assert code == 0
    assert run(["adapters", "import", str(tmp_path / "a.tar"), "--registry", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == "tiny-0@1"
    assert ask("adapters", "export", "tiny-0", tmp_path / "a.tar")[0] == 73
    assert packed["n_bytes"] == (tmp_path / "a.tar").stat().st_size


def test_a_dry_run_of_push_shows_the_files(ask):
    code, found = ask("adapters", "push", "tiny-0", "me/tiny", "--dry-run")
    assert code == 0
    assert {file["name"] for file in found["files"]} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lora_tune.json",
    }  # fmt: skip


def test_the_words_for_people(shelf, capsys):
    registry = ["--registry", str(shelf / "registry")]
    assert run(["adapters", "list", *registry]) == 0
    assert "tiny-0@1" in capsys.readouterr().out
    run(["adapters", "lint", "tiny-0", "--for", "vllm", *registry])
    assert "vllm" in capsys.readouterr().out
    assert run(["adapters", "compose", "tiny-0", "tiny-1", "--name", "words", *registry]) == 0
    assert "norm kept" in capsys.readouterr().out
