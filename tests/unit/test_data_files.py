"""Which files a path means: a file, a folder by its names, a hub dataset at a commit; and their digest."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune.data.files import DataFiles, digest_files, find_files, find_measured_files
from lora_tune.data.rows import iter_rows
from lora_tune.errors import DataError, MissingInputError
from tests.hub_stand_in import GATED, REVISION, hub_stand_in


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n")
    return root


def _named(files: DataFiles, root: Path) -> list[list[str]]:
    return [[str(path.relative_to(root)) for path in part] for part in (files.train, files.held_out, files.unused)]


@pytest.mark.parametrize(("names", "train", "held_out", "unused"), [
    (["b.jsonl", "a.csv"], ["a.csv", "b.jsonl"], [], []),
    (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"], ["valid.jsonl"], ["test.jsonl"]),
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"], []),
    (["Train.JSONL.GZ", "VAL.tsv.zst"], ["Train.JSONL.GZ"], ["VAL.tsv.zst"], []),
    (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"],
     ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["validation-00000-of-00001.parquet"], []),
    (["train_1.json", "dev.1.json", "eval 2.ndjson", "test0.csv"], ["train_1.json"], ["dev.1.json", "eval 2.ndjson"], ["test0.csv"]),
    (["squad_train.jsonl", "squad_validation.jsonl"], ["squad_train.jsonl"], ["squad_validation.jsonl"], []),
    (["testimonials.csv", "valley.csv", "training.csv"], ["testimonials.csv", "training.csv", "valley.csv"], [], []),
    (["train/b.jsonl", "train/a.jsonl", "test/x.csv", "pictures/a.csv"], ["train/a.jsonl", "train/b.jsonl"], ["test/x.csv"], []),
    (["data/train-00000-of-00001.parquet", "README.md"], ["data/train-00000-of-00001.parquet"], [], []),
    (["rows.jsonl", ".hidden.jsonl", "README.md", "LICENSE", "dataset_infos.json", "dataset_dict.json", "state.json", "a.png"],
     ["rows.jsonl"], [], []),
])  # fmt: skip
def test_names_say_what_files_are_for(tmp_path, names, train, held_out, unused):
    _folder(tmp_path, *names)
    assert _named(find_files(str(tmp_path)), tmp_path) == [train, held_out, unused]


def test_a_file_is_itself_whatever_its_name(tmp_path):
    path = _folder(tmp_path, "test.jsonl") / "test.jsonl"
    assert find_files(str(path)) == DataFiles((path,), (), (), None)


def test_links_to_files_are_followed(tmp_path):
    _folder(tmp_path, "store/abc")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to(tmp_path / "store" / "abc")
    assert _named(find_files(str(tmp_path / "set")), tmp_path / "set")[0] == ["train.jsonl"]


@pytest.mark.parametrize(("names", "said", "hint"), [
    (["valid.jsonl", "test.jsonl"], "only valid.jsonl, test.jsonl", "name one of them train"),
    (["en/a.jsonl", "de/a.jsonl"], "rows are in its folders de, en", "name one of these folders"),
    (["README.md", "data.arrow"], "it holds README.md, data.arrow", "convert others first"),
    (["dataset_info.json"], "it holds dataset_info.json", ".parquet"),
])  # fmt: skip
def test_a_folder_without_a_training_file_says_what_it_holds(tmp_path, names, said, hint):
    _folder(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path))
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_a_missing_part_of_a_set_is_found(tmp_path):
    _folder(tmp_path, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    with pytest.raises(MissingInputError, match=r"but not train-00001-of-00003\.parquet"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["no", "no.jsonl", "x" * 300, "a\0b"])
def test_what_is_not_there_is_exit_66(tmp_path, name):
    with pytest.raises(MissingInputError):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.docx", "rows", "rows.parquet.gz", "rows.zip", "rows.gz"])
def test_a_file_that_we_do_not_read_is_refused(tmp_path, name):
    _folder(tmp_path, name)
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path / name))
    assert caught.value.hint


def test_a_broken_link_is_missing(tmp_path):
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(MissingInputError):
        find_files(str(tmp_path))


@pytest.mark.parametrize("inside", [False, True])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path, inside):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="a pipe, socket or device"):
        find_files(str(tmp_path if inside else tmp_path / "train.jsonl"))


def test_the_digest_frames_count_and_sizes(tmp_path):
    def written(*contents: bytes) -> list[Path]:
        paths = [tmp_path / f"{n}.jsonl" for n in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return paths

    expected = hashlib.sha256(b"2 files\n3 bytes\nabc0 bytes\n").hexdigest()
    assert digest_files(written(b"abc", b"")) == expected
    sets = [[], [b""], [b"", b""], [b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"]]
    assert len({digest_files(written(*contents)) for contents in sets}) == len(sets)
    with pytest.raises(MissingInputError):
        digest_files([tmp_path / "gone.jsonl"])


@pytest.mark.parametrize("path", ["hub:", "hub:squad", "hub:a/b/../c", "hub:/a/b", "hub:a/b?x", "hub:a//b"])
def test_what_names_no_hub_dataset_is_refused(path):
    with pytest.raises(DataError, match="names no hub dataset"):
        find_files(path, REVISION)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", REVISION[:12], REVISION.upper(), REVISION + "0"])
def test_a_hub_dataset_must_be_pinned_to_a_commit(revision):
    with pytest.raises(DataError) as caught:
        find_files("hub:owner/set", revision)
    assert "commits/main" in caught.value.hint
    assert caught.value.where == "data.revision"


def test_a_local_file_has_no_revision(tmp_path):
    path = _folder(tmp_path, "rows.jsonl") / "rows.jsonl"
    with pytest.raises(DataError, match="has no revision"):
        find_files(str(path), REVISION)


FIND = """
import json, sys
from lora_tune.data.files import find_files
from lora_tune.errors import LoraTuneError
for path, revision in json.loads(sys.argv[1]):
    try:
        found = find_files(path, revision)
        said = {part: [[file.name, file.read_text()] for file in getattr(found, part)] for part in ("train", "held_out", "unused")}
        print(json.dumps({**said, "revision": found.revision}))
    except LoraTuneError as err:
        print(json.dumps({**err.as_dict(), "exit": err.exit_code}))
