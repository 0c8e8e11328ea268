"""The data ledger in words, small tables and bars, as a terminal shows it: what became of every row and token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.cli.visible import visible

HISTOGRAM_LINES = 12
BAR_CELLS = 30
SHOWN_LABELS = 5
LABEL_LETTERS = 40
KEPT = "kept from before"
"""What the token store says of a source whose tokens were there already."""


def share(part: int, whole: int) -> str:
    """Return a percentage that never rounds something to nothing, nor a part to the whole."""
    if not part or part == whole:
        return "100%" if part else "0%"
    ratio = part / whole
    if ratio < 0.001:
        return "<0.1%"
    if ratio > 0.999:
        return ">99.9%"
    return f"{ratio:.1%}" if ratio < 0.0095 or ratio > 0.9905 else f"{ratio:.0%}"


def ledger_lines(found: Mapping[str, Any], *, blocks: bool) -> list[str]:
    """Return where every row and token went: by source, by set and length, by role, and what was tokenized again.

    Args:
        found: `Splits.ledger()`.
        blocks: draw with block characters; else in ASCII.
    """
    lines = source_lines(found["sources"])
    for name, counts in found["counts"].items():
        lines += set_lines({name: counts})
        lines += [f"  {line}" for line in histogram_lines(found["tokens_by_row"][name], blocks=blocks)]
    return [*lines, *role_lines(found["roles"]), *tokenized_lines(found["tokenized"])]


def event_lines(event: Mapping[str, Any]) -> list[str]:
    """Return what a run says of its data before it begins: the ledger in few lines, then the warnings."""
    lines = [*source_lines(event["sources"]), *set_lines(event["counts"])]
    if event["roles"]:
        lines.append(f"trained by role: {roles_in_words(event['roles'])}")
    lines += tokenized_lines(event["tokenized"])
    return [
        f"data: {format_in_words(event)}",
        *(f"  {line}" for line in lines),
        *(f"warning: {warning}" for warning in event["warnings"]),
    ]


def set_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line a set: what became of its rows."""
    return [f"{set_name(name)}: {counts_in_words(own)}" for name, own in counts.items()]


def set_name(name: str) -> str:
    """Return a set's name as it is said."""
    return name.replace("_", " ")


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Return what became of a set's rows; what did not happen is not mentioned."""
    used = f"{counts['rows']:,} of {counts['rows_read']:,} rows"
    if counts["rows_split"]:
        used = f"{counts['rows']:,} sequences from {counts['rows_read']:,} rows"
    changed = [
        f"{counts[f'rows_{deed}']:,} {deed}"
        for deed in ("refused", "cut", "split", "dropped")
        if counts[f"rows_{deed}"]
    ]
    if lost := counts["trained_tokens_lost"]:
        changed.append(f"{lost:,} or {share(lost, lost + counts['trained_tokens'])} of the trained tokens lost")
    if endless := counts["answers_without_end"]:
        changed.append(f"{endless:,} of {counts['answers']:,} answers without their end")
    what = f" ({', '.join(changed)})" if changed else ""
    return (
        f"{used}{what}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained "
        f"({share(counts['trained_tokens'], counts['tokens'])}), longest row {counts['longest_tokens']:,}"
    )


def format_in_words(data: Mapping[str, Any]) -> str:
    """Return the rows' format, and whether it was found or given."""
    left_out = f"; {data['rows_left_out']:,} left out, since they cannot be used" if data["rows_left_out"] else ""
    return f"format {data['format']}{' (detected)' if data['detected'] else ''}{left_out}"


def labels_in_words(labels: Mapping[str, int]) -> str:
    """Return the commonest labels with their rows, and the rarest."""
    ranked = sorted(labels.items(), key=lambda item: -item[1])
    named = [f"{_short(visible(label))} {rows:,}" for label, rows in ranked]
    if len(named) <= SHOWN_LABELS + 1:
        return f"{len(named)}: {', '.join(named)}"
    return f"{len(named)}: {', '.join(named[:SHOWN_LABELS])} … rarest: {named[-1]}"


