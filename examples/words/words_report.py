"""What `make words` says and shows at its end."""

from __future__ import annotations

from pathlib import Path

from drawn import (
    GAP,
    GROUPS,
    JUDGE,
    REWARD,
    RIGHT_V4,
    RIGHT_V6,
    Drawn,
    Pictures,
    compare,
    effective_images,
    find_shift,
    font_distance,
    font_shares,
    percent,
)
from judges import has_tesseract
from sheets import save_pairs
from torch import Tensor
from word_pictures import FONTS

from diffusers_adjoint.metrics import Estimate, TiltReport, TiltShift, markdown_table, sample_mean
from diffusers_adjoint.metrics.tilt import MIN_EFFECTIVE_SAMPLES

TESSERACT_IMAGES = 8  # of each word; a tenth of a second each
HOW_TO_READ = """The ODE (28 steps) is how a user draws. The memoryless sampler (10 steps) adds the noise that training uses, and
only its samples follow the exact target p_base·exp(λr), which is known from weighted images of the base. "Rise" is the mean
difference between images of the same noise, and "after" is the base's mean plus the rise."""


def write_report(folder: Path, base: Pictures, tuned: Pictures, reward_scale: float, title: str) -> None:
    """Writes report and pictures, and prints the five sentences."""
    reports = {key: compare(base[key], tuned[key], reward_scale, key[1]) for key in base}
    fonts = font_shares(base["trained", "memoryless"], tuned["trained", "memoryless"], reward_scale)
    tesseract = read_by_tesseract(base["trained", "ODE"], tuned["trained", "ODE"])
    found = sentences(reports, fonts, len(base["trained", "ODE"].words), tesseract)
    found = [f"{i}. {sentence}" for i, sentence in enumerate(found, 1)]
    tables = [f"## {name} words, {sampler}\n\n{format_report(report)}" for (name, sampler), report in reports.items()]
    if not reports["trained", "memoryless"].shifts[0].target.estimable:
        fonts.pop("target")
    rows = [["font", *fonts], *([name, *(f"{fonts[key][i]:.3f}" for key in fonts)] for i, name in enumerate(FONTS))]
    tables.append(f"## fonts, trained words, memoryless\n\n{markdown_table(rows)}")
    (folder / "report.md").write_text(
        "\n\n".join(["# Fine-tuning on a text recogniser", title, "\n".join(found), HOW_TO_READ, *tables]) + "\n",
        encoding="utf-8",
    )
    save_sheets(folder, base, tuned)
    print(f"\n{title} Pictures, tables (report.md) and LoRA are in {folder}/\n")
    print("\n".join(found))


def save_sheets(folder: Path, base: Pictures, tuned: Pictures, per_word: int = 2) -> None:
    """`trained.png` and `held_out.png`: the first images of each word by the ODE, as a user draws them."""
    for name in GROUPS:
        before, after = base[name, "ODE"], tuned[name, "ODE"]
        count = len(before.words)
        chosen = [w + i * count for w in range(count) for i in range(per_word)]
        words = [before.asked()[i] for i in chosen]
        readings = {
            "v4": tuple([drawn.judged.read_v4[i] for i in chosen] for drawn in (before, after)),
            "v6": tuple([drawn.judged.read_v6[i] for i in chosen] for drawn in (before, after)),
        }
        save_pairs(folder / f"{name.replace(' ', '_')}.png", words, before.images[chosen], after.images[chosen], readings)


def sentences(reports: dict[tuple[str, str], TiltReport], fonts: dict[str, Tensor], words: int, tesseract: str) -> list[str]:
    """What came out, in words. `tesseract`: what Tesseract reads, or nothing."""
    trained, held_out = (reports[name, "memoryless"] for name in GROUPS)
    ode = reports["trained", "ODE"]

    def change(report: TiltReport, statistic: str) -> str:
        shift = find_shift(report, statistic)
        points = percent(shift.rise).replace("%", "points")
        return f"{percent(shift.before)} before and {percent(shift.after)} after fine-tuning, a rise of {points}"

    reward, judge, gap = (find_shift(trained, name) for name in (REWARD, JUDGE, GAP))
    way = f"no share is known, because {unknown(reward)}"
    if reward.fraction and judge.fraction:
        way = (
            f"the reward has gone {percent(reward.fraction)} and the judge {percent(judge.fraction)}; the shares of the fonts "
            f"are {font_distance(fonts, 'tuned'):.2f} from the target's, and those of the base {font_distance(fonts, 'base'):.2f}"
        )
    in_target = f" and {gap.target} in the target" if gap.target.estimable else ""
    return [
        f"PP-OCRv4, the reward, reads the word asked for in {change(trained, RIGHT_V4)}, in images of {words} trained words "
        f"by the memoryless sampler (by the ODE: {change(ode, RIGHT_V4)}).",
        f"PP-OCRv6, which no training has seen, reads it in {change(trained, RIGHT_V6)} (by the ODE: {change(ode, RIGHT_V6)})"
        f"{tesseract}.",
        f"Of words that no prompt of training names, v4 reads {change(held_out, RIGHT_V4)}, and v6 reads "
        f"{change(held_out, RIGHT_V6)}.",
        f"Of the way from the base to the exact target p_base·exp(λr), {way}.",
        f"Log p of v4 less that of v6 is {gap.before} nats a letter before, {gap.after} after{in_target}; it rises when a "
        "reward is hacked.",
    ]


def unknown(shift: TiltShift) -> str:
    """Why the share of the way is not known."""
    if shift.target.estimable:
        return "the target is within two standard errors of the base"
    effective = effective_images(shift.target)
    return f"a word's images of the base count as {effective:.0f} of the target, and {MIN_EFFECTIVE_SAMPLES} are needed"


def read_by_tesseract(base: Drawn, tuned: Drawn) -> str:
    """The end of the second sentence, where Tesseract is installed."""
    if not has_tesseract():
        return ""
    count = min(TESSERACT_IMAGES, base.per_word)
    before, after = (percent(sample_mean(drawn.read_by_tesseract(count).flatten())) for drawn in (base, tuned))
    return f", and Tesseract in {before} before and {after} after (ODE, {count} images a word)"


def format_report(report: TiltReport) -> str:
    """A row a statistic; for the memoryless sampler also target and share, if there are images enough to know them."""
    target = report.shifts[0].target
    rows = [["statistic", "before", "after", "rise"]]
    rows += [[shift.statistic, str(shift.before), str(shift.after), str(shift.rise)] for shift in report.shifts]
    if report.shifts[0].sampler != "memoryless":
        return markdown_table(rows)
    if not target.estimable:
        return f"{markdown_table(rows)}\n\nThe exact target is not known: {unknown(report.shifts[0])}."
    rows[0] += ["exact target", "share of the way"]
    for row, shift in zip(rows[1:], report.shifts, strict=True):
        row += [str(shift.target), str(shift.fraction or "–")]
    kl = Estimate(target.kl_target, target.kl_target_standard_error)
    effective = f"A word's images of the base count as {effective_images(target):.0f} of the target, or more."
    return f"{markdown_table(rows)}\n\nKL of the exact target to the base: {kl} nats. {effective}"
