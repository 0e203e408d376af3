"""`push_to_hub` and `hub_strategy`: what is sent, and that nothing else is."""

import json
import platform
import re
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, RepoUrl
from tiny_pipelines import sample, sd3
from tiny_trainer import PROMPTS, make_trainer

TOKEN = "hf_" + "x" * 34
PUSH = {"push_to_hub": True, "hub_model_id": "me/bright", "hub_token": TOKEN, "report_to": "tensorboard", "num_images_to_log": 8}


class Hub:
    """Receives uploads as the Hub would: repository → file → content, and the messages of the commits."""

    def __init__(self, monkeypatch):
        self.files, self.messages = {}, []
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", self.create_repo)
        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", self.upload_folder)
        monkeypatch.setattr("huggingface_hub.HfApi.create_commit", self.create_commit)

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, token, run_as_future, revision):
        assert token == TOKEN
        for path in Path(folder_path).rglob("*"):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.files[name] = path.read_bytes()
        return self._done(commit_message, run_as_future)

    def create_commit(self, *, repo_id, operations, commit_message, token, run_as_future, revision):
        assert token == TOKEN
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return self._done(commit_message, run_as_future)

    def _done(self, message, run_as_future):
        self.messages.append(message)
        future = Future()
        future.set_result(None)
        return future if run_as_future else None

    def download(self, folder):
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


def rows():
    return Dataset.from_dict({"prompt": PROMPTS[:2]})


def assert_discreet(files, folder):
    for name, content in files.items():
        text = content.decode("utf-8", "ignore")
        assert str(folder) not in text and str(Path.home()) + "/" not in text, name
        if name.endswith((".md", "config.json", "index.json", "state.json")):  # a short host name is a word of any vocabulary
            assert not re.search(rf"\b{re.escape(platform.node())}\b", text), name
        assert not re.search("hf_[A-Za-z0-9]{30,}", text), name


def test_a_lora_repository(tmp_path, hub):
    trainer = make_trainer(tmp_path / "out", eval_dataset=rows(), eval_strategy="steps", eval_steps=1, **PUSH)
    trainer.train()
    trainer.push_to_hub(dataset_name="me/prompts", tags="mine")
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors", *(f"image_{i}.png" for i in range(4))}
    assert_discreet(hub.files, tmp_path)
    folder = hub.download(tmp_path / "repository")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"adjoint-matching", "lora", "mine"} <= set(card.data.tags)
    assert card.data.datasets == "me/prompts"
    assert [entry["text"] for entry in card.data.widget] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert "| `kl` |" in card.text and "load_lora_weights" in card.text and "2409.08861" in card.text
    fresh = sd3()
    base = sample(fresh)
    fresh.load_lora_weights(folder)
    assert torch.equal(sample(fresh), sample(trainer.pipeline))
    assert not torch.equal(sample(fresh), base)


def test_numpys_strings_are_written_as_plain_ones(tmp_path):
    """`numpy.random.choice` draws such prompts; YAML and `repr` write them as calls."""
    rows = tuple({"prompt": np.str_(prompt), "negative_prompt": np.str_("grey")} for prompt in ("a cat", "a dog"))
    trainer = make_trainer(tmp_path, rows=rows, max_steps=1, num_images_to_log=2)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.widget[0]["text"] == "a cat"
    assert 'prompt="a cat"' in card.text and 'negative_prompt="grey"' in card.text and "str_" not in card.text


def test_a_full_repository_is_a_pipeline(tmp_path, hub):
    sd3().save_pretrained(tmp_path / "base")
    pipeline = type(sd3()).from_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", pipeline=pipeline, lora=False, learning_rate=1e-3, **PUSH)
    trainer.train()
    trainer.push_to_hub()
    assert_discreet(hub.files, tmp_path)
    assert not any(name.startswith(("samples/", "runs/", "_", "checkpoint")) for name in hub.files)
    folder = hub.download(tmp_path / "repository")
    loaded = type(pipeline).from_pretrained(folder)
    assert type(loaded.scheduler) is type(sd3().scheduler)
    assert torch.equal(sample(loaded), sample(trainer.pipeline))
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "text-to-image"


