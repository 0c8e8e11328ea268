"""A base with any number of adapters attached by peft, one of which (or none) acts at a time; for one thread only."""

from typing import Any

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.door import AdapterFiles
from lora_tune.model.load import Dtype
from lora_tune.serving.engine import BASE


class AttachedAdapters:
    """The base with every adapter that was attached, one of which (or none) acts at a time."""

    def __init__(self, model: Any, adapter_dtype: Dtype) -> None:
        self.model = model
        self.n_bytes = 0
        self._adapter_dtype = adapter_dtype
        self._live: Any = None
        """The peft model around the same layers; None while there is no adapter."""
        self._names: dict[str, str] = {}
        """Key → what peft calls it: peft compares parts of names, so none begins like another."""
        self._n_attached = 0
        self._acting: str | None = BASE
        """None when it has to be set anew."""

    def attach(self, key: str, files: AdapterFiles) -> None:
        """Bring an adapter in.

        Raises:
            AdapterMismatchError: it does not fit the base; nothing that acts is changed.
        """
        self._acting = None
        self._n_attached += 1
        name = f"v{self._n_attached}_"
        on = self.model if self._live is None else self._live
        self._live = attach_adapter(on, files, name=name, adapter_dtype=self._adapter_dtype)
        self._names[key] = name
        self._count()

    def detach(self, key: str) -> None:
        """Take an adapter out; without any, the model is the plain base again."""
        name = self._names.pop(key)
        if self._names:
            # peft warns when the adapter that acts is taken away.
            self.act(next(iter(self._names)))
            self._live.delete_adapter(name)
        else:
            self._live.unload()
            self._live, self._acting = None, BASE
        self._count()

    def act(self, key: str) -> None:
        """Let the adapter of that key act, or none."""
        if key == self._acting:
            return
        self._acting = None
        if key != BASE:
            self._live.base_model.enable_adapter_layers()
            self._live.set_adapter(self._names[key])
        elif self._live is not None:
            self._live.base_model.disable_adapter_layers()
        self._acting = key

    def _count(self) -> None:
        self.n_bytes = sum(weight.nbytes for name, weight in self.model.named_parameters() if "lora_" in name)


def held_bytes(cache: Any) -> int:
    """Return what a cache holds for keys and values."""
    held = [getattr(layer, part, None) for layer in getattr(cache, "layers", ()) for part in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if tensor is not None)
