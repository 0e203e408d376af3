"""Every file of a checkpoint, damaged in every way: the newest whole checkpoint is taken, and a named one is refused."""

import functools
import json
import shutil

import pytest
from datasets import Dataset
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, difference, evaluates_to, make_trainer, weights
from transformers import TrainerCallback

from diffusers_adjoint.trainer.checkpoint import checkpoint_to_resume

SHORT = {"save_strategy": "steps", "save_steps": 1, "num_inference_steps": 3, "num_loss_steps": 1, "learning_rate": 1e-3}
STATE = ["optimizer.pt", "rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json"]
LORA = [*STATE, "pytorch_lora_weights.safetensors"]
SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FULL = [*STATE, *SHARDS, "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"]
PLAIN = ["trainer_state.json", "optimizer.pt", "scheduler.pt"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def remove(file):
    file.unlink()


def scribble(file):
    file.write_bytes(b"\x80garbage\x00" * 40)


def nest(file):
    """JSON of a depth that Python's reader does not follow."""
    file.write_bytes(b"[" * 100_000)


DAMAGES = [truncate, empty, flip, remove, scribble, nest]


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    make_trainer(folder, **SHORT).train()
    return folder


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    folder, pipeline = tmp_path_factory.mktemp("full"), sd3()
    save = pipeline.transformer.save_pretrained
    pipeline.transformer.save_pretrained = functools.partial(save, max_shard_size="40KB")
    make_trainer(folder, pipeline=pipeline, lora=False, **SHORT).train()
    return folder


def copy_of(run, folder):
    shutil.copytree(run, folder)
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_lists_are_complete(lora_run, full_run):
    """Of what is damaged below."""
    assert files_of(lora_run / "checkpoint-2") == sorted(LORA)
    assert files_of(full_run / "checkpoint-2") == sorted(FULL)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "name"), [("lora", name) for name in LORA] + [("full", name) for name in FULL])
def test_a_damaged_file_is_seen(tmp_path, request, caplog, kind, name, damage):
    run_dir = copy_of(request.getfixturevalue(f"{kind}_run"), tmp_path / "run")
    caplog.clear()  # what the run said that is made here for the first test
    needed = [*PLAIN, "transformer" if kind == "full" else "pytorch_lora_weights.safetensors"]
    damage(run_dir / "checkpoint-2" / name)
    if name == "run.json" and damage is remove:  # looks like a checkpoint of an earlier version, whose files are whole
        assert checkpoint_to_resume(True, run_dir, needed) == str(run_dir / "checkpoint-2")
        assert "holds no run.json: whether its files are complete and fit this run is not checked." in caplog.text
        return
    assert checkpoint_to_resume(True, run_dir, needed) == str(run_dir / "checkpoint-1")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(str(run_dir / "checkpoint-2")) and name in line and line.endswith("skipped.")
    with pytest.raises(ValueError, match="pass a checkpoint folder that a trainer with these settings wrote") as caught:
        checkpoint_to_resume(str(run_dir / "checkpoint-2"), run_dir, needed)
    assert name in str(caught.value) and ",;" not in str(caught.value)


def test_training_goes_on_from_the_whole_one(tmp_path, lora_run):
    name = "pytorch_lora_weights.safetensors"
    run_dir = copy_of(lora_run, tmp_path / "run")
    flip(run_dir / "checkpoint-2" / name)
    whole = make_trainer(copy_of(lora_run, tmp_path / "whole"), **SHORT)
    whole.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    trainer = make_trainer(run_dir, **SHORT)
    with pytest.raises(
        ValueError, match=f"checkpoint-2 is damaged: its {name} (is missing or )?has changed since it was written"
    ):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.log_history[0]["step"] == 1 and trainer.state.global_step == 2
    assert difference(weights(whole), weights(trainer)) == 0.0


def test_nothing_whole_is_no_checkpoint(tmp_path, lora_run):
    run_dir = copy_of(lora_run, tmp_path / "run")
    for step in (1, 2):
        flip(run_dir / f"checkpoint-{step}" / "scheduler.pt")
    with pytest.raises(ValueError, match="holds no complete checkpoint; pass resume_from_checkpoint=None"):
        make_trainer(run_dir, **SHORT).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_best_weights_are_checked_before_they_are_loaded(tmp_path, lora):
    trainer = make_trainer(
        tmp_path,
        lora=lora,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        **SHORT,
    )
    evaluates_to(trainer, [1.0, 0.0])
    best = tmp_path / "checkpoint-1"
    file = best / ("pytorch_lora_weights.safetensors" if lora else "transformer/diffusion_pytorch_model.safetensors")

    class Damaging(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 1:
                flip(file)

    trainer.add_callback(Damaging())
    with pytest.raises(ValueError, match=f"the best checkpoint .*checkpoint-1 is damaged: its {file.relative_to(best)}"):
        trainer.train()
    last = make_trainer(tmp_path, lora=lora, **SHORT)
    assert last.train(resume_from_checkpoint=True).global_step == 2


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, lora_run, caplog):
    run_dir = copy_of(lora_run, tmp_path / "run")
    for step in (1, 2):
        (run_dir / f"checkpoint-{step}" / "run.json").unlink()
    trainer = make_trainer(run_dir, **SHORT | {"max_steps": 3})
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert "checkpoint-2 holds no run.json" in caplog.text
    assert json.loads((run_dir / "checkpoint-3" / "run.json").read_text())["files"].keys() == set(LORA) - {"run.json"}
