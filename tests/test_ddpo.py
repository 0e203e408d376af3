"""Scripts for TRL's removed DDPOTrainer and AlignPropTrainer: what they ask for is what they get, or they are told."""

import difflib
import random
import re
import runpy
import sys
from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from huggingface_hub import RepoUrl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pipelines import sd3, sd15
from tiny_rewards import IMAGE_SIZE, aesthetic_head, tiny_clip
from tiny_trainer import weights
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPModel

from diffusers_adjoint import AdjointMatchingConfig
from diffusers_adjoint.ddpo import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
    aesthetic_scorer,
    config_from_ddpo,
)

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "migrating_from_ddpo.md"
SCRIPTS = {"ddpo.py": TESTS / "ddpo_script_old.py", "alignprop.py": TESTS / "alignprop_script_old.py"}
MODERN = TESTS / "ddpo_script_modern.py"
SUBJECTS = ["a cat", "a dog", "a red car", "the sea"]


def draw_prompt():
    subject = random.choice(SUBJECTS)
    return f"{subject} {np.random.randint(100)}", {"subject": subject}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {"subjects": [entry["subject"] for entry in metadata]}


def brightness_alone(images, prompts, metadata):
    return images.mean((1, 2, 3))


def small(folder, kind=DDPOConfig, **fields):
    names = {"sample_batch_size": 2} if kind is DDPOConfig else {"train_batch_size": 2}
    short = {"num_epochs": 2, "sample_num_steps": 3, "sample_guidance_scale": 1.0, "save_freq": 100}
    return kind(**{"logdir": str(folder)} | short | names | fields)


def make_trainer(config, reward=brightness, hook=None, build=sd15, prompts=draw_prompt, **changes):
    changes = {"use_cpu": True, "disable_tqdm": True, "reward_scale": 50.0} | changes
    return DDPOTrainer(config, reward, prompts, build(), hook, **changes)


# --------------------------------------------------------------------------------------------------------------- the old scripts


