"""The committed rows of `benchmarks/video_memory.py`, the page that shows them, and what the script measures with."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import video_memory
from rows import read

PAGE = Path(__file__).parents[1] / "docs" / "choosing_settings.md"


def test_the_record_holds_each_row_once():
    assert [row["setting"] for row in read(video_memory.RECORDED)] == [asdict(setting) for setting in video_memory.settings()]


def test_the_page_shows_what_is_recorded():
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in video_memory.table(read(video_memory.RECORDED)).splitlines() if line not in page] == []


def test_a_row_that_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(video_memory, "run", lambda setting: calls.append(setting) or {"all": dict.fromkeys(NAMES, 1.0)})
    for _ in range(2):
        video_memory.main(["--rows", str(tmp_path / "rows.jsonl")])
    assert calls == video_memory.settings()
    assert capsys.readouterr().out.count("\n| Wan ") == 2


NAMES = ("seconds", "peak")


@pytest.mark.slow
def test_what_is_measured():
    """On a short video: less is held for the whole by slices than for the whole, and less yet for its beginning."""
    torch.manual_seed(0)
    found = video_memory.run(video_memory.Setting("Wan", 3, 4, repeats=1))
    assert set(found) == set(video_memory.CHOICES)
    assert all(set(measured) == set(NAMES) for measured in found.values())
    assert found["first"]["peak"] < found[video_memory.EVERY]["peak"] < 0.8 * found["all"]["peak"]
