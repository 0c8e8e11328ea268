"""One trained run, shared by the tests of the command line."""

import pytest

from lora_tune.cli.app import run
from tests.tiny import write_recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_bases):
    """A folder with a recipe, its run and a registry."""
    folder = tmp_path_factory.mktemp("e2e")
    recipe = write_recipe(folder, tiny_bases(), eval={"generate": 6, "generate_rows": 3}, train={"max_steps": 6})
    assert run(["train", str(recipe), "--run-dir", str(folder / "run"), "--registry", str(folder / "adapters")]) == 0
    return folder
