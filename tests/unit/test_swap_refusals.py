"""What is not let in by a load: folders, names, contents and answers that are not what they are said to be."""

import json

import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG, open_adapter
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.shelf import content_digest
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    RequestError,
    UnsupportedError,
)
from tests.fleets import adapter, fill_registry, opened, served, with_passport
from tests.unit import test_swap
from tests.unit.test_swap import model_of, refused

stock = test_swap.stock
fleet = test_swap.fleet


def test_a_folder_outside_of_the_registry_is_the_operators_alone(fleet, tmp_path):
    folder = adapter(tmp_path / "mine", 50)
    words = {refused(fleet, RefusedError, fleet.load, str(folder)).message}
    words.add(refused(fleet, RefusedError, fleet.load, str(tmp_path / "not-there")).message)
    words.add(refused(fleet, RefusedError, fleet.load, "../../../etc").message)
    assert len(words) == 1  # nothing is learnt of what is there
    version = fleet.load(str(folder), allow_outside=True)
    assert version.id == f"mine@sha256:{version.digest[:12]}"
    assert fleet.load(str(folder), name="casa", allow_outside=True).name == "casa"


def test_a_way_out_of_the_registry_by_a_link_is_none(stock, tmp_path):
    root = tmp_path / "r"
    fill_registry(root, tmp_path / "w", {"home": 1})
    (root / "out").symlink_to(adapter(tmp_path / "outside", 3))
    (root / "loop").symlink_to(root / "loop")
    with opened(stock[0], root) as fleet:
        refused(fleet, RefusedError, fleet.load, "./out")
        refused(fleet, RefusedError, fleet.load, f"{root}/out")
        refused(fleet, LoraTuneError, fleet.load, "./loop")
        refused(fleet, RefusedError, fleet.load, ".")
        refused(fleet, RefusedError, fleet.load, f"{root}/../{root.name}/../outside")
        assert fleet.load("./home/1").id == fleet.load(f"{root}/home/../home/1/").id == "home@1"


def test_a_folder_in_the_working_folder_is_not_a_registrys_name(fleet, tmp_path, monkeypatch):
    adapter(tmp_path / "casa", 51)
    monkeypatch.chdir(tmp_path)
    refused(fleet, MissingInputError, fleet.load, "casa")


@pytest.mark.parametrize(
    "spec", ["", "\0", "a\0/b", "x" * 5000, "home@", "home@0", "home@@1", "HOME", "home@sha256:zz"]
)
def test_a_spec_that_names_nothing_is_refused(fleet, spec):
    refused(fleet, (RequestError, MissingInputError, RefusedError), fleet.load, spec)


@pytest.mark.parametrize("name", ["", "A", "a/b", "a\0", "x" * 64, "a\n", "a@1"])
def test_a_hostile_name_is_refused(fleet, name):
    refused(fleet, RequestError, fleet.load, "home@1", name=name)


def test_a_version_that_was_changed_on_disk_is_refused(stock, tmp_path):
    root = tmp_path / "r"
    fill_registry(root, tmp_path / "w", {"home": 1})
    path = root / "home" / "1" / CONFIG
    with opened(stock[0], root) as fleet:
        path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
        refused(fleet, AdapterMismatchError, fleet.load, "home@1")


def test_what_does_not_fit_the_base_is_refused_before_the_engine_hears_of_it(fleet, tmp_path):
    from tests.unit.test_door import write

    refused(fleet, AdapterMismatchError, fleet.load, str(write(tmp_path / "narrow")), name="narrow", allow_outside=True)
    assert fleet.engine.loads == []


@pytest.fixture
def proved(tiny_bases, tmp_path):
    """Return a fleet on a base with a tokenizer, and a function that registers an adapter with a passport."""
    folder = tiny_bases("llama")
    root = tmp_path / "r"
    root.mkdir()

    def register(number, **passport):
        source = with_passport(adapter(tmp_path / f"a{number}", number), folder, **passport)
        return registry.add(source, "home", root=root).spec

    with opened(served(folder), root) as fleet:
        yield fleet, register


def test_an_adapter_that_answers_as_its_passport_says_is_equal(proved):
    fleet, register = proved
    assert fleet.load(register(1)).verdict == "equal"


def test_an_adapter_that_answers_otherwise_never_gets_the_name(proved):
    fleet, register = proved
    fleet.load(register(1))
    other = content_digest(open_adapter(fleet.versions()[0].files.folder))
    error = refused(fleet, AdapterMismatchError, fleet.load, register(2, content=other))
    assert "passport" in error.message
    assert model_of(fleet, "home") == "home@1"


def test_an_engine_that_does_not_apply_the_adapter_is_found_out(proved):
    fleet, register = proved
    spec = register(1)
    digest = content_digest(open_adapter(registry.find(spec, root=fleet.registry)))
    fleet.engine.deaf = {f"home--{digest[:12]}"}
    refused(fleet, AdapterMismatchError, fleet.load, spec)
    fleet.engine.deaf = set()
    assert fleet.load(spec).verdict == "equal"


def test_probes_that_fail_in_the_engine_leave_nothing_staged(proved):
    fleet, register = proved
    spec = register(1)
    fleet.engine.token_error = BusyError("the cache is full")
    refused(fleet, BusyError, fleet.load, spec)
    assert fleet.load(spec).verdict == "equal"


def test_what_one_passport_said_of_the_base_is_believed_of_no_other(proved, tmp_path):
    from tests.unit.test_door import write

    fleet, register = proved
    fleet.load(register(1))
    assert fleet.load(register(2)).verdict == "equal"
    for field, value in (("base", {"weights": "1" * 64}), ("tokenizer", {"chat_template": "2" * 64}), ("tokenizer", {"own_template": "{{ 1 }}"})):  # fmt: skip
        folder = with_passport(adapter(tmp_path / "other", 3), fleet.base.files.folder)
        passport = json.loads((folder / FILE_NAME).read_text())
        passport[field] |= value
        (folder / FILE_NAME).write_text(json.dumps(passport))
        refused(fleet, AdapterMismatchError, fleet.load, str(folder), name="other", allow_outside=True)
    for _ in range(2):
        narrow = write(tmp_path / "narrow")
        refused(fleet, AdapterMismatchError, fleet.load, str(narrow), name="narrow", allow_outside=True)


def test_a_template_whose_turns_end_otherwise_is_refused_unless_the_server_stops_there(proved, tmp_path, monkeypatch):
    fleet, register = proved
    spec = register(1)
    monkeypatch.setattr("lora_tune.serving.places.own_template", lambda _: "a template")
    monkeypatch.setattr("lora_tune.serving.places.ends_of", lambda *_: [7])
    assert "--adapter" in refused(fleet, UnsupportedError, fleet.load, spec).hint
    monkeypatch.setattr("lora_tune.serving.places.ends_of", lambda *_: [])
    assert fleet.load(spec).verdict == "equal"
