"""The base's linear layers, taken over in place: joined where they read one input, packed where that is measured faster.

Modules stay where they are; only their `forward` is replaced, once. What each row's adapter adds is set by a Routing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that read the same input in the models of transformers; checked at every call all the same."""

_PACKING_GAIN = 1.1
"""Packed weights are used where they are at least so much faster."""


@dataclass
class Routing:
    """Which adapter each row of the coming call has, as indices that products take."""

    only: int | None = None
    """The place of the one adapter that all rows share."""
    n_places: int = 0
    """Places that the call reads; 0 when all rows are the base's."""
    gather: Any = None
    """[P * m] row of each entry; places with fewer rows than m repeat one, whose result is not used."""
    entry_of: Any = None
    """[B] the entry whose result is each row's; any one for rows of the base."""
    of_base: Any = None
    """[B, 1, 1] True for rows of the base; None when there are none."""


@dataclass
class Group:
    """Linear layers that read one input."""

    names: tuple[str, ...]
    modules: tuple[Any, ...]
    n_in: int
    n_out: tuple[int, ...]
    routing: Routing
    product: Callable[[Any], Any]
    """Input [B, T, D_in] → the members' outputs side by side, [B, T, sum of D_out], newly made."""
    a: Any = None
    """[P, D_in, M * R] of the adapters in use: the members' A side by side."""
    b: tuple[Any, ...] = ()
    """[P, R, D_out] a member, times the scaling."""
    _input: Any = None
    _outputs: list[Any] = field(default_factory=list)

    def call(self, member: int, x_btd: Any) -> Any:
        """Return one member's output; the first member of a group to be called computes all of them."""
        if self._input is not x_btd or self._outputs[member] is None:
            joined = self.product(x_btd)
            if self.routing.n_places and self.a is not None:
                joined = self._add(x_btd, joined)
            self._outputs = list(joined.split(self.n_out, dim=-1)) if len(self.n_out) > 1 else [joined]
            self._input = x_btd
        output, self._outputs[member] = self._outputs[member], None
        if all(other is None for other in self._outputs):
            self._input = None
        return output

    def _add(self, x_btd: Any, y_bto: Any) -> Any:
        """Add each row's adapter to the base's output, in place."""
        route = self.routing
        n_rows = x_btd.shape[0]
        x = x_btd.to(self.a.dtype).reshape(n_rows, -1, self.n_in)
        y = y_bto.view(n_rows, -1, y_bto.shape[-1])
        rank = self.b[0].shape[1]
        if route.only is not None:
            hidden = x.view(-1, self.n_in) @ self.a[route.only]
            flat = y.view(-1, y.shape[-1])
            for place, columns, ranks in self._members(rank):
                change = self.b[place][route.only]
                if flat.dtype == hidden.dtype:
                    flat[:, columns].addmm_(hidden[:, ranks], change)
                else:
                    flat[:, columns] += hidden[:, ranks] @ change
            return y_bto
        entries = x.index_select(0, route.gather).view(route.n_places, -1, self.n_in)
        hidden = entries.bmm(self.a[: route.n_places])
        for place, columns, ranks in self._members(rank):
            change = hidden[:, :, ranks].bmm(self.b[place][: route.n_places])
            # Taken back in the order of rows and added at once: index_add_ is several times slower on a CPU.
            change = change.view(len(route.gather), -1, self.n_out[place]).index_select(0, route.entry_of)
            if route.of_base is not None:
                change.masked_fill_(route.of_base, 0.0)
            y[:, :, columns] += change
        return y_bto

    def _members(self, rank: int) -> list[tuple[int, slice, slice]]:
        """Return each member's number, its columns of the output, and its columns of the hidden numbers."""
        found, column = [], 0
        for place, n_out in enumerate(self.n_out):
            found.append((place, slice(column, column + n_out), slice(place * rank, (place + 1) * rank)))
            column += n_out
        return found


