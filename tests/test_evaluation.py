"""`evaluate()`: what it samples, measures, draws, and what it costs."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, make_trainer
from transformers.integrations import TrackioCallback, WandbCallback

from diffusers_adjoint.core.matching import path_kl
from diffusers_adjoint.metrics import pairwise_diversity, saturated_share
from diffusers_adjoint.model.paths import sample_trajectory
from diffusers_adjoint.model.randomness import Stream, seeded_generator
from diffusers_adjoint.pictures.grid import image_grid
from diffusers_adjoint.pictures.pixels import drawable
from diffusers_adjoint.pictures.samples import SampleImages
from diffusers_adjoint.pictures.trackers import to_trackers
from diffusers_adjoint.replay.plain import Media
from diffusers_adjoint.schedulers import memoryless_scheduler


def rows(prompts=PROMPTS):
    return Dataset.from_dict({"prompt": prompts})


@pytest.fixture(params=[sd3, sd15], ids=["sd3", "sd15"])
def build(request):
    return request.param


def test_it_reports_what_the_pipeline_samples(tmp_path, build):
    trainer = make_trainer(tmp_path, build, eval_dataset=rows(), per_device_eval_batch_size=3)
    first = trainer.evaluate()
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    generators = [seeded_generator(trainer.args.seed, 0, i, Stream.EVALUATION) for i in range(8)]
    trainer.pipeline.set_progress_bar_config(disable=True)
    images = trainer.pipeline(prompts, num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="pt").images
    rewards = brightness(images, prompts)
    # float32: batches of six and two instead of eight images
    assert first["eval_reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert first["eval_reward_std"] == pytest.approx(rewards.std().item(), rel=1e-3)
    assert first["eval_rewards/brightness/mean"] == pytest.approx(first["eval_reward"])
    assert first["eval_saturated"] == pytest.approx(saturated_share(images).mean().item(), abs=1e-6)
    diversity = pairwise_diversity(images.reshape(4, 2, -1)).mean / images[0].numel()
    assert first["eval_diversity"] == pytest.approx(diversity, rel=1e-4)
    assert first["eval_kl"] == 0.0  # before training the model is the base
    assert trainer.evaluate() == first  # fixed seeds
    trainer.train()
    tuned = trainer.evaluate()
    assert tuned["eval_reward"] != first["eval_reward"]
    assert tuned["eval_kl"] > 0


@pytest.mark.parametrize(("options", "integrator"), [({}, "posterior"), ({"sampling_integrator": "euler"}, "euler")])
def test_its_kl_is_the_path_kl_of_memoryless_paths(tmp_path, options, integrator):
    """Of "posterior" or what is asked for, whatever the paths of training are."""
    trainer = make_trainer(tmp_path, eval_dataset=rows(PROMPTS[:2]), reward_scale=1000.0, **options)
    trainer.train()
    replay, denoiser = trainer.replay, trainer.denoiser
    starts = [seeded_generator(trainer.args.seed, 0, i, Stream.EVALUATION_START) for i in range(2)]
    noises = [seeded_generator(trainer.args.seed, 0, i, Stream.EVALUATION_NOISE) for i in range(2)]

    def base_mean(k, x):
        with denoiser.base():
            return denoiser(x, k, conditioning)

    with torch.no_grad(), replay.on(memoryless_scheduler(trainer.pipeline.scheduler, integrator)):
        start, conditioning = replay.prepare({"prompt": PROMPTS[:2]}, starts)
        trajectory = sample_trajectory(denoiser, start, conditioning, noises)
        expected = path_kl(lambda k, x: denoiser(x, k, conditioning), base_mean, trajectory).mean().item()
    assert trainer.evaluate()["eval_kl"] == pytest.approx(expected, rel=1e-5)  # float32 sums of the same terms
    assert replay.scheduler.config.integrator == "ancestral"


@pytest.mark.parametrize(
    ("guidance", "mode", "name", "evaluations"),
    # K = 4: the samples, 4 for each of two images; the model and the base along a path, 4 each.
    # Where paths are guided and the loss is not, the paths need evaluations of their own, but for the last step.
    [(1.0, "rollout", "eval_kl", 8 + 8), (4.0, "full", "eval_kl", 8 + 8), (4.0, "rollout", "eval_kl_unguided", 8 + 8 + 3)],
)
def test_nothing_is_evaluated_twice(tmp_path, guidance, mode, name, evaluations):
    trainer = make_trainer(
        tmp_path, eval_dataset=rows(PROMPTS[:1]), guidance_scale=guidance, cfg_mode=mode, per_device_eval_batch_size=1
    )
    images = []
    guided = guidance > 1
    trainer.denoiser.network.register_forward_pre_hook(
        lambda network, args, kwargs: images.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    metrics = trainer.evaluate()
    assert name in metrics
    assert images[-8:] == [2 if guided else 1] * 8  # the samples come last, one at a time; guided calls have twice the rows
    assert len(images) == evaluations


def test_several_datasets_have_their_own_names(tmp_path):
    datasets = {"animals": rows(PROMPTS[:2]), "things": rows(PROMPTS[2:])}
    trainer = make_trainer(tmp_path, eval_dataset=datasets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = [line for line in trainer.state.log_history if any(name.startswith("eval_") for name in line)]
    assert {"eval_animals_reward", "eval_animals_kl"} <= logged[0].keys()
    assert {"eval_things_reward", "eval_things_diversity"} <= logged[1].keys()
    alone = trainer.evaluate(datasets["things"])
    assert alone["eval_reward"] == trainer.evaluate()["eval_things_reward"]


def test_an_image_that_is_no_number_is_left_out(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_dataset=rows(PROMPTS[:2]))
    good = trainer.evaluate()
    original = trainer.replay.sample_media

    def spoilt(columns, generators):
        made = original(columns, generators)
        made.images[1] = torch.nan
        return made

    monkeypatch.setattr(trainer.replay, "sample_media", spoilt)
    bad = trainer.evaluate()
    assert all(0 < bad[name] < 1 for name in ("eval_reward", "eval_saturated", "eval_diversity") if good[name] > 0)


def test_of_three_images_one_may_be_lost(tmp_path, monkeypatch):
    """The diversity is then that of the other two, as it is where the command measures it."""
    trainer = make_trainer(tmp_path, eval_dataset=rows(PROMPTS[:1]), num_generations_eval=3)
    first, lost, last = torch.rand(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = iter([first, lost * torch.nan, last])
    monkeypatch.setattr(trainer.replay, "sample_media", lambda columns, generators: Media(next(images)))
    expected = (first - last).square().mean().item()
    assert trainer.evaluate()["eval_diversity"] == pytest.approx(expected, rel=1e-5)


def test_rewards_see_images_in_float32_as_in_training(tmp_path):
    """A reward computed in 16 bits would have three digits."""
    seen = set()

    def reward(images, prompts):
        seen.add(images.dtype)
        return brightness(images, prompts)

    trainer = make_trainer(tmp_path, sd3, reward, pipeline=sd3().to(torch.bfloat16), eval_dataset=rows(PROMPTS[:1]))
    trainer.evaluate()
    assert seen == {torch.float32}


def test_the_best_model_is_that_of_the_highest_reward(tmp_path):
    settings = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(tmp_path, eval_dataset=rows(PROMPTS[:1]), **settings)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_reward", True)
    trainer.train()
    rewards = [line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line]
    assert trainer.state.best_metric == max(rewards)


def test_a_missing_dataset_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no eval_dataset; pass one here or to the trainer"):
        make_trainer(tmp_path).evaluate()


# ----------------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_training_and_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path,
        eval_dataset=rows(),
        num_images_to_log=3,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        report_to="tensorboard",
    )
    trainer.train()
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"train-000002.png", "train-000004.png", "eval-000004.png"}
    assert Image.open(tmp_path / "samples" / "eval-000004.png").width > 3 * 250  # three cells in a row
    events = next(tmp_path.glob("**/events.out.tfevents*")).parent
    accumulator = EventAccumulator(str(events)).Reload()
    assert set(accumulator.Tags()["images"]) == {"train/samples", "eval/samples"}
    assert [event.step for event in accumulator.Images("train/samples")] == [2, 4]


@pytest.mark.parametrize(("callback", "module"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_pictures_go_to_the_trackers(callback, module):
    """Both take an image under a name; the host's callback holds the module it has started."""
    logged = []
    tracker = SimpleNamespace(Image=lambda grid: ("image", grid.size), log=logged.append)
    started = object.__new__(callback)
    setattr(started, module, tracker)
    grid = Image.new("RGB", (4, 2))
    to_trackers([started], grid, "eval/samples", 7)
    assert logged == [{"eval/samples": ("image", (4, 2)), "train/global_step": 7}]


