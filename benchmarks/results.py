"""What a benchmark finds, and the table it is printed in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setup:
    """What every benchmark is given."""

    broker_url: str
    redis_url: str
    folder: Path
    rounds: int
    quick: bool
    say: Callable[[str], None]

    def scaled(self, number: int) -> int:
        """Return `number`, or a third of it for a quick run."""
        return max(1, number // 3) if self.quick else number


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `ratio` is the median of the rounds' ratios; `lowest` and `highest` are their range."""

    name: str
    stock: str
    ours: str
    ratio: float
    lowest: float
    highest: float
    target: str
    is_met: bool


def compare(
    name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return the row of `pairs`, one (stock, ours) a round, with its target."""
    ratios = [ours / stock for stock, ours in pairs]
    ratio = statistics.median(ratios)
    return Row(
        name,
        f"{statistics.median(stock for stock, _ in pairs):,.4g} {unit}",
        f"{statistics.median(ours for _, ours in pairs):,.4g} {unit}",
        ratio,
        min(ratios),
        max(ratios),
        f"≥ {at_least:.2f}" if at_least is not None else f"≤ {at_most:.2f}",
        (at_least is None or ratio >= at_least) and (at_most is None or ratio <= at_most),
    )


def limit(name: str, stock: float | None, ours: float, *, unit: str, at_most: float) -> Row:
    """Return the row of a difference that has a limit; `stock` is None if only the difference was measured."""
    extra = ours - (stock or 0.0)
    return Row(
        name,
        "" if stock is None else f"{stock:,.1f} {unit}",
        f"{ours:,.1f} {unit}",
        extra,
        extra,
        extra,
        f"≤ {at_most:g} {unit} more",
        extra <= at_most,
    )


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a table of plain text."""
    lines = [("benchmark", "stock", "sharded", "ratio", "range", "target", "")]
    for row in rows:
        is_difference = "more" in row.target
        lines.append(
            (
                row.name,
                row.stock,
                row.ours,
                f"{row.ratio:+.1f}" if is_difference else f"{row.ratio:.2f}",
                "" if is_difference else f"{row.lowest:.2f}–{row.highest:.2f}",
                row.target,
                "met" if row.is_met else "missed",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, 6) else cell.rjust(width) for place, (cell, width) in pairs
        ).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )
