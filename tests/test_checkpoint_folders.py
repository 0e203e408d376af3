"""The folders beside and below a checkpoint: what is deleted, in which order, and what is left alone."""

import os

import pytest
import torch
from tiny_trainer import make_trainer

from diffusers_adjoint.trainer.checkpoint import discard_leftovers, rotate, whole_folder

SHORT = {"save_strategy": "steps", "save_steps": 1, "num_inference_steps": 3, "num_loss_steps": 1}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def make_checkpoints(run_dir, *steps):
    """Written in this order, a second apart."""
    for second, step in enumerate(steps):
        (run_dir / f"checkpoint-{step}").mkdir()
        os.utime(run_dir / f"checkpoint-{step}", (second, second))


def no_wait():
    return None


def test_the_oldest_goes_whatever_its_number(tmp_path):
    make_checkpoints(tmp_path, 100, 1, 2)  # 100 is of an earlier run
    rotate(tmp_path, 2, tmp_path / "checkpoint-2", None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_the_best_and_the_newest_stay_and_count(tmp_path):
    make_checkpoints(tmp_path, 1, 2, 3, 4)
    rotate(tmp_path, 2, tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-1"))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def test_a_name_of_no_number_is_no_checkpoint(tmp_path):
    make_checkpoints(tmp_path, 1, 2)
    (tmp_path / "checkpoint-²").mkdir()
    rotate(tmp_path, 1, tmp_path / "checkpoint-2", None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-²"]


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_stay(tmp_path, limit):
    make_checkpoints(tmp_path, 1, 2, 3)
    rotate(tmp_path, limit, tmp_path / "checkpoint-3", None)
    assert len(names(tmp_path)) == 3


def test_a_link_is_removed_and_its_target_stays(tmp_path):
    store, run_dir = tmp_path / "store", tmp_path / "run"
    store.mkdir()
    (store / "weights").write_text("kept")
    os.utime(store, (0, 0))
    run_dir.mkdir()
    (run_dir / "checkpoint-1").symlink_to(store)
    (run_dir / "checkpoint-2").mkdir()
    rotate(run_dir, 1, run_dir / "checkpoint-2", None)
    assert names(run_dir) == ["checkpoint-2"]
    assert (store / "weights").read_text() == "kept"


def test_links_that_lead_nowhere_end_nothing(tmp_path):
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "gone")
    make_checkpoints(tmp_path, 2, 3)
    rotate(tmp_path, 1, tmp_path / "checkpoint-3", None)
    assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "checkpoint-2").exists()
    with whole_folder(tmp_path / "checkpoint-1", True, no_wait) as partial:
        (partial / "weights").write_text("new")
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new" and not (tmp_path / "checkpoint-1").is_symlink()


def test_writing_over_a_link_leaves_its_target(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "weights").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "store")
    with whole_folder(tmp_path / "run" / "checkpoint-1", True, no_wait) as partial:
        (partial / "weights").write_text("new")
    assert names(tmp_path / "run") == ["checkpoint-1"]
    assert (tmp_path / "run" / "checkpoint-1" / "weights").read_text() == "new"
    assert (tmp_path / "store" / "weights").read_text() == "kept"


def test_only_what_our_own_names_mark_as_unfinished_is_deleted(tmp_path):
    ours = ["_checkpoint-4.partial", "_checkpoint-1.deleted", "_model.partial"]
    theirs = ["_checkpoint-2", "_checkpoint-2.bak", "_checkpoint-best.partial", "_checkpoint-2.partial.old", "_model"]
    for name in ours + theirs:
        (tmp_path / name).mkdir()
    (tmp_path / "_checkpoint-5.deleted").symlink_to(tmp_path / "_checkpoint-2")  # a link, killed while it was removed
    discard_leftovers(tmp_path)
    assert names(tmp_path) == sorted(theirs)


def test_a_checkpoint_renamed_to_be_kept_is_kept(tmp_path):
    make_trainer(tmp_path, **SHORT).train()
    (tmp_path / "checkpoint-1").rename(tmp_path / "_checkpoint-1")
    make_trainer(tmp_path, **SHORT | {"max_steps": 1}).train()
    assert names(tmp_path) == ["_checkpoint-1", "checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "_checkpoint-1" / "trainer_state.json").is_file()


@pytest.mark.slow
def test_a_linked_checkpoint_trains_on_and_is_rotated_away(tmp_path):
    make_trainer(tmp_path / "store", **SHORT).train()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "store" / "checkpoint-2")
    settings = SHORT | {"max_steps": 4, "save_total_limit": 1}
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert names(tmp_path / "run") == ["checkpoint-4"]
    assert (tmp_path / "store" / "checkpoint-2" / "optimizer.pt").is_file()
    make_trainer(tmp_path / "run", **settings | {"max_steps": 1}).train()


def test_a_save_that_fails_gives_its_room_back(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SHORT)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert names(tmp_path) == []
