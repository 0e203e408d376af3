"""The committed rows of `benchmarks/black_box.py`, and the page that shows them."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import black_box

PAGE = Path(__file__).parents[1] / "docs" / "black_box.md"


def recorded():
    return [json.loads(line) for line in black_box.RECORDED.read_text(encoding="utf-8").splitlines()]


def test_the_record_holds_each_row_once():
    assert sorted(entry["row"] for entry in recorded()) == sorted(black_box.rows(3))


def test_the_page_shows_what_is_recorded():
    page = PAGE.read_text(encoding="utf-8").splitlines()
    found = {entry["row"]: entry for entry in recorded()}
    lines = black_box.table([found[name] for name in black_box.rows(3)])
    assert len(set(lines)) == len(lines) and [line for line in lines if line not in page] == []


def test_the_mixture_s_map_stays_at_the_tilt_and_leaves_it_without_the_paths_cost():
    """Where the paths' law is the tilt R is one number: the deviation vanishes, and the next sweep moves nothing."""
    corrected, plain = (black_box.LineMap(black_box.line.Grid("uniform", 10), mode) for mode in ("path_corrected", "plain"))
    deviations = [corrected.sweep(0.3) for _ in range(40)]
    before = corrected.changes.clone()
    corrected.sweep(0.3)
    assert deviations[-1] < 0.01 < 0.3 < deviations[0]
    near = black_box.AXIS.abs() < 2  # where data are
    assert (corrected.changes - before).abs()[:, near].max() < 0.01
    assert min(plain.sweep(0.3) for _ in range(10)) > 0.5