"""


def _found(home: Path, endpoint: str, *asked: str, revision: str = REVISION, offline: bool = False):
    """Return what find_files gives for each path, in a process of its own: the hub's address is read at import."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"}  # fmt: skip
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        env.pop(name, None)
    command = [sys.executable, "-c", FIND, json.dumps([(path, revision) for path in asked])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


ROW = b'{"prompt": "a", "completion": "b"}\n'
DATASETS = {
    "owner/flat": {"train.jsonl": ROW, "test.jsonl": ROW * 2, "README.md": b"# x", "load.py": b"1/0", "big/other.jsonl": ROW},
    "owner/usual": {"data/train-00000-of-00001.jsonl": ROW, "dataset_infos.json": b"{}"},
    "owner/folders": {"en/train.jsonl": ROW, "de/train.jsonl": ROW * 3, "de/valid/x.jsonl": ROW},
    "owner/script": {"script.py": b"raise SystemExit", "README.md": b""},
    "owner/gated": GATED,
}  # fmt: skip


def test_a_hub_dataset_is_fetched_once_and_then_read_offline(tmp_path):
    paths = ["hub:owner/flat", "hub:owner/usual", "hub:owner/folders/de"]
    with hub_stand_in(DATASETS) as (endpoint, asked):
        flat, usual, german = online = _found(tmp_path, endpoint, *paths)
        (script,) = _found(tmp_path, endpoint, "hub:owner/script")
    assert flat == {"train": [["train.jsonl", ROW.decode()]], "held_out": [["test.jsonl", (ROW * 2).decode()]],
                    "unused": [], "revision": REVISION}  # fmt: skip
    assert usual["train"] == [["train-00000-of-00001.jsonl", ROW.decode()]]
    assert german["train"] == [["train.jsonl", (ROW * 3).decode()]]
    assert german["held_out"] == [["x.jsonl", ROW.decode()]]
    fetched = [line.rpartition("/")[2] for line in asked if line.startswith("GET /datasets")]
    assert sorted(fetched) == ["dataset_infos.json", "test.jsonl", "train-00000-of-00001.jsonl", "train.jsonl", "train.jsonl", "x.jsonl"]  # fmt: skip
    assert not any(line.endswith((".py", ".md", "other.jsonl")) for line in asked)
    assert script["exit"] == 65
    assert "never run" in script["hint"]
    assert _found(tmp_path, "http://127.0.0.1:9", *paths, offline=True) == online


def test_a_download_that_was_interrupted_is_not_taken_for_the_whole(tmp_path):
    with hub_stand_in(DATASETS) as (endpoint, _):
        _found(tmp_path, endpoint, "hub:owner/flat")
    (kept,) = tmp_path.glob("hub/*/snapshots/*/train.jsonl")
    kept.unlink()
    (answer,) = _found(tmp_path, "http://127.0.0.1:9", "hub:owner/flat", offline=True)
    assert answer["exit"] == 69
    assert "or not as a whole" in answer["message"]


def test_each_refusal_of_the_hub_has_its_exit_code_and_next_step(tmp_path):
    with hub_stand_in(DATASETS) as (endpoint, _):
        gated, unknown = _found(tmp_path, endpoint, "hub:owner/gated", "hub:owner/unknown")
        (revision,) = _found(tmp_path, endpoint, "hub:owner/flat", revision="f" * 40)
    assert [answer["exit"] for answer in (gated, unknown, revision)] == [66, 66, 66]
    assert all("HF_TOKEN" in answer["hint"] and "hf auth login" in answer["hint"] for answer in (gated, unknown))
    assert "has no revision " + "f" * 40 in revision["message"]


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_exit_69(tmp_path, offline):
    (answer,) = _found(tmp_path, "http://127.0.0.1:9", "hub:owner/flat", offline=offline)
    assert answer["exit"] == 69
    assert "HF_HUB_OFFLINE" in answer["hint"]


def test_nulls_that_parquet_puts_into_objects_are_not_there(tmp_path):
    import pyarrow
    from pyarrow import parquet

    calls = [{"name": "f", "arguments": {"city": "Bern"}}, {"name": "g", "arguments": {"unit": "C"}}]
    rows = [{"call": call, "note": None} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row.values for row in iter_rows(tmp_path / "rows.parquet")] == rows


def test_a_folder_to_measure_on_may_hold_valid_files_alone(tmp_path):
    for name in ("valid.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert find_measured_files(str(tmp_path)) == (tmp_path / "valid.jsonl",)
    (tmp_path / "valid.jsonl").unlink()
    assert find_measured_files(str(tmp_path)) == (tmp_path / "test.jsonl",)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(MissingInputError, match="no file of rows"):
        find_measured_files(str(tmp_path))
