"""Tables of the rows of `objectives.py`: a line an objective, seeds side by side."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from rows import Row
from work_tables import each, markdown


def tables(rows: Sequence[Row]) -> str:
    """A table for each problem that has rows, in markdown."""
    parts = []
    for problem in dict.fromkeys(row["setting"]["problem"] for row in rows):
        mine = [row for row in rows if row["setting"]["problem"] == problem]
        parts.append(f"## {problem}\n\n{TABLES.get(problem, gallery)(mine)}")
    return "\n\n".join(parts)


def by_objective(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """`loss_type` with its options → rows of its seeds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["setting"]["loss_kwargs"].items())
        groups.setdefault(row["setting"]["loss_type"] + (f" ({options})" if options else ""), []).append(row)
    return groups


def mixture(rows: Sequence[Row]) -> str:
    """W2 to the tilt by both samplers."""
    start = rows[0]["found"]["w2_base"]
    lines = [
        [name, f"{mean(r['found']['work'] for r in group) / 1e6:.2f}"]
        + [each([r["found"]["w2"][sampler] for r in group]) for sampler in start]
        for name, group in by_objective(rows).items()
    ]
    base = ", ".join(f"{value:.3f} ({sampler})" for sampler, value in start.items())
    heads = ["objective", "work, million", *(f"W2, {sampler}" for sampler in start)]
    return f"W2 of the base: {base}.\n\n" + markdown(heads, lines)


def digits(rows: Sequence[Row]) -> str:
    """Share of the shift by both samplers."""
    referee = rows[0]["found"]["referee"]
    lines = [
        [name, f"{mean(r['found']['work'] for r in group) / 1000:.0f}"]
        + [each([r["found"]["samplers"][sampler]["share"] for r in group]) for sampler in referee]
        + [each([r["found"]["nats"]["gap"] for r in group])]
        for name, group in by_objective(rows).items()
    ]
    heads = ["objective", "work, 1000", *(f"share, {sampler}" for sampler in referee), "log Z − (E[λr] − KL)"]
    errors = ", ".join(f"±{part['error']:.1%} ({sampler})" for sampler, part in referee.items())
    return f"Common to all rows: the referee's error, {errors} of a share.\n\n" + markdown(heads, lines)


def gallery(rows: Sequence[Row]) -> str:
    """Share of the shift and W2 of each reward."""
    names = list(rows[0]["found"]["rewards"])
    lines = []
    for name, (row,) in by_objective(rows).items():
        found = [row["found"]["rewards"][reward] for reward in names]
        shares = [f"{f['share'][0]:.2f}" if f["share"] else "–" for f in found]
        cells = [f"{share}, {f['w2']['tuned']:.3f}" if f["w2"] else "diverged" for share, f in zip(shares, found, strict=True)]
        lines.append([name, f"{row['found']['work'] / 3e6:.1f}", *cells])
    w2 = [rows[0]["found"]["rewards"][reward]["w2"] for reward in names]
    lines += [
        [what, "", *(f"{distance[key]:.3f}" for distance in w2)] for what, key in (("chance alone", "floor"), ("base", "base"))
    ]
    return markdown(["share, W2", "work, million", *names], lines)


def costs(rows: Sequence[Row]) -> str:
    """Of one update, an image."""
    first = rows[0]["found"]["peak_bytes"]
    lines = [
        [
            name,
            f"{row['found']['work']:.1f}",
            f"{row['found']['rewards']:g}",
            "yes" if row["found"]["reward_gradient"] else "no",
            f"{row['found']['peak_bytes'] / first:.2f}",
        ]
        for name, (row,) in by_objective(rows).items()
    ]
    heads = ["objective", "work an image", "rewards an image", "gradient of the reward", "peak memory / that of the first"]
    return markdown(heads, lines)


TABLES = {"mixture": mixture, "digits-ink": digits, "costs": costs}
