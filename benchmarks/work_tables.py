"""Tables of the rows of `work.py`: seeds of one setting side by side, settings in the order of their first row."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from rows import Row


def tables(rows: Sequence[Row]) -> str:
    """A table for each problem that has rows, in markdown."""
    parts = []
    for problem, table in TABLES.items():
        if mine := [row for row in rows if row["setting"]["problem"] == problem]:
            parts.append(f"## {problem}\n\n{table(mine)}")
    return "\n\n".join(parts)


def by_setting(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that differ in their seed alone, together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str({name: value for name, value in row["setting"].items() if name != "seed"}), []).append(row)
    return list(groups.values())


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


HEADS = ["pairing", "cap", "K", "S", "updates", "samples", "learning rate", "updates a rollout", "work, 1000"]


def described(group: Sequence[Row]) -> list[str]:
    """The cells under HEADS."""
    setting, work = group[0]["setting"], mean(row["found"]["work"] for row in group)
    cap = "–" if setting["cap"] is None else f"{setting['cap']:g}"
    numbers = [setting[name] for name in ("steps", "loss_steps", "updates", "batch", "learning_rate", "per_rollout")]
    return [setting["pairing"], cap, *(f"{n:g}" for n in numbers), f"{work / 1000:.0f}"]


def each(values: Sequence[float]) -> str:
    """Mean, and every seed's in brackets."""
    return f"{mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def digits(rows: Sequence[Row]) -> str:
    """Share of the shift by both samplers, and log Z − (E[λr] − KL)."""
    lines, referee = [], rows[0]["found"]["referee"]
    for group in by_setting(rows):
        found = [row["found"] for row in group]
        capped = "–" if found[0]["capped"] is None else f"{mean(f['capped'] for f in found):.0%}"
        shares = [each([f["samplers"][sampler]["share"] for f in found]) for sampler in referee]
        lines.append([*described(group), capped, *shares, each([f["nats"]["gap"] for f in found])])
    errors = ", ".join(f"±{part['error']:.1%} ({sampler})" for sampler, part in referee.items())
    chance = ", ".join(
        f"±{max(row['found']['samplers'][sampler]['error'] for row in rows):.3f} ({sampler})" for sampler in referee
    )
    # Reward's λ, from numbers that the rows have: λ E[r] = log Z − gap + KL.
    nats, before = rows[0]["found"]["nats"], rows[0]["found"]["samplers"]["memoryless"]
    scale = (nats["log_z"] - nats["gap"] + nats["kl"]) / (before["before"] + before["moved"])
    shift = scale * referee["memoryless"]["shift"]
    of_reward = max(row["found"]["samplers"]["memoryless"]["error"] for row in rows) * shift
    of_kl = max(row["found"]["nats"]["error"] for row in rows)
    return (
        f"Common to all rows: the referee's error, {errors} of a share and ±{nats['log_z_error']:.2f} nats. "
        f"From a row's samples, at most: {chance} of a share, ±{of_kl:.2f} nats of its KL and ±{of_reward:.2f} of its λE[r]; "
        f"the last is nearly the same chance in all rows, whose samples have one start noise and one base beside them.\n\n"
        + markdown([*HEADS, "capped", "share, ODE", "share, memoryless", "log Z − (E[λr] − KL)"], lines)
    )


def mixture(rows: Sequence[Row]) -> str:
    """W2 to the tilt by both samplers."""
    start = rows[0]["found"]["w2_base"]
    lines = []
    for group in by_setting(rows):
        distances = [each([row["found"]["w2"][sampler] for row in group]) for sampler in start]
        lines.append([*described(group), *distances])
    base = ", ".join(f"{value:.3f} ({sampler})" for sampler, value in start.items())
    return f"W2 of the base: {base}.\n\n" + markdown([*HEADS, *(f"W2, {sampler}" for sampler in start)], lines)


def gradients(rows: Sequence[Row]) -> str:
    """Variance of the gradient's estimate, in units of that of uniform draws."""
    heads = ["updates before", "K", "S of n", "batches", *rows[0]["found"]["variances"], "uniform / loss"]
    lines = []
    for row in rows:
        setting, found = row["setting"], row["found"]
        uniform = found["variances"]["uniform"]
        lines.append(
            [
                *(str(setting[name]) for name in ("updates", "steps")),
                f"{setting['loss_steps']} of {found['steps']}",
                str(setting["samples"]),
                *(f"{value / uniform:.3f}" for value in found["variances"].values()),
                f"{uniform / found['variances']['loss']:.2f}",
            ]
        )
    return markdown(heads, lines)


TABLES = {"digits-ink": digits, "digits-three": digits, "mixture": mixture, "gradients": gradients}
