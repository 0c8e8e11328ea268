"""What is in a checkpoint: everything that the next step depends on, as safetensors and JSON; nothing is pickled.

The files themselves are checkpoints.py's; it has verified them before anything here reads them.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora_tune.adapter.apply import trained_weights
from lora_tune.errors import TrainingError

WEIGHTS = "adapter.safetensors"
BEST = "best.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
STATE = "state.json"
_STEP_LOSSES = "step_losses"


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write name → weight, each of its own memory; a CheckpointError never leaves NaN behind.

    Raises:
        TrainingError: a weight is not finite (exit 65).
    """
    held = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    for name, weight in held.items():
        if not bool(torch.isfinite(weight).all()):
            raise TrainingError(
                f"{name} holds NaN or infinity; no checkpoint was written of it", hint="lower train.learning_rate"
            )
    save_file(held, path)


def load_weights(folder: Path, model: Any) -> None:
    """Put a checkpoint's weights into the live adapter.

    Raises:
        TrainingError: they are those of other layers (exit 65).
    """
    live, kept = trained_weights(model), load_file(folder / WEIGHTS)
    if {name: weight.shape for name, weight in live.items()} != {name: weight.shape for name, weight in kept.items()}:
        raise TrainingError(
            f"{folder} holds the weights of other layers than this adapter has",
            hint="start a new run, without --resume",
        )
    with torch.no_grad():
        for name, weight in live.items():
            weight.copy_(kept[name])


def load_best(folder: Path, device: Any) -> dict[str, torch.Tensor]:
    """Return the best weights so far where they are not the checkpoint's own, or nothing."""
    path = folder / BEST
    return {name: weight.to(device) for name, weight in load_file(path).items()} if path.is_file() else {}


def write_optimizer(path: Path, optimizer: Any, model: Any) -> dict[str, Any]:
    """Write the optimizer's tensors and return the rest of its state as plain values.

    Tensors are kept under `<weight's name>|<what>`, so that the order of weights may change between versions.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for weight, state in optimizer.state.items():
        name = names[id(weight)]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(name, {})[key] = value
    save_file(tensors, path)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[id(weight)] for weight in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "values": values}


def load_optimizer(folder: Path, kept: Mapping[str, Any], optimizer: Any, model: Any) -> None:
    """Put a checkpoint's optimizer state into a fresh optimizer over the same weights.

    Raises:
        TrainingError: it is that of other weights (exit 65).
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    order = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
    if sorted(name for group in order for name in group) != sorted(
        name for group in kept["groups"] for name in group["params"]
    ):
        raise TrainingError(
            f"{folder} holds the optimizer of other weights than this adapter's",
            hint="start a new run, without --resume",
        )
    numbers = {name: number for number, name in enumerate(name for group in order for name in group)}
    state: dict[int, dict[str, Any]] = {numbers[name]: dict(values) for name, values in kept["values"].items()}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        name, what = key.rsplit("|", 1)
        state.setdefault(numbers[name], {})[what] = tensor
    by_weight = {frozenset(group["params"]): group for group in kept["groups"]}
    groups = [
        {**_plain(by_weight[frozenset(members)]), "params": [numbers[name] for name in members]} for members in order
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_random(path: Path, drawn: Mapping[str, torch.Tensor], losses: list[float]) -> None:
    """Write the states of all random generators, and the losses of all steps so far."""
    save_file({**drawn, _STEP_LOSSES: torch.tensor(losses, dtype=torch.float64)}, path)


def read_random(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return what `write_random` wrote."""
    kept = load_file(folder / RANDOM)
    losses = kept.pop(_STEP_LOSSES)
    return kept, losses.tolist()


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of Python's, numpy's and torch's generators, on every device, as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, at, has_gauss, cached = np.random.get_state(legacy=True)
    assert version == 3 and kind == "MT19937", "Python's and numpy's global generators are Mersenne twisters"
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy_place": torch.tensor([at, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda_{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return {name: state.clone() for name, state in states.items()}


def restore_random(states: Mapping[str, torch.Tensor]) -> None:
    """Put the generators back into these states."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    at, has_gauss = states["numpy_place"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, at, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    on_gpus = [states[name] for name in sorted(name for name in states if name.startswith("cuda_"))]
    for number, state in enumerate(on_gpus[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, number)


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values; NaN is refused, floats come back to the bit."""
    path.write_text(json.dumps(values, sort_keys=True, allow_nan=False), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `write_state` wrote."""
    values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return values


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and torch's optimizers take their betas as one."""
    return {key: tuple(value) if key == "betas" else value for key, value in group.items() if key != "params"}
