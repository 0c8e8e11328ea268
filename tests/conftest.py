"""What every test shares: no network, a cache of its own, tiny bases built once."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"

from tests.tiny import save_tiny_base, tiny_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the user's cache and registry out of the tests; the real base is read from there only by slow tests."""
    os.environ.setdefault("LORA_TUNE_REAL_CACHE", os.environ.get("LORA_TUNE_CACHE", ""))
    os.environ["LORA_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("LORA_TUNE_ADAPTERS", None)


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory):
    """Return a function architecture → folder; each base is built once."""
    root = tmp_path_factory.mktemp("bases")

    def base(architecture: str = "llama", seed: int = 0) -> Path:
        folder = root / f"{architecture}-{seed}"
        return folder if folder.is_dir() else save_tiny_base(folder, architecture, seed=seed)

    return base


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_data():
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return DATA