def take_over(model: Any, routing: Routing, *, n_rows: int) -> list[Group]:
    """Return the groups of the model's linear layers but the head, with their `forward` replaced.

    Args:
        model: its weights may be joined and packed: it is of no use for anything else afterwards.
        routing: read at every call.
        n_rows: rows of a usual call, with which plain and packed products are measured.
    """
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if _is_linear(m) and m is not head}
    pack = _packing(linear, n_rows)
    groups: list[Group] = []
    seen: set[str] = set()
    for name in linear:
        if name in seen:
            continue
        names = _with_siblings(name, linear)
        seen.update(names)
        modules = tuple(linear[other] for other in names)
        n_out = tuple(_widths(other)[1] for other in modules)
        group = Group(names, modules, _widths(modules[0])[0], n_out, routing, _product(modules, pack))
        for member, other in enumerate(modules):
            other.forward = partial(group.call, member)
        groups.append(group)
    if pack is not None and _is_plain(head):
        head.forward = pack(head.weight.data, head.bias)
    return groups


def _product(modules: tuple[Any, ...], pack: Callable[[Any, Any], Callable[[Any], Any]] | None) -> Callable[[Any], Any]:
    """Return one product for all of them; members' own weights become views of what it reads, or are let go."""
    import torch

    biases = [module.bias is not None for module in modules]
    alike = len({module.weight.dtype for module in modules}) == 1 and any(biases) == all(biases)
    if not all(map(_is_plain, modules)) or not alike or (len(modules) == 1 and pack is None):
        forwards = [module.forward for module in modules]
        return forwards[0] if len(forwards) == 1 else lambda x: torch.cat([forward(x) for forward in forwards], dim=-1)
    weight = torch.cat([module.weight.data for module in modules])
    bias = torch.cat([module.bias.data for module in modules]) if all(biases) else None
    if pack is not None:
        for module in modules:
            module.weight.data = module.weight.data.new_empty(0)
        return pack(weight, bias)
    row = 0
    for module in modules:
        module.weight.data = weight[row : row + module.weight.shape[0]]
        row += module.weight.shape[0]
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def _packing(linear: dict[str, Any], n_rows: int) -> Callable[[Any, Any], Callable[[Any], Any]] | None:
    """Return how to pack weights for oneDNN, if that is here and measured faster on the widest plain layer; else None.

    Source: torch 2.13's own packed product, which its compiler uses for frozen weights (torch/_inductor/mkldnn_lowerings).
    """
    import torch

    plain = [m for m in linear.values() if _is_plain(m) and m.weight.device.type == "cpu"]
    if not plain or not torch.backends.mkldnn.is_available():
        return None
    try:
        reorder, linear_op = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None

    def pack(weight: Any, bias: Any) -> Callable[[Any], Any]:
        packed = reorder(weight.contiguous(), n_rows)
        return lambda x: linear_op(x, packed, bias, "none", [], "")

    widest = max(plain, key=lambda module: module.weight.numel())
    x = torch.randn(n_rows, 1, widest.in_features).to(widest.weight.dtype)
    with torch.inference_mode():
        try:
            packed = pack(widest.weight.data, widest.bias)
            plainly = partial(torch.nn.functional.linear, weight=widest.weight.data, bias=widest.bias)
            apart = float((packed(x).float() - plainly(x).float()).abs().max() / plainly(x).float().abs().max())
            bound = 1e-4 if widest.weight.dtype == torch.float32 else 2e-2
            faster = _seconds(plainly, x) > _PACKING_GAIN * _seconds(packed, x)
        except RuntimeError:
            return None
    return pack if faster and apart <= bound else None


def _seconds(product: Callable[[Any], Any], x: Any) -> float:
    """Return the least time of a few calls."""
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - begun)
    return min(times)


def _with_siblings(name: str, linear: dict[str, Any]) -> tuple[str, ...]:
    parent, _, leaf = name.rpartition(".")
    for siblings in _SIBLINGS:
        names = tuple(f"{parent}.{other}" for other in siblings)
        if (
            leaf in siblings
            and all(other in linear for other in names)
            and len({_widths(linear[other])[0] for other in names}) == 1
        ):
            return names
    return (name,)


def _is_plain(module: Any) -> bool:
    import torch

    return type(module) is torch.nn.Linear


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _widths(module: Any) -> tuple[int, int]:
    """Return D_in and D_out; Conv1D holds its weight as [in, out]."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf
