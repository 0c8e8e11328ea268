"""Adapters beside each other in one model: every row of a batch gets its own adapter's change, or none.

Loading an adapter builds its operands beside those in use, and touches no module and nothing that a row is using.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.adapter.door import AdapterFiles
from lora_tune.errors import AdapterMismatchError, UnsupportedError
from lora_tune.serving.engine import BASE
from lora_tune.serving.linears import Group, Routing, take_over


@dataclass(frozen=True)
class Weights:
    """One adapter's share of one group of layers, in the layout that products read."""

    a: tuple[Any, ...]
    """[D_in, R] a member; None where it is not changed."""
    b: tuple[Any, ...]
    """[R, D_out] a member, times the scaling."""


@dataclass(frozen=True)
class Resident:
    """One adapter in memory; never changed once it is there."""

    rank: int
    groups: tuple[Weights, ...]
    n_bytes: int


class SlotPool:
    """The adapters of one model. `load` may run on any thread; `route` and `unload` on the model's own."""

    def __init__(self, model: Any, *, max_places: int) -> None:
        self.max_places = max_places
        self.routing = Routing()
        self._dtype, self._device = model.dtype, model.device
        self._groups = take_over(model, self.routing, n_rows=max_places)
        self._where = {
            name: (number, member)
            for number, group in enumerate(self._groups)
            for member, name in enumerate(group.names)
        }
        self._residents: dict[str, Resident] = {}
        self._places: dict[str, int] = {}
        """Adapter → its place in the products' operands."""
        self._rank, self._n_places = 0, 0
        self._routed: tuple[str, ...] = ()

    def load(self, key: str, files: AdapterFiles, state: dict[str, Any]) -> None:
        """Bring an adapter's weights into memory.

        Args:
            key: its name from now on.
            files: checked by the door.
            state: its tensors by name, of the bytes that the door checked.

        Raises:
            UnsupportedError: a variant or a layer that is not held here (422).
            AdapterMismatchError: a layer is missing in this base, or has other widths (412).
        """
        self._residents[key] = self._resident(files, state)

    def loaded(self) -> frozenset[str]:
        """Return the adapters that are loaded."""
        return frozenset(list(self._residents))

    def unload(self, key: str) -> None:
        """Free an adapter's memory."""
        del self._residents[key]
        place = self._places.pop(key, None)
        self._routed = ()
        if place is not None:
            for group in self._groups:
                self._clear(group, place)
        if not self._residents:
            self._empty()

    def route(self, keys: Sequence[str]) -> None:
        """Set which adapter (or BASE) each row of the next call has."""
        if tuple(keys) == self._routed:
            return
        import torch

        active = list(dict.fromkeys(key for key in keys if key != BASE))
        route = self.routing
        self._routed = ()  # until everything below is done: a failure half-way must not leave rows to another adapter
        route.n_places, route.only = 0, None
        if not active:
            self._routed = tuple(keys)
            return
        self._bring_in(active)
        places = [self._places[key] for key in active]
        n_places = max(places) + 1
        only = places[0] if len(active) == 1 and BASE not in keys else None
        rows: list[list[int]] = [[] for _ in range(n_places)]
        for row, key in enumerate(keys):
            if key != BASE:
                rows[self._places[key]].append(row)
        widest = max(map(len, rows))
        padded = [some + [0] * (widest - len(some)) for some in rows]
        entry_of = [0] * len(keys)
        for place, some in enumerate(rows):
            for i, row in enumerate(some):
                entry_of[row] = place * widest + i
        of_base = [key == BASE for key in keys]
        route.gather = torch.tensor(padded, device=self._device).view(-1)
        route.entry_of = torch.tensor(entry_of, device=self._device)
        route.of_base = torch.tensor(of_base, device=self._device).view(-1, 1, 1) if any(of_base) else None
        route.n_places, route.only = n_places, only
        self._routed = tuple(keys)

    def n_adapters(self) -> int:
        """Adapters in memory."""
        return len(self._residents)

    def n_bytes(self) -> int:
        """Bytes of the adapters, and of the operands built from them."""
        operands = [t for group in self._groups if group.a is not None for t in (group.a, *group.b)]
        n_operand_bytes: int = sum(t.numel() * t.element_size() for t in operands)
        return n_operand_bytes + sum(resident.n_bytes for resident in list(self._residents.values()))

    def _resident(self, files: AdapterFiles, state: dict[str, Any]) -> Resident:
        if files.shape.variant == "dora":
            raise UnsupportedError(
                f"{files.folder.name} is a DoRA adapter; the native engine adds plain LoRA changes",
                hint="serve it with --engine simple",
            )
        rank, found = files.shape.rank, {}
        for module in files.shape.modules:
            place = self._where.get(module)
            if place is None:
                raise AdapterMismatchError(
                    f"the adapter changes {module}, which is no linear layer of this base's blocks",
                    hint="load it on the base it was trained on, or serve it with --engine simple",
                )
            found[place] = (
                state[f"base_model.model.{module}.lora_A.weight"],
                state[f"base_model.model.{module}.lora_B.weight"],
            )
        groups = tuple(self._weights(files, number, group, found) for number, group in enumerate(self._groups))
        tensors = [t for weights in groups for t in (*weights.a, *weights.b) if t is not None]
        return Resident(rank, groups, sum(t.numel() * t.element_size() for t in tensors))

    def _weights(self, files: AdapterFiles, number: int, group: Group, found: dict[tuple[int, int], Any]) -> Weights:
        """Return the adapter's share of one group."""
        a: list[Any] = [None] * len(group.names)
        b: list[Any] = [None] * len(group.names)
        for member, n_out in enumerate(group.n_out):
            pair = found.get((number, member))
            if pair is not None:
                _check_widths(group.names[member], pair, (group.n_in, n_out, files.shape.rank))
                a[member] = pair[0].to(self._device, self._dtype).t()
                scaled = pair[1].to(self._device).float() * files.shape.scaling
                b[member] = scaled.to(self._dtype).t()
        return Weights(tuple(a), tuple(b))

    def _bring_in(self, active: Sequence[str]) -> None:
        """Copy the active adapters to places near the front; those in use are never written."""
        rank = max(resident.rank for resident in list(self._residents.values()))
        n_needed = len(active)
        if n_needed > self._n_places:
            self._make_room(max(n_needed, min(self._n_places * 2, self.max_places)), rank)
        elif rank > self._rank or rank * 2 <= self._rank:
            self._make_room(self._n_places, rank)
        if max((self._places.get(key, 0) for key in active), default=0) >= 2 * n_needed:
            self._places.clear()  # too far back: products read every place before them
        taken = {self._places[key] for key in active if key in self._places}
        free = (place for place in range(self._n_places) if place not in taken)
        for key in active:
            if key not in self._places:
                place = next(free)
                for other in [other for other, at in self._places.items() if at == place]:
                    del self._places[other]
                self._copy(key, place)
                self._places[key] = place

    def _make_room(self, n_places: int, rank: int) -> None:
        import torch

        self._places.clear()
        self._rank = self._n_places = 0
        for group in self._groups:
            group.a = torch.zeros(n_places, group.n_in, len(group.names) * rank, dtype=self._dtype, device=self._device)
            group.b = tuple(
                torch.zeros(n_places, rank, n_out, dtype=self._dtype, device=self._device) for n_out in group.n_out
            )
        self._rank, self._n_places = rank, n_places

    def _copy(self, key: str, place: int) -> None:
        """Write an adapter's weights into a place that no row is using."""
        resident = self._residents[key]
        for group, weights in zip(self._groups, resident.groups, strict=True):
            self._clear(group, place)
            for member, (a, b) in enumerate(zip(weights.a, weights.b, strict=True)):
                if a is not None:
                    first = member * self._rank
                    group.a[place, :, first : first + resident.rank] = a
                    group.b[member][place, : resident.rank] = b

    def _clear(self, group: Group, place: int) -> None:
        if group.a is not None:
            for operand in (group.a, *group.b):
                operand[place].zero_()

    def _empty(self) -> None:
        self._places.clear()
        self._rank = self._n_places = 0
        self._routed = ()
        self.routing.n_places = 0
        for group in self._groups:
            group.a, group.b = None, ()


def _check_widths(name: str, pair: tuple[Any, Any], widths: tuple[int, int, int]) -> None:
    n_in, n_out, rank = widths
    if tuple(pair[0].shape) != (rank, n_in) or tuple(pair[1].shape) != (n_out, rank):
        raise AdapterMismatchError(
            f"{name} is {pair[0].shape[1]} → {pair[1].shape[0]} in the adapter, but {n_in} → {n_out} in this base",
            hint="load it on the base it was trained on",
        )
