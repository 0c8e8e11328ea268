"""kill -9 at every step of every deed, and several processes at once: readers see the state before or after, nothing else."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune.adapter import journal, registry
from lora_tune.adapter.door import AdapterFiles
from tests.registry_writer import DEEDS
from tests.unit.test_door import write

ROOT = Path(__file__).resolve().parents[2]
N_POINTS = 100
"""How many kills the default sweep must at least have made; issue 4 asks for 50."""


def writer(*words):
    return [sys.executable, "-m", "tests.registry_writer", *map(str, words)]


def run(*words):
    done = subprocess.run(writer(*words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", {"lora_alpha": 9})


def leave_behind(root):
    """Add to a registry everything that killed writers can leave."""
    for _ in range(2):
        registry.add(root / "other" / "1", "left", root=root)
    shutil.copytree(root / "left" / "1", root / "left" / "3")  # renamed, and killed before the journal knew
    shutil.copytree(root / "left" / "1", root / "left" / ".4-abcdef")  # killed before it was renamed
    with (root / "journal.jsonl").open("a") as stream:  # killed after the event, before the folder went
        stream.write(json.dumps({"event": "removed", "name": "left", "version": 1}) + "\n" + '{"event": "promo')


@pytest.fixture
def templates(tmp_path, source):
    """Return a folder with a registry for each deed, with a history."""
    root = tmp_path / "template"
    for number in (1, 2, 3):
        registry.add(write(tmp_path / "s", {"lora_alpha": number}), "home", root=root)
    registry.add(source, "other", root=root)
    registry.promote("home@1", root=root)
    registry.promote("home@2", root=root)
    for deed in DEEDS:
        shutil.copytree(root, tmp_path / "templates" / deed)
    leave_behind(tmp_path / "templates" / "finish what another left")
    return tmp_path / "templates"


def seen(root):
    """Return everything that a reader is told: versions with their content, and aliases."""
    versions = {}
    for listed in registry.listing(root):
        assert isinstance(listed.files_or_error, AdapterFiles), listed.files_or_error
        versions[listed.version.spec] = registry.content_digest(listed.files_or_error)
    aliases = {alias: version.spec for alias, version in registry.aliases(root).items()}
    for alias, spec in aliases.items():
        assert registry.find_version(alias, root=root).spec == spec
    return versions, aliases


def check(root, states, source):
    """Check a registry whose writer was killed, also after the next writer, and return what readers saw."""
    now = seen(root)
    assert now in states, root
    added = registry.add(source, "home", root=root)
    assert added.spec not in {spec for versions, _ in (states[0], now) for spec in versions}
    registry.promote(added.spec, "after", root=root)
    assert registry.find("after", root=root) == added.folder
    versions = {**now[0], added.spec: registry.content_digest(registry.open_found(str(source), root=root))}
    assert seen(root) == (versions, {**now[1], "after": added.spec})
    there = {f"{path.parent.name}@{path.name}" for path in root.glob("*/*")}
    assert there == set(versions)
    assert there <= {f"{name}@{number}" for name, number in journal.read_state(root).arrivals}
    assert journal.read_state(root).unread == ()  # a line that was cut off is not taken for a damaged one
    return now


def states_of(templates, work, source):
    """Return, for each deed, the state before and the state after, from a writer that was left alone."""
    found = {}
    for deed, act in DEEDS.items():
        root = shutil.copytree(templates / deed, work / deed)
        before = seen(root)
        act(root, source)
        found[deed] = (before, seen(root))
        assert found[deed][0] != found[deed][1]
    return found


def sweep(how, tmp_path, templates, source):
    states = states_of(templates, tmp_path / "alone", source)
    killed = run(how, templates, tmp_path / "work", source)
    assert set(killed) == set(DEEDS)
    both = 0
    for deed, roots in killed.items():
        assert len(roots) >= 5
        ends = [check(Path(root), states[deed], source) == states[deed][1] for root in roots]
        both += len(set(ends)) == 2
    # The sweep reaches over the moment at which each deed is done: some kills leave the old state, some the new.
    assert both == len(DEEDS)
    return sum(map(len, killed.values()))


def test_a_writer_killed_at_any_step_leaves_the_state_before_or_after(tmp_path, templates, source):
    assert sweep("step", tmp_path, templates, source) >= N_POINTS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_writer_killed_at_any_system_call_leaves_the_state_before_or_after(tmp_path, templates, source):
    assert sweep("strace", tmp_path, templates, source) >= N_POINTS


def test_two_processes_never_get_the_same_number(tmp_path, source):
    root = tmp_path / "r"
    both = [
        subprocess.Popen(writer("add", root, source, 10), cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    numbers = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 21))
    assert [listed.version.number for listed in registry.listing(root)] == list(range(1, 21))


def test_readers_beside_a_writer_see_only_whole_states(tmp_path, source):
    root = tmp_path / "r"
    first = registry.promote(registry.add(source, "home", root=root).spec, root=root).version
    digest = registry.content_digest(registry.open_found("prod", root=root))
    last, looks = first.number, 0
    with subprocess.Popen(writer("churn", root, source, 1), cwd=ROOT) as process:
        while process.poll() is None:
            number = registry.find_version("prod", root=root).number
            assert number >= last
            assert registry.aliases(root)["prod"].number >= number
            for listed in registry.listing(root):
                assert isinstance(listed.files_or_error, AdapterFiles), listed.files_or_error
                assert registry.content_digest(listed.files_or_error) == digest
            last, looks = number, looks + 1
    assert process.returncode == 0
    assert last > first.number + 1
    assert looks > 5
    assert not [path for path in (root / "home").iterdir() if path.name.startswith(".")]


def test_the_seam_kills_by_the_signal_that_cannot_be_caught():
    code = "from tests.registry_writer import die_at; die_at(1); open('/dev/null', 'w')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