def diff_on_the_page(name):
    """Lines of the diff that the page shows for a script."""
    (shown,) = re.findall(rf"^```diff\n--- {re.escape(name)}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return shown.splitlines(keepends=True)[1:]


def changed_as_the_page_says(name):
    """The old script after the page's diff: each hunk's old lines, found exactly once, give way to its new ones."""
    text = SCRIPTS[name].read_text(encoding="utf-8")
    for hunk in "".join(diff_on_the_page(name)).split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_shows_and_counts_the_lines_that_change(name):
    old = SCRIPTS[name].read_text(encoding="utf-8")
    versions = [text.splitlines(keepends=True) for text in (old, changed_as_the_page_says(name))]
    assert diff_on_the_page(name) == list(difflib.unified_diff(*versions, n=1))[2:]
    removed, added = (sum(line[0] == sign for line in diff_on_the_page(name)) for sign in "-+")
    assert f"`{name}`: {removed} lines go, {added} come" in PAGE.read_text(encoding="utf-8")


def test_the_page_shows_the_modern_script():
    assert f"```python\n{MODERN.read_text(encoding='utf-8')}```" in PAGE.read_text(encoding="utf-8")


@pytest.fixture
def base(tmp_path):
    sd15().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the scripts name lies in the working folder, where the loaders look first; uploads are only remembered."""
    monkeypatch.chdir(tmp_path)
    sd15().save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    tiny_clip(Path("openai/clip-vit-large-patch14"))
    Path("trl-lib/ddpo-aesthetic-predictor").mkdir(parents=True)
    torch.save(aesthetic_head(), "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth")
    uploads = []

    def upload_folder(self, **upload):
        uploads.append(upload)
        done = Future()
        done.set_result(None)
        return done

    def create_repo(self, repo_id, **_):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    return uploads


def run(source, monkeypatch, **options):
    """A script in this process, under the command line that its reader would give it."""
    Path("script.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["script.py", *(f"--{name}={value}" for name, value in options.items())])
    return runpy.run_path("script.py", run_name="__main__")


SHORT = {"num_epochs": 2, "sample_num_steps": 3, "save_freq": 2, "mixed_precision": "no", "train_learning_rate": 0.01}


def assert_the_lora_changes(pipeline, folder):
    before = pixels(pipeline)
    pipeline.load_lora_weights(folder)
    assert not torch.equal(pixels(pipeline), before)


def pixels(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_the_ddpo_script_runs_to_its_last_line(hub, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = SHORT | {"sample_batch_size": 2, "sample_num_batches_per_epoch": 1, "log_with": "tensorboard"}
    left = run(changed_as_the_page_says("ddpo.py"), monkeypatch, **options)
    assert left["training_args"].output_dir == "./save" and hub == []
    assert sorted(path.name for path in (tmp_path / "save").glob("checkpoint-*")) == ["checkpoint-2"]
    assert_the_lora_changes(sd15(), tmp_path / "save")

    (events,) = (tmp_path / "save" / "runs").glob("*/events*")
    logged = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    named = [tag for tag in logged.Tags()["images"] if " | " in tag]
    assert {image.step for tag in named for image in logged.Images(tag)} == {1, 2}
    assert "train/rewards/score/mean" in logged.Tags()["scalars"]


def test_the_alignprop_script_runs_to_its_last_line(hub, tmp_path, monkeypatch):
    options = SHORT | {"train_batch_size": 2, "push_to_hub": True, "hub_model_id": "me/bright", "log_with": "tensorboard"}
    left = run(changed_as_the_page_says("alignprop.py"), monkeypatch, **options)
    assert left["training_args"].output_dir == "./save"
    assert_the_lora_changes(sd15(), tmp_path / "save")
    assert {upload["repo_id"] for upload in hub} == {"me/bright"} and hub[-1]["commit_message"] == "End of training"
    assert any(line.get("rewards/AestheticScorer/mean") for line in left["trainer"].state.log_history)


def test_the_modern_script_runs(hub, tmp_path, monkeypatch):
    options = {"output_dir": "warm", "max_steps": 1, "num_inference_steps": 3, "reward_scale": 50.0}
    run(MODERN.read_text(encoding="utf-8"), monkeypatch, **options)
    assert (tmp_path / "warm" / "pytorch_lora_weights.safetensors").is_file()


# -------------------------------------------------------------------------------------------------------------------- the config


def test_defaults_of_ddpo_become_one_update_an_epoch(caplog):
    config = config_from_ddpo(DDPOConfig(), use_cpu=True)
    expected = {
        "seed": 0,
        "output_dir": "logs",
        "max_steps": 100,
        "save_steps": 1,
        "save_total_limit": 5,
        "num_inference_steps": 50,
        "num_loss_steps": 50,
        "guidance_scale": 5.0,
        "cfg_mode": "rollout",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 1e-4,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "report_to": [],
        "project": "trl",
        "run_name": None,
        "bf16": False,
        "push_to_hub": False,
        "reward_scale": 1.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert not caplog.messages


def test_defaults_of_alignprop(caplog):
    config = config_from_ddpo(AlignPropConfig(train_batch_size=3, train_gradient_accumulation_steps=4), use_cpu=True)
    batch = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert (batch, config.learning_rate, config.max_steps, config.num_loss_steps) == ((3, 4), 1e-3, 100, None)
    assert not caplog.messages


def test_what_a_tracker_was_to_be_given_is_not_told(caplog):
    config_from_ddpo(DDPOConfig(tracker_kwargs={"comet_ml": {"api_key": "secret"}}), use_cpu=True)
    (message,) = caplog.messages
    assert message.startswith("tracker_kwargs is ignored: ") and "secret" not in message


def test_fields_that_change_their_values(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    old = DDPOConfig(
        run_name="first",
        log_with="tensorboard",
        negative_prompts="grey",
        train_cfg=False,
        train_use_8bit_adam=True,
        train_timestep_fraction=0.5,
        sample_num_steps=9,
        allow_tf32=False,
        resume_from=str(tmp_path),
        project_kwargs={"project_dir": "here", "total_limit": 2},
    )
    config = config_from_ddpo(old, use_cpu=True, pipeline_kwargs={"height": 16})
    assert (config.run_name, config.report_to, config.cfg_mode, config.tf32) == ("first", ["tensorboard"], "none", False)
    assert (config.optim, config.num_loss_steps, config.output_dir, config.save_total_limit) == ("adamw_bnb_8bit", 4, "here", 2)
    assert config.pipeline_kwargs == {"negative_prompt": "grey", "height": 16}
    assert config.resume_from_checkpoint == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("kind", [DDPOConfig, AlignPropConfig])
def test_output_dir_is_where_the_trainer_writes(kind):
    """The old scripts read it after they have set project_kwargs, and some set it themselves."""
    config = kind(logdir="logs-here")
    assert config.output_dir == config_from_ddpo(config, use_cpu=True).output_dir == "logs-here"
    config.project_kwargs = {"project_dir": "save-here", "total_limit": 3}
    assert config.output_dir == config_from_ddpo(config, use_cpu=True).output_dir == "save-here"
    config.output_dir = "rather-here"
    assert config.output_dir == config_from_ddpo(config, use_cpu=True).output_dir == "rather-here"
    assert config.project_kwargs["total_limit"] == 3


def test_output_dir_of_a_users_own_config_comes_before_logdir():
    old = {"logdir": "logs", "project_kwargs": {"project_dir": "save"}, "output_dir": "mine"}
    assert config_from_ddpo(old, use_cpu=True).output_dir == config_from_ddpo(Namespace(**old), use_cpu=True).output_dir == "mine"


def test_hub_model_id_is_passed_on():
    config = config_from_ddpo(DDPOConfig(hub_model_id="me/model", exp_name="mine"), use_cpu=True)
    assert config.hub_model_id == "me/model"


@pytest.mark.parametrize("kind", [dict, lambda **fields: Namespace(**fields)], ids=["dict", "object"])
def test_a_part_of_the_fields_is_enough_and_modern_ones_are_passed_on(kind, caplog):
    config = config_from_ddpo(kind(num_epochs=3, output_dir="out"), use_cpu=True, num_loss_steps=2)
    ours = AdjointMatchingConfig("out", max_steps=3, use_cpu=True, num_loss_steps=2, logging_steps=1, report_to="none")
    differing = {name for name, value in ours.to_dict().items() if config.to_dict()[name] != value}
    assert differing == set()
    assert not caplog.messages


def test_what_has_no_counterpart_is_told_once_with_the_reason(caplog):
    old = DDPOConfig(sample_eta=0.5, train_num_inner_epochs=2, train_batch_size=2, project_kwargs={"logging_dir": "x"})
    config_from_ddpo(vars(old) | {"train_clip_rang": 1.0}, use_cpu=True)
    named = [message.split(" is ignored: ")[0] for message in caplog.messages]
    assert named == ["sample_eta=0.5", "train_batch_size=2", "train_num_inner_epochs=2", "'train_clip_rang'"] + [
        "project_kwargs['logging_dir']"
    ]
    assert all(message.endswith(".") and len(message.split(" is ignored: ")[1]) > 20 for message in caplog.messages)


def test_wandb_is_told_that_its_project_comes_from_the_environment(caplog, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config_from_ddpo({"log_with": "wandb", "tracker_project_name": "mine"}, use_cpu=True)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config_from_ddpo({"log_with": "wandb", "tracker_project_name": "mine"}, use_cpu=True)
    assert ["WANDB_PROJECT" in message for message in caplog.messages] == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 matters on a GPU only")
def test_fp16_becomes_bf16_on_a_gpu(caplog):
    assert config_from_ddpo(DDPOConfig()).bf16
    assert "fp16" in caplog.text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: config_from_ddpo({"log_with": "wandbb"}), ValueError, "log_with='wandbb' is unknown"),
        (lambda: config_from_ddpo({"mixed_precision": "fp8"}), ValueError, "mixed_precision='fp8' is unknown"),
        (lambda: config_from_ddpo(3), TypeError, "config is 3; pass a DDPOConfig"),
        (lambda: config_from_ddpo(DDPOConfig), TypeError, "pass a DDPOConfig"),
        (lambda: make_trainer({}, reward="aesthetic"), TypeError, "reward_function is 'aesthetic'"),
        (lambda: make_trainer({}, prompts=SUBJECTS), TypeError, "prompt_function is"),
    ],
)
def test_bad_input_is_one_sentence(make, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)) as caught:
        make()
    assert str(caught.value).endswith(".")


# ------------------------------------------------------------------------------------------------------------------- the rewards


def quantised(images, prompts, metadata):
    levels = (images * 255).round().to(torch.uint8)
    return levels.float().mean((1, 2, 3)), {}


def with_numpy(images, prompts, metadata):
    return torch.from_numpy(images.numpy().mean((1, 2, 3))), {}


def of_numpy(images, prompts, metadata):
    return images.detach().numpy().mean((1, 2, 3)), {}


def without_metadata_of_rewards(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}, None


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (quantised, ValueError, "reward 'quantised' is not differentiable in the images"),
        (with_numpy, ValueError, "reward 'with_numpy' fails on images that require a gradient"),
        (of_numpy, TypeError, "reward 'of_numpy' returned rewards of type ndarray"),
        (without_metadata_of_rewards, TypeError, "reward 'without_metadata_of_rewards' returned rewards of type tuple"),
    ],
)
def test_a_reward_without_gradient_is_named_before_any_update(reward, error, message, tmp_path):
    trainer = make_trainer(small(tmp_path), reward)
    with pytest.raises(error, match=re.escape(message)) as caught:
        trainer.train()
    assert str(caught.value).endswith(".")
    assert trainer.state.global_step == 0


def test_other_errors_of_a_reward_keep_their_type(tmp_path):
    def broken(images, prompts, metadata):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="^reward 'broken' failed: out of luck.$"):
        make_trainer(small(tmp_path), broken).train()


def test_a_module_is_a_reward_and_is_frozen(tmp_path):
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, images, prompts, metadata):
            return images.mean((2, 3)) @ self.weight

    reward = Weighted()
    trainer = make_trainer(small(tmp_path, num_epochs=1), reward)
    trainer.train()
    assert not reward.weight.requires_grad
    assert any("rewards/Weighted/mean" in line for line in trainer.state.log_history)


def test_the_aesthetic_scorer_is_trls(hub):
    """Written out again as TRL's was: bilinear, CLIP's colours, the head layer by layer on the normed features."""
    images = torch.rand(3, 3, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14").double()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    small = F.interpolate(images.clamp(0, 1), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    x = clip.get_image_features(pixel_values=(small - mean) / std).pooler_output
    x = x / x.norm(dim=-1, keepdim=True)
    weights = aesthetic_head()
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, weights[f"layers.{number}.weight"].double(), weights[f"layers.{number}.bias"].double())

    scorer = aesthetic_scorer("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth").double()
    scores, metadata = scorer(images, ("a cat",) * 3, ({},) * 3)
    assert metadata == {}
    # The head's layers are multiplied into one and kept in float32, to 6e-8 of a score of 0.2; bicubic images make 3e-4.
    torch.testing.assert_close(scores, x[:, 0], rtol=0, atol=2e-8)
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


# ------------------------------------------------------------------------------------------------------------------- the prompts


def first(rows, count):
    return [row for row, _ in zip(rows, range(count), strict=False)]


def test_prompts_depend_on_the_seed_alone_and_disturb_no_one(tmp_path):
    trainer = make_trainer(small(tmp_path))
    expected = first(trainer.train_dataset, 8)
    assert len({row["prompt"] for row in expected}) > 4
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert first(trainer.train_dataset, 8) == expected
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert first(make_trainer(small(tmp_path, seed=1)).train_dataset, 8) != expected


def test_processes_share_the_prompts_of_one(tmp_path):
    rows = make_trainer(small(tmp_path)).train_dataset
    expected = first(rows, 8)
    shares = [
        prepare_data_loader(
            DataLoader(rows, batch_size=2, collate_fn=list),
            device=torch.device("cpu"),
            num_processes=2,
            process_index=rank,
            put_on_device=False,
            dispatch_batches=False,
        )
        for rank in (0, 1)
    ]
    batches = [first(share, 2) for share in shares]
    assert [row for pair in zip(*batches, strict=True) for batch in pair for row in batch] == expected


def test_a_prompt_without_metadata_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"prompt_function returned 'a cat'; return a prompt and its metadata"):
        make_trainer(small(tmp_path), prompts=lambda: "a cat").train()


@pytest.mark.slow
def test_resume_from_goes_on_bit_for_bit(tmp_path):
    straight = make_trainer(small(tmp_path / "straight", sample_num_batches_per_epoch=1))
    straight.train()
    make_trainer(small(tmp_path / "parts", sample_num_batches_per_epoch=1, save_freq=1)).train(epochs=1)
    config = small(tmp_path / "parts", sample_num_batches_per_epoch=1, resume_from=str(tmp_path / "parts"))
    updates = []
    resumed = make_trainer(config, hook=lambda samples, step, tracker: updates.append(step))
    random.seed(5)  # the prompts must not depend on it
    resumed.train()
    assert updates == [2]
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# --------------------------------------------------------------------------------------------------------- the hook, the trainer


def test_the_hook_of_ddpo_sees_the_samples_of_each_update(tmp_path):
    seen = []
    trainer = make_trainer(small(tmp_path), hook=lambda *arguments: seen.append(arguments))
    trainer.train()
    assert [step for _, step, _ in seen] == [1, 2]
    for samples, _, _ in seen:
        assert len(samples) == 2  # micro-batches
        for images, prompts, metadata, rewards, metadata_of_rewards in samples:
            assert images.shape == (2, 3, 16, 16) and not images.requires_grad
            assert torch.equal(rewards, images.mean((1, 2, 3)))
            assert isinstance(prompts, tuple) and isinstance(metadata, tuple)
            assert [prompt.startswith(entry["subject"]) for prompt, entry in zip(prompts, metadata, strict=True)] == [True, True]
            assert metadata_of_rewards == {"subjects": [entry["subject"] for entry in metadata]}
    expected = [row["prompt"] for row in first(trainer.train_dataset, 8)]
    assert [prompt for samples, _, _ in seen for batch in samples for prompt in batch[1]] == expected
    rewards = [torch.cat([batch[3] for batch in samples]).mean().item() for samples, _, _ in seen]
    assert rewards == pytest.approx([line["reward"] for line in trainer.state.log_history if "reward" in line])


def test_the_hook_of_alignprop_gets_pairs_every_so_often(tmp_path):
    seen = []
    config = small(tmp_path, AlignPropConfig, num_epochs=5, log_image_freq=2, train_gradient_accumulation_steps=2)
    trainer = make_trainer(config, brightness_alone, lambda pairs, step, tracker: seen.append((pairs, step)))
    trainer.train()
    assert [step for _, step in seen] == [2, 4]
    pairs = seen[0][0]
    assert set(pairs) == {"images", "prompts", "prompt_metadata", "rewards"}
    assert torch.equal(pairs["rewards"], pairs["images"].mean((1, 2, 3))) and len(pairs["images"]) == 4
    rows = first(trainer.train_dataset, 8)[4:]
    assert pairs["prompts"] == tuple(row["prompt"] for row in rows)
    assert pairs["prompt_metadata"] == tuple(row["metadata"] for row in rows)


def test_what_the_hook_logs_is_in_the_history_and_images_need_a_tracker(tmp_path, caplog):
    def hook(samples, step, tracker):
        tracker.log({"brightest": samples[0][3].max().item()}, step=step)
        tracker.log_images({"first": samples[0][0][:1]}, step=step)

    trainer = make_trainer(small(tmp_path), hook=hook)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "brightest" in line] == [1, 2]
    assert "but no tracker accepts images" in caplog.text


def test_a_grey_picture_of_the_hook_reaches_the_tracker(tmp_path):
    """TensorBoard wants the colours that PIL leaves out of a grey picture."""

    def hook(samples, step, tracker):
        tracker.log_images({"grey": samples[0][0][:1, :1]}, step=step)

    make_trainer(small(tmp_path, num_epochs=1, log_with="tensorboard"), hook=hook).train()
    events = next(tmp_path.glob("**/events.out.tfevents*")).parent
    assert [event.step for event in EventAccumulator(str(events)).Reload().Images("grey")] == [1]


def test_evaluation_is_not_shown_to_the_hook(tmp_path):
    seen = []
    trainer = make_trainer(small(tmp_path, num_epochs=1), hook=lambda samples, *_: seen.append(len(samples)))
    trainer.eval_dataset = first(trainer.train_dataset, 2)
    trainer.evaluate()
    assert trainer.reward.functions[0].samples == []
    trainer.train()
    assert seen == [2]


def test_epochs_are_updates_in_all(tmp_path):
    trainer = make_trainer(small(tmp_path))
    trainer.train(1)
    assert trainer.state.global_step == 1
    for bad in (0, "checkpoint-1", True):
        with pytest.raises(ValueError, match=f"epochs={bad!r} is not a number of epochs"):
            trainer.train(bad)


def test_holders_say_whether_there_is_a_lora(base, tmp_path):
    for use_lora in (True, False):
        holder = DefaultDDPOStableDiffusionPipeline(str(base), use_lora=use_lora)
        trainer = DDPOTrainer(small(tmp_path), brightness, draw_prompt, holder, use_cpu=True)
        assert {"lora" in name for name in weights(trainer)} == {use_lora}
        assert trainer.pipeline is holder.sd_pipeline


def test_any_pipeline_serves_and_reward_scale_has_our_default(tmp_path):
    trainer = DDPOTrainer(small(tmp_path, num_epochs=1), brightness, draw_prompt, sd3(), use_cpu=True, disable_tqdm=True)
    assert trainer.args.reward_scale == 1.0
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_subclass_stays_one(tmp_path):
    class Counting(DDPOTrainer):
        chains = 0

        def prepare_chain(self, inputs):
            self.chains += 1
            return super().prepare_chain(inputs)

    trainer = Counting(small(tmp_path), brightness, draw_prompt, sd15(), use_cpu=True, disable_tqdm=True)
    trainer.train(epochs=1)
    assert trainer.chains == 3  # of the check before training, and of two micro-batches
    assert AlignPropTrainer is DDPOTrainer