def is_mixed(sources: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether there is more to say of the sources than how many rows there are."""
    return len(sources) > 1 or any(source["rows"] != source["rows_an_epoch"] for source in sources)


def source_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line a source: its rows, and how many of them an epoch trains; none when there is one, used once."""
    if not is_mixed(sources):
        return []
    total = sum(source["rows_an_epoch"] for source in sources)
    header = ("source", "rows", "an epoch", "")
    rows = [
        (visible(one["source"]), f"{one['rows']:,}", f"{one['rows_an_epoch']:,}", share(one["rows_an_epoch"], total))
        for one in sources
    ]
    return _table([header, *rows])


def role_lines(roles: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line a role: its tokens, how many are trained, and their share."""
    rows = [
        (visible(role), f"{n['tokens']:,}", f"{n['trained']:,}", share(n["trained"], n["tokens"]))
        for role, n in roles.items()
    ]
    return _table([("tokens by role", "tokens", "trained", ""), *rows])


def roles_in_words(roles: Mapping[str, Mapping[str, int]]) -> str:
    """Return the share of trained tokens by role, in one line."""
    return ", ".join(f"{visible(role)} {share(n['trained'], n['tokens'])}" for role, n in roles.items())


def tokenized_lines(tokenized: Mapping[str, str]) -> list[str]:
    """Return why rows were tokenized, a line a source; none for tokens that were kept from before."""
    return [
        f"{visible(source)} was tokenized: {visible(reason)}"
        for source, reason in tokenized.items()
        if reason != KEPT
    ]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """Some neighbouring bins of a histogram as one line."""

    tokens_from: int
    tokens_to: int
    rows: int
    too_long: bool


def histogram_lines(bins: Sequence[Mapping[str, Any]], *, blocks: bool) -> list[str]:
    """Return rows by their tokens as bars, at most about twelve lines; rows over the limit are marked in words.

    Args:
        bins: `tokens_from`, `tokens_to`, `rows`, `too_long` each, in order.
        blocks: draw with block characters; else in ASCII.
    """
    bars = _merged(bins)
    most = max((bar.rows for bar in bars), default=0)
    width = len(f"{bars[-1].tokens_to:,}") if bars else 0
    rows_width = max(4, len(f"{most:,}"))
    lines, skipping = (
        ["tokens".center(2 * width + 1).rstrip().ljust(2 * width + 1) + f"  {'rows':>{rows_width}}"],
        False,
    )
    for bar in bars:
        if not bar.rows:
            if not skipping:
                lines.append(" " * width + ("⋮" if blocks else ":"))
            skipping = True
            continue
        skipping = False
        span = f"{bar.tokens_from:>{width},}{'–' if blocks else '-'}{bar.tokens_to:<{width},}"
        limit = "  over the limit" if bar.too_long else ""
        lines.append(f"{span}  {bar.rows:>{rows_width},}  {_drawn(bar.rows / most, blocks=blocks)}{limit}")
    return lines


def _merged(bins: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Merge neighbours until they fit; what is over the limit never shares a bar with what is not."""
    group = -(-len(bins) // HISTOGRAM_LINES)
    merged: list[Bar] = []
    for over in (False, True):
        own = [one for one in bins if bool(one["too_long"]) is over]
        for first in range(0, len(own), group):
            part = own[first : first + group]
            merged.append(
                Bar(part[0]["tokens_from"], part[-1]["tokens_to"], sum(one["rows"] for one in part), too_long=over)
            )
    return merged


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"


def _drawn(ratio: float, *, blocks: bool) -> str:
    """Return a bar that is never empty: one row of a million is still a row."""
    if not blocks:
        return "#" * max(1, round(ratio * BAR_CELLS))
    eighths = max(1, round(ratio * BAR_CELLS * 8))
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, numbers to the right."""
    held = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in held) for column in range(len(held[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in held
    ]