@pytest.mark.parametrize(
    ("strategy", "messages", "checkpoints"),
    [
        ("end", [], set()),
        ("every_save", ["step 1", "step 2"], set()),
        ("checkpoint", ["step 1", "step 1, checkpoint", "step 2", "step 2, checkpoint"], {"last-checkpoint"}),
        (
            "all_checkpoints",
            ["step 1", "step 1, checkpoint", "step 2", "step 2, checkpoint"],
            {"checkpoint-1", "checkpoint-2"},
        ),
    ],
)
def test_strategies(tmp_path, hub, strategy, messages, checkpoints):
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": strategy, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    trainer = make_trainer(tmp_path / "out", eval_dataset=rows(), **PUSH, **saving, **best)
    trainer.train()
    assert hub.messages == [f"Training in progress, {message}" for message in messages]
    assert {name.split("/")[0] for name in hub.files if "/" in name} == checkpoints
    assert_discreet(hub.files, tmp_path)
    if messages:
        assert "pytorch_lora_weights.safetensors" in hub.files
    for name in checkpoints:
        assert {"optimizer.pt", "trainer_state.json"} <= {path.split("/")[1] for path in hub.files if path.startswith(name)}
        state = json.loads(hub.files[f"{name}/trainer_state.json"])
        assert re.fullmatch(r"checkpoint-\d", state["best_model_checkpoint"])
    trainer.save_model()  # called by the user, it pushes
    assert hub.messages[-1] == "Model save"


def test_a_checkpoint_of_all_weights_tells_no_local_path(tmp_path, hub):
    """The hosts write into each config where its network was loaded from."""
    sd3().save_pretrained(tmp_path / "secret-project")
    pipeline = type(sd3()).from_pretrained(tmp_path / "secret-project")
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "max_steps": 1}
    trainer = make_trainer(tmp_path / "out", pipeline=pipeline, lora=False, **PUSH, **saving)
    trainer.train()
    written = (tmp_path / "out/checkpoint-1/transformer/config.json").read_text()
    assert "secret-project" in written  # else this test would show nothing
    assert "last-checkpoint/transformer/config.json" in hub.files
    assert_discreet(hub.files, tmp_path)
    again = make_trainer(tmp_path / "again", lora=False, max_steps=2)
    again.train(resume_from_checkpoint=str(hub.download(tmp_path / "repository") / "last-checkpoint"))
    assert again.state.global_step == 2


def test_a_downloaded_checkpoint_goes_on(tmp_path, hub):
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "max_steps": 1}
    make_trainer(tmp_path / "out", **PUSH, **saving).train()
    folder = hub.download(tmp_path / "repository")
    trainer = make_trainer(tmp_path / "again", max_steps=2)
    trainer.train(resume_from_checkpoint=str(folder / "last-checkpoint"))
    assert trainer.state.global_step == 2


def test_a_card_is_written_with_the_model(tmp_path):
    trainer = make_trainer(tmp_path, num_images_to_log=8)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.widget[0]["output"]["url"] == "image_0.png" and (tmp_path / "image_0.png").is_file()


def test_a_card_that_cannot_be_written_does_not_end_training(tmp_path, hub, caplog):
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save"}
    trainer = make_trainer(tmp_path / "out", **PUSH, **saving)
    assert trainer.train().global_step == 2
    assert "pytorch_lora_weights.safetensors" in hub.files
    assert "README.md could not be written (IsADirectoryError" in caplog.text
    with pytest.raises(IsADirectoryError):  # the user asks, after training: nothing is lost by an error
        trainer.push_to_hub()


@pytest.mark.parametrize("how", ["called", "on start"])
def test_the_card_shows_the_tuned_model(tmp_path, hub, how):
    settings = PUSH | {"report_to": "none"}  # the host's tensorboard writes into ./runs before training has begun
    trainer = make_trainer(tmp_path / "out", eval_dataset=rows(), eval_on_start=how == "on start", **settings)
    if how == "called":
        trainer.evaluate()
    trainer.train()
    trainer.push_to_hub()
    assert len([name for name in hub.files if name.startswith("image_")]) == 2  # of the last rollout; an evaluation has four


def test_pushing_an_untrained_model_works(tmp_path, hub):
    trainer = make_trainer(tmp_path / "out", **PUSH)
    trainer.push_to_hub()
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors"}


def test_the_card_shows_the_steps_of_a_grid_of_ones_own(tmp_path):
    """`sigmas` decides how many steps there are, whatever num_inference_steps says."""
    kwargs = {"sigmas": [1.0, 0.8, 0.3], "max_sequence_length": 8}
    trainer = make_trainer(tmp_path, num_inference_steps=7, num_loss_steps=2, pipeline_kwargs=kwargs, max_steps=1)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `num_inference_steps` | 3 |" in text and "num_inference_steps=3," in text and "sigmas=[1.0, 0.8, 0.3]," in text
