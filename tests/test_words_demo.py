"""`make words`, shortened, and what it draws."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples" / "words")]

import demo_words  # noqa: E402
import recognisers  # noqa: E402
import words as benchmark  # noqa: E402
from demo_words import Settings, make_trainer  # noqa: E402
from drawn import draw, draw_and_judge, load_pipeline  # noqa: E402
from sheets import save_pairs  # noqa: E402
from word_pictures import TUNED_WORDS, prompt  # noqa: E402

from diffusers_adjoint import AdjointMatchingTrainer  # noqa: E402

WORDS, SEED = TUNED_WORDS[:6], 7


@pytest.mark.slow
def test_the_whole_command_ends_in_five_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo_words, "BASE_IMAGES", {"memoryless": 12, "ODE": 8})
    monkeypatch.setattr(demo_words, "TUNED_IMAGES", {"memoryless": 6, "ODE": 8})
    monkeypatch.setattr(sys, "argv", ["demo_words.py", "--output", str(tmp_path), "--updates", "2", "--words", "2"])
    demo_words.main()
    folder = tmp_path / "2-updates-seed-0"
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line[:3] for line in last] == [f"{i}. " for i in range(1, 6)]
    assert set(last) < set((folder / "report.md").read_text(encoding="utf-8").splitlines())
    written = {path.name for path in folder.iterdir()}
    assert {"trained.png", "held_out.png", "pytorch_lora_weights.safetensors"} <= written and "checkpoint-2" not in written
    fresh, words = load_pipeline(), list(WORDS[:2])
    before = draw(fresh, words, "memoryless", SEED)
    fresh.load_lora_weights(folder)
    assert not torch.equal(draw(fresh, words, "memoryless", SEED), before)


class Updates(TrainerCallback):
    """Counts the updates of a run, and interrupts it after one of them."""

    def __init__(self, last: int) -> None:
        self.last, self.steps = last, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.last:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, runs, told = Settings(updates=12, images=4), [Updates(11), Updates(99)], []
    for updates in runs:

        def watched(*given: Any, updates: Updates = updates) -> AdjointMatchingTrainer:
            trainer = make_trainer(*given)
            trainer.add_callback(updates)
            return trainer

        monkeypatch.setattr(demo_words, "make_trainer", watched)
        with contextlib.suppress(KeyboardInterrupt):
            told.append(demo_words.fine_tune(load_pipeline(), settings, tmp_path))
    assert [updates.steps for updates in runs] == [[*range(1, 12)], [11, 12]]
    assert len(told) == 1
    assert "12 updates of 4 images, seed 0; the updates after number 10, where an earlier start was stopped, took" in told[0]


@pytest.mark.parametrize(("images", "batch", "steps"), [(64, 32, 2), (48, 24, 2), (20, 20, 1), (31, 31, 1), (33, 11, 3)])
def test_an_update_has_the_images_of_its_setting(images: int, batch: int, steps: int, tmp_path: Path) -> None:
    args = make_trainer(load_pipeline(), Settings(images=images), tmp_path, probe_base=False).args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (batch, steps)


def test_processes_that_cannot_share_an_update_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_words, "PartialState", lambda **_: SimpleNamespace(num_processes=3))
    monkeypatch.setattr(sys, "argv", ["demo_words.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="^3 processes cannot share 64 images equally"):
        demo_words.main()


@pytest.mark.slow
def test_the_readme_uses_the_reward_in_another_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "examples" / "words" / "README.md").read_text(encoding="utf-8")
    *_, block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    exec(block.replace("out/my-words", str(tmp_path)), namespace)
    assert namespace["trainer"].state.global_step == 2
    assert any("lora" in name for name, _ in namespace["pipe"].transformer.named_parameters())


@pytest.mark.parametrize(("option", "value"), [("--words", "0"), ("--words", "19"), ("--updates", "-1"), ("--seed", "x")])
def test_a_wrong_option_is_one_sentence(option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["demo_words.py", option, value])
    with pytest.raises(SystemExit):
        demo_words.main()
    assert f"argument {option}: {value} is no whole number from" in capsys.readouterr().err


@pytest.mark.parametrize("command", [demo_words, benchmark])
def test_a_missing_recogniser_ends_the_command_with_its_sentence(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a command"])
    monkeypatch.setattr(recognisers, "find_spec", lambda name: None)
    recognisers.recogniser.cache_clear()
    with pytest.raises(SystemExit, match="^The weights of PP-OCRv4 come with the package"):
        command.main()


@pytest.mark.slow
def test_thirty_updates_raise_the_reward_and_the_judge(tmp_path: Path) -> None:
    """By more than two standard errors of the paired difference: with λ = 1 the exact target is three nats above the base."""
    pipeline = load_pipeline()
    before = draw_and_judge(pipeline, TUNED_WORDS, 24, "memoryless", SEED).statistics()
    trainer = make_trainer(pipeline, Settings(updates=30), tmp_path, probe_base=False, disable_tqdm=True)
    assert set(trainer.train_dataset["prompt"]) == set(map(prompt, TUNED_WORDS))
    trainer.train()
    after = draw_and_judge(pipeline, TUNED_WORDS, 24, "memoryless", SEED).statistics()
    for name in ("log p, v4 (reward), nats", "log p, v6 (judge), nats"):
        rise = (after[name] - before[name]).flatten()
        assert rise.mean() > 2 * rise.std() / len(rise) ** 0.5, name


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
