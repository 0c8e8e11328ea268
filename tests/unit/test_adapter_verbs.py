"""What the verbs on adapters take and say, as far as no base is needed: names, paths, weights, notes, refusals."""

import json
import shutil

import pytest

from lora_tune.adapter import registry
from lora_tune.cli import adapter_verbs
from lora_tune.cli.app import run
from lora_tune.errors import CannotCreateError, LoraTuneError, MissingInputError, UsageError
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import with_passport
from tests.unit.test_shelf import damage


def _ignore(_what, _share):
    pass


@pytest.fixture
def root(tmp_path):
    registry.add(write(tmp_path / "a"), "home", root=tmp_path / "r")
    registry.add(write(tmp_path / "b", {"lora_alpha": 8}), "home", root=tmp_path / "r")
    return tmp_path / "r"


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "", ".", "A"])
def test_a_name_that_is_a_path_is_refused_before_anything_is_made(tmp_path, root, monkeypatch, name):
    def made(*_):
        raise AssertionError("something was made")

    monkeypatch.setattr(adapter_verbs.tempfile, "TemporaryDirectory", made)
    for act in (
        lambda: adapter_verbs.resize("home", rank=1, name=name, base=None, registry=root, progress=_ignore),
        lambda: adapter_verbs.compose(
            ["home"],
            plan={"method": "concat", "name": name, "allow_unverified": True},
            base=None,
            registry=root,
            progress=_ignore,
        ),
    ):
        with pytest.raises(UsageError, match="no name for an adapter"):
            act()


def test_a_passport_whose_name_is_a_path_is_refused_by_every_verb(tmp_path, root):
    folder = with_passport(tmp_path / "evil")
    path = folder / "lora_tune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": str(tmp_path / "escaped" / "pwn")}))
    for act in (
        lambda: adapter_verbs.resize(str(folder), rank=1, name=None, base=None, registry=root, progress=_ignore),
        lambda: adapter_verbs.inspect(str(folder), root),
        lambda: adapter_verbs.import_(folder, None, root),
    ):
        with pytest.raises(LoraTuneError, match="name is") as caught:
            act()
        assert caught.value.exit_code == 77
    assert not (tmp_path / "escaped").exists()


def test_what_is_made_of_a_strangers_adapter_becomes_no_version_of_mine(tmp_path, root):
    folder = with_passport(tmp_path / "stranger")  # its passport says home
    for rank in (1, None):
        with pytest.raises(CannotCreateError, match="has an adapter of that name already"):
            adapter_verbs.resize(str(folder), rank=rank, name=None, base=None, registry=root, progress=_ignore)


def test_what_is_made_of_a_version_keeps_the_name_of_the_registry(tmp_path, root, monkeypatch):
    registry.add(with_passport(tmp_path / "c"), "other", root=root)  # its passport says home
    names = []
    monkeypatch.setattr(adapter_verbs, "_registered", lambda name, *_: names.append(name))
    for spec in ("other", "home@1", "other@1"):
        adapter_verbs.resize(spec, rank=1, name=None, base=None, registry=root, progress=_ignore)
    assert names == ["other", "home", "other"]


def test_a_folder_whose_name_holds_an_equals_sign_is_that_folder(tmp_path, root):
    write(tmp_path / "x=2")
    plain = str(write(tmp_path / "x"))
    assert adapter_verbs._weighted(f"{plain}=2", root)[1] == 1.0
    assert adapter_verbs._weighted(f"{plain}=2", root)[0].folder.name == "x=2"
    assert adapter_verbs._weighted(f"{plain}=2=0.5", root)[1] == 0.5
    files, weight = adapter_verbs._weighted(f"{plain}=3", root)
    assert (files.folder.name, weight) == ("x", 3.0)
    assert adapter_verbs._weighted("home=-1", root)[1] == -1.0
    with pytest.raises(UsageError, match="is no weight, and there is no folder"):
        adapter_verbs._weighted("home=half", root)
    for given in ("", "=2", "nothing=2"):
        with pytest.raises(MissingInputError):
            adapter_verbs._weighted(given, root)


def test_no_word_at_all_is_not_the_working_folder(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(MissingInputError, match="no adapter ''"):
        adapter_verbs.export("", tmp_path / "out", to="gguf", dtype=None, base=None, registry=root, progress=_ignore)


def test_an_adapter_without_a_passport_is_called_unverified_when_it_is_exported(tmp_path, root, capsys):
    code = run(["export", "home@1", str(tmp_path / "out"), "--to", "peft", "--registry", str(root), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.out
    assert told.err.startswith("note: home@1 is unverified: it has no passport")
    json.loads(told.out)


def test_the_weight_of_the_first_adapter_of_a_merge_and_what_is_unverified_are_said(tmp_path, root, capsys):
    with pytest.raises(LoraTuneError):  # the base is not on this machine
        adapter_verbs.merge(
            "home=2", tmp_path / "m", also=(), onto="trained", dtype=None, base=None, registry=root, progress=_ignore
        )
    said = capsys.readouterr().err
    assert "note: home@2 is merged with the weight 2" in said
    assert "note: home@2 is unverified" in said


def test_the_list_shows_digests_and_aliases_that_point_to_nothing(tmp_path, root, capsys):
    registry.promote("home@1", root=root)
    registry.add(tmp_path / "a", "up", root=root)
    registry.promote("up@1", "stage", root=root)
    shutil.rmtree(root / "up")
    assert run(["adapters", "list", "--registry", str(root)]) == 0
    told = capsys.readouterr()
    digest = registry.content_digest(registry.open_found("home@1", root=root))
    assert f"sha256:{digest[:12]}" in told.out
    assert "points to up@1, which is not there" in told.out
    assert told.err == ""
    assert run(["adapters", "list", "--registry", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dangling_aliases"] == {"stage": "up@1"}


@pytest.mark.parametrize("verb", ["list", "inspect prod", "promote home@2 prod", "rollback prod", "promote prod stage"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_damaged_line_of_the_journal_is_said_on_stderr(root, capsys, verb, as_json):
    for number in (1, 2, 1, 2):
        registry.promote(f"home@{number}", root=root)
    line = damage(root, "promoted")
    assert run(["adapters", *verb.split(), "--registry", str(root), *(["--json"] if as_json else [])]) == 0
    told = capsys.readouterr()
    assert f"line {line} of {root / 'journal.jsonl'} is damaged" in told.err
    assert told.err.startswith("note: ")
    assert told.err.count("\n") == 1
    assert not as_json or json.loads(told.out)


def test_a_registry_that_is_a_file_is_said(tmp_path, capsys):
    (tmp_path / "afile").write_text("x")
    assert run(["adapters", "list", "--registry", str(tmp_path / "afile")]) == 66
    assert "is no folder, and a registry is one" in capsys.readouterr().err