def test_a_grid_shows_each_image_where_it_belongs():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.0, 0.25, 0.5, 0.75, 1.0)])
    grid = image_grid(SampleImages(images, ["a long prompt " * 20] * 5, torch.arange(5.0)))
    cell_width, cell_height = grid.width // 4, grid.height // 2
    centres = [grid.getpixel((i % 4 * cell_width + 120, i // 4 * cell_height + 120))[0] for i in range(5)]
    assert centres == [0, 64, 128, 191, 255]


def test_a_video_is_shown_by_its_middle_frame():
    video = torch.zeros(1, 5, 3, 8, 8)
    video[0, 2] = 1.0
    assert image_grid(SampleImages(video, ["x"], torch.zeros(1))).getpixel((100, 100)) == (255, 255, 255)


def test_sound_is_not_drawn():
    sound = SampleImages(torch.zeros(2, 2, 100), ["x", "y"], torch.zeros(2))
    assert not drawable(sound.images)
    with pytest.raises(ValueError, match="are not images"):
        image_grid(sound)


@pytest.mark.parametrize("name", ["reward", "eval_kl", "eval_rewards/brightness/std", "eval_diversity", "eval_saturated"])
def test_a_metric_for_the_best_model_is_one_of_the_evaluations(tmp_path, name):
    """Known before training is what an evaluation then logs; the host would end training with a KeyError at the first one."""
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, eval_dataset=rows, metric_for_best_model=name, load_best_model_at_end=True, **steps)
    trainer.train()
    assert trainer.state.best_global_step == 1
