"""What the machine and the environment offer: versions, device, bf16, flash attention, memory, disk."""

import importlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from lora_tune.doctor.finding import REINSTALL, Finding
from lora_tune.model.fingerprint import cache_root

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers")
"""What every training needs; bitsandbytes is nf4's own matter."""

MIN_MEMORY_GIB = 4.0
"""Below this the quickstart's base of 135M weights is already tight."""

MIN_DISK_GIB = 5.0
"""Below this a base in half precision, its adapter and some checkpoints soon do not fit."""


def versions(required: Sequence[str] | None = None) -> Finding:
    """Return whether every library is inside the range that was tested.

    Args:
        required: requirements as pip takes them; None takes lora_tune's own, without its extras.
    """
    named = [Requirement(line) for line in (requires("lora-tune") or [] if required is None else required)]
    outside, absent, n_checked = [], [], 0
    for wanted in named:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        n_checked += 1
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            absent.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            outside.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if outside or absent:
        told = "; ".join(absent + outside)
        commands = " ".join(f"'{wanted.name}{wanted.specifier}'" for wanted in named if any(line.startswith(f"{wanted.name} ") for line in outside + absent))  # fmt: skip
        return Finding("versions", "failed", told, float(len(outside + absent)), 0.0, f"pip install {commands}")
    shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"))
    detail = f"libraries outside the range that is tested, of {n_checked} (Python {platform.python_version()}, {shown})"
    return Finding("versions", "ok", detail, 0.0, 0.0)


def imports() -> Finding:
    """Return whether every library that training needs can be loaded at all."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as err:  # noqa: BLE001 - a broken installation raises anything
            return Finding("imports", "failed", f"{name} does not load: {type(err).__name__}: {err}", hint=REINSTALL)
    return Finding("imports", "ok", f"{', '.join(LIBRARIES)} load")


def device() -> Finding:
    """Return what training would compute on."""
    import torch

    from lora_tune.model.load import detect_device, device_name

    found = detect_device()
    if found.kind == "cpu" and (_has_nvidia() or getattr(torch.version, "hip", None)):
        build = torch.version.cuda or "no CUDA"
        return Finding(
            "device", "warning", f"there is a GPU, but this torch ({torch.__version__}, built for {build}) cannot use it",
            hint="install a build of torch for your driver: see https://pytorch.org/get-started/locally",
        )  # fmt: skip
    cores = os.cpu_count() or 1
    told = f"no GPU; {cores} CPU cores, {torch.get_num_threads()} used" if found.kind == "cpu" else device_name(found)
    return Finding("device", "info", told)


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def bf16() -> Finding:
    """Return whether bf16 is computed by units of its own."""
    from lora_tune.model.load import detect_device

    fast = detect_device().computes_bf16
    told = "computed in hardware: base.dtype auto takes it" if fast else "not in hardware: base.dtype auto takes fp32"
    return Finding("bf16", "info", told)


def flash_attention() -> Finding:
    """Return which attention there is."""
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return Finding("flash attention", "info", f"flash-attn {version('flash_attn')} is installed")
    return Finding("flash attention", "info", "not installed: torch's own scaled-dot-product attention is used")


def memory() -> Finding:
    """Return the free memory of the device that trains."""
    import torch

    if torch.cuda.is_available():
        free_bytes, all_bytes = torch.cuda.mem_get_info()
        return _room("memory", free_bytes / 2**30, MIN_MEMORY_GIB, f"of {all_bytes / 2**30:.1f} GiB on the GPU")
    free_gib = _free_memory_gib()
    if free_gib is None:
        return Finding("memory", "info", "this system does not say how much is free")
    return _room("memory", free_gib, MIN_MEMORY_GIB, "of this machine's memory")


def _free_memory_gib(meminfo: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return what Linux says is free, or what is left to this container where that is less."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    free = int(found[1]) * 1024 if found else None
    try:
        limit, used = (
            (container / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current")
        )
    except OSError:
        limit, used = "max", "0"
    if free is None or limit == "max":
        return None if free is None else free / 2**30
    return max(0, min(free, int(limit) - int(used))) / 2**30


def disk() -> Finding:
    """Return the free disk where runs, the cache and temporary files go: the least of them."""
    places = (Path.cwd(), cache_root(), Path(tempfile.gettempdir()))
    free, place = min((shutil.disk_usage(_existing(place)).free, str(place)) for place in places)
    return _room("disk", free / 2**30, MIN_DISK_GIB, f"in {place}")


def _existing(place: Path) -> Path:
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _room(name: str, free_gib: float, least_gib: float, where: str) -> Finding:
    detail = f"{free_gib:.1f} GiB free {where}"
    if free_gib >= least_gib:
        return Finding(name, "info", detail)
    hint = (
        "free some, or take a smaller base, base.quantization: nf4 or fewer max_seq_tokens"
        if name == "memory"
        else "free some space there"
    )
    return Finding(name, "warning", f"{detail}: less than {least_gib:.0f}", hint=hint)


FACTS: tuple[Callable[[], Finding], ...] = (device, bf16, flash_attention, memory, disk)
"""What needs torch and measures nothing."""
