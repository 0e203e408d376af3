"""`make words`, shortened, and what it draws."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples" / "words")]

import demo_words  # noqa: E402
import words as benchmark  # noqa: E402
from demo_words import Settings, make_trainer  # noqa: E402
from drawn import draw, draw_and_judge, font_shares, load_pipeline  # noqa: E402
from sheets import save_pairs  # noqa: E402
from word_pictures import FONTS, TUNED_WORDS  # noqa: E402

WORDS, SEED = TUNED_WORDS[:6], 7


@pytest.mark.slow
def test_the_whole_command_ends_in_five_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo_words, "BASE_IMAGES", {"memoryless": 12, "ODE": 8})
    monkeypatch.setattr(demo_words, "TUNED_IMAGES", {"memoryless": 6, "ODE": 8})
    monkeypatch.setattr(sys, "argv", ["demo_words.py", "--output", str(tmp_path), "--updates", "2", "--words", "2"])
    demo_words.main()
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line[:3] for line in last] == [f"{i}. " for i in range(1, 6)]
    assert {"trained.png", "held_out.png", "report.md", "pytorch_lora_weights.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    fresh, words = load_pipeline(), list(WORDS[:2])
    before = draw(fresh, words, "memoryless", SEED)
    fresh.load_lora_weights(tmp_path)
    assert not torch.equal(draw(fresh, words, "memoryless", SEED), before)


@pytest.mark.slow
def test_thirty_updates_raise_the_reward_and_the_judge(tmp_path: Path) -> None:
    """By more than two standard errors of the paired difference: with λ = 1 the exact target is three nats above the base."""
    pipeline = load_pipeline()
    before = draw_and_judge(pipeline, TUNED_WORDS, 24, "memoryless", SEED).statistics()
    make_trainer(pipeline, Settings(updates=30), tmp_path, probe_base=False, disable_tqdm=True).train()
    after = draw_and_judge(pipeline, TUNED_WORDS, 24, "memoryless", SEED).statistics()
    for name in ("log p, v4 (reward), nats", "log p, v6 (judge), nats"):
        rise = (after[name] - before[name]).flatten()
        assert rise.mean() > 2 * rise.std() / len(rise) ** 0.5, name


@pytest.mark.slow
def test_font_shares_of_base_target_and_tuned_sum_to_one() -> None:
    pipeline = load_pipeline()
    base = draw_and_judge(pipeline, WORDS[:2], 6, "ODE", SEED)
    shares = font_shares(base, base, 0.5)
    assert all(share.shape == (len(FONTS),) and share.sum().item() == pytest.approx(1) for share in shares.values())
    torch.testing.assert_close(shares["base"], shares["tuned"])


def test_the_tables_of_the_docs_are_those_of_the_recorded_rows() -> None:
    rows = benchmark.read(benchmark.RECORDED)
    assert not benchmark.missing(benchmark.settings(), rows)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(table in page for table in benchmark.tables(rows).split("\n\n"))


def test_pairs_are_drawn_with_what_was_read(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 16, 48)
    readings = {"v4": (["one", "x", "three"], ["one", "two", "three"])}
    save_pairs(tmp_path / "pairs.png", ["one", "two", "three"], images, 1 - images, readings, columns=2)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.width > 2 * 4 * 48 and sheet.height > 2 * 2 * 4 * 16  # two columns, two rows of pairs
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(maxcolors=10**6)}
    assert {(26, 127, 55), (198, 40, 40)} <= colours  # right in green, wrong in red
