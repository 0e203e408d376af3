"""Modular pipelines: how they are called, guided, named, refused, saved and shown; that they train is in test_families.py."""

import copy
import inspect
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ModularPipeline,
    StableDiffusion3AutoBlocks,
    StableDiffusion3ModularPipeline,
)
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks
from peft import LoraConfig
from tiny_modular import FAMILIES, assembled, modular
from tiny_pipelines import sd3
from transformers.utils import logging as hosts_logging

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.cli import main
from diffusers_adjoint.evaluate.models import load_models
from diffusers_adjoint.hub import save_pipeline
from diffusers_adjoint.model.loading import load_pipeline
from diffusers_adjoint.model.lora import add_lora, save_lora
from diffusers_adjoint.model.randomness import Stream, seeded_generators
from diffusers_adjoint.replay import PipelineReplay, check_replay
from diffusers_adjoint.replay.conditioning import copied

COLUMNS = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["blurry", "dark"]}
SHORT = {"max_sequence_length": 8}
build = modular(StableDiffusion3ModularPipeline, sd3)


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def replay_of(pipeline, **settings):
    settings = {"pipeline_kwargs": SHORT} | settings
    return PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler), 3, **settings)


def prepared(pipeline, **settings):
    replay = replay_of(pipeline, **settings)
    return replay, *replay.prepare(COLUMNS, generators())


def refused(pipeline, message, columns=COLUMNS, **settings):
    with pytest.raises(ValueError, match=message) as error:
        check_replay(replay_of(pipeline, **settings), columns, generators())
    assert "\n" not in str(error.value)


def test_it_predicts_what_the_ordinary_pipeline_does_guided_and_not():
    """Another code of the same host, over the same weights."""
    blocks, x, given = prepared(build(), guidance_scale=3.0)
    call, y, other = prepared(sd3(), guidance_scale=3.0)
    assert torch.equal(x, y)
    for guided in (True, False):
        a = blocks.predict(x, 1, given, guided=guided)
        b = call.predict(x, 1, other, guided=guided)
        assert (a - b).norm() < 1e-5 * b.norm()  # float32: two rows at once and one after the other
    assert torch.equal(blocks.decode(x, given), call.decode(x, other))
    # The same at another noise level, which the recorded timesteps must not hide.
    grid = blocks.scheduler.ending_at(0.1)
    levels = [replay.predict(x, 2, conditioning, grid=grid) for replay, conditioning in ((blocks, given), (call, other))]
    assert (levels[0] - levels[1]).norm() < 1e-5 * levels[1].norm()
    assert (levels[0] - blocks.predict(x, 2, given)).norm() > 1e-3 * levels[0].norm()


GUIDED = [
    pytest.param(family, id=family.name, marks=pytest.mark.slow)
    for family in FAMILIES
    if family.scale is None and family.guidance_scale != 1
]


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_off_is_a_guider_for_no_step(family):
    """The public way to have none in the loop; disabled, some blocks fail before it and others switch it on again."""
    pipeline, seeds = family.build(), generators()[: 1 if family.one_sample else 2]
    columns = {name: values[: 1 if family.one_sample else 2] for name, values in family.columns.items()}
    replay = replay_of(pipeline, pipeline_kwargs=family.kwargs, guidance_scale=3.0)
    x, given = replay.prepare(columns, copied(seeds))
    with torch.no_grad():
        ours = replay.predict(x, 0, given, guided=False)

    for name, part in pipeline.components.items():
        if isinstance(part, BaseGuidance):
            pipeline.update_components(**{name: part.new(start=0.0, stop=0.0)})
    steps, pipeline.scheduler = [], memoryless_scheduler(pipeline.scheduler)
    step = type(pipeline.scheduler).step
    pipeline.scheduler.set_generator(seeds)

    def recorded(model_output, *args, **kwargs):
        steps.append(model_output)
        return step(pipeline.scheduler, model_output, *args, **kwargs)

    pipeline.scheduler.step = recorded
    bare = {name: values if not family.one_sample else values[0] for name, values in columns.items()}
    pipeline(**family.kwargs, **bare, num_inference_steps=3, generator=copied(seeds), output_type="pt")
    assert torch.equal(ours, steps[0])


def test_its_guider_is_left_as_it_was():
    pipeline = build()
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0, enabled=False))
    before = dict(vars(pipeline.guider))
    replay, x, conditioning = prepared(pipeline, guidance_scale=3.0)
    replay.predict(x, 0, conditioning)
    replay.sample(COLUMNS, generators(), guided=False)
    assert vars(pipeline.guider) == before


def test_what_blocks_take_is_what_a_call_takes():
    call = replay_of(build()).modular_call
    parameters = inspect.signature(call).parameters
    assert {"prompt", "negative_prompt_3", "max_sequence_length", "guidance_scale"} <= parameters.keys()
    with pytest.raises(ValueError, match="'max_length'.*does not take; take 'max_sequence_length'"):
        replay_of(build(), pipeline_kwargs={"max_length": 8})


def test_a_guider_with_momentum_is_refused():
    pipeline = build()
    pipeline.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5))
    refused(pipeline, "keeps nothing of an earlier step .*a guider's momentum", guidance_scale=3.0)


def test_components_that_are_not_loaded_are_named():
    with pytest.raises(ValueError, match="the scheduler and the transformer of this .* are not loaded; call load_components()"):
        load_pipeline(StableDiffusion3ModularPipeline(), None)
    pipeline = build()
    pipeline.update_components(text_encoder=None, text_encoder_2=None)
    refused(pipeline, "text_encoder, text_encoder_2 .*not loaded.*load_components()")


class StyleStep(ModularPipelineBlocks):
    """A block of a user's own, which asks for an input."""

    inputs = (InputParam("style", required=True, type_hint=str),)

    def __call__(self, components, state):
        return components, state


class LateStep(ModularPipelineBlocks):
    """Takes away what was drawn, as if the loop drew its latents itself."""

    def __call__(self, components, state):
        state.set("latents", None)
        return components, state


def text_to_image(change):
    """Blocks that a user has changed, with the weights of the tests."""
    blocks = copy.deepcopy(StableDiffusion3AutoBlocks().get_workflow("text2image"))  # of which the host has only one
    change(blocks.sub_blocks)
    return assembled(StableDiffusion3ModularPipeline(blocks), sd3().components)


def test_a_missing_input_is_named():
    pipeline = text_to_image(lambda blocks: blocks.insert("style", StyleStep(), 0))
    refused(pipeline, "StableDiffusion3ModularPipeline needs style for the blocks that .*prompt.* choose; add a column")
    check_replay(replay_of(pipeline), {**COLUMNS, "style": ["oil", "ink"]}, generators())


def test_blocks_without_a_loop_or_a_decoder_are_refused():
    with pytest.raises(ValueError, match=r"no block of StableDiffusion3ModularPipeline calls scheduler\.step"):
        replay_of(text_to_image(lambda blocks: blocks["denoise.denoise"].sub_blocks.pop("after_denoiser")))
    refused(text_to_image(lambda blocks: blocks.pop("decode")), "runs 1 blocks that loop .*, and a decoder after it")
    refused(text_to_image(lambda blocks: blocks.pop("denoise.prepare_latents")), "needs latents for the blocks")
    late = text_to_image(lambda blocks: blocks.insert("late", LateStep(), list(blocks).index("denoise.denoise")))
    refused(late, "has no latents before the block that steps its scheduler, as where a video is made segment by segment")


def test_a_workflow_is_chosen_by_name_or_refused(tmp_path):
    save_pipeline(tmp_path, build())
    pipeline = load_pipeline(tmp_path, {"workflow": "text2image"})
    assert "image" not in replay_of(pipeline).modular_call.__signature__.parameters
    with pytest.raises(ValueError, match="'text2video' not found .*text2image"):
        load_pipeline(tmp_path, {"workflow": "text2video"})


def test_a_whole_pipeline_is_saved_and_found_again_without_local_paths(tmp_path):
    pipeline, folder = build(), tmp_path / "whole"
    index = dict(pipeline.config)
    save_pipeline(folder, pipeline, "me/tuned")
    assert dict(pipeline.config) == index
    written = json.loads((folder / "modular_model_index.json").read_text())
    assert written["transformer"][2]["pretrained_model_name_or_path"] == "me/tuned"
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.rglob("*.json"))
    loaded = load_pipeline(str(folder), {"dtype": torch.float32})
    assert isinstance(loaded, StableDiffusion3ModularPipeline)
    call = {"num_inference_steps": 2, "output_type": "pt", "output": "images", **SHORT}
    a, b = (each(prompt="a cat", generator=generators()[0], **call) for each in (pipeline, loaded))
    assert (a - b).abs().max() < 1e-5  # rounding, as weights lie elsewhere in memory


def reward(images, prompts, **columns):
    return images.flatten(1).mean(1)


def train(model, folder, **settings):
    settings = {
        "output_dir": str(folder),
        "num_inference_steps": 3,
        "num_loss_steps": 1,
        "reward_scale": 1e4,
        "learning_rate": 0.1,
        "pipeline_kwargs": SHORT,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "probe_base": False,
    } | settings
    adapter = settings.pop("peft_config", LoraConfig(r=2, lora_alpha=4))
    rows = [{"prompt": prompt} for prompt in COLUMNS["prompt"]]
    trainer = AdjointMatchingTrainer(model, reward, AdjointMatchingConfig(**settings), rows, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    return trainer


def test_trained_by_name_evaluated_and_shown(tmp_path):
    base, lora, whole = tmp_path / "base", tmp_path / "lora", tmp_path / "full"
    save_pipeline(base, build())
    trainer = train(str(base), lora, guidance_scale=3.0)
    train(str(base), whole, peft_config=None)

    models = load_models(str(base), [str(lora), str(whole)], {}, None, torch.device("cpu"))
    pictures = []
    for model in models:
        with model.active():
            pictures.append(replay_of(model.pipeline).sample(COLUMNS, generators()))
    assert all((tuned - pictures[0]).abs().max() > 1e-4 for tuned in pictures[1:])
    assert models[2].pipeline.vae is models[0].pipeline.vae
    assert (pictures[1] - trainer.replay.sample(COLUMNS, generators(), guided=False)).abs().max() < 1e-5

    snippet = (lora / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "from diffusers import StableDiffusion3ModularPipeline" in snippet
    runs = snippet.replace("path/to/the/base", str(base)).replace('"lora"', f'"{lora}"').replace("[<", "<")
    assert "guidance_scale=3, enabled=True" in snippet
    assert 'output="images"' in snippet
    runs = "\n".join(line for line in runs.splitlines() if "generator" not in line)
    names = {}
    exec(runs, names)
    assert names["image"].size == (16, 16)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_command_evaluates_what_its_own_calls_give(tmp_path, monkeypatch, guidance):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    Path("prompts.txt").write_text("\n".join(COLUMNS["prompt"]))
    save_pipeline("base", build())
    add_lora(tuned := build(), "transformer", LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    save_lora(tuned, "transformer", "lora")
    given = {"model_name_or_path": "base", "adapter": "lora", "dataset_name": "prompts.txt", "reward_funcs": "my.py:brightness"}
    given |= {"num_generations_eval": 2, "num_inference_steps": 3, "pipeline_kwargs": json.dumps(SHORT)}
    given |= {"guidance_scale": guidance, "output_dir": "results"}
    assert main(["evaluate", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 0

    rows = json.loads(Path("results/results.json").read_text())["rows"]
    guider = {"start": 0.0, "stop": 0.0} if guidance == 1 else {"guidance_scale": guidance}
    for model in ("base", "lora"):
        pipeline = load_pipeline("base", None)
        pipeline.update_components(guider=ClassifierFreeGuidance(**guider))
        if model == "lora":
            pipeline.load_lora_weights("lora")
        means = []
        for number, prompt in enumerate(COLUMNS["prompt"]):
            seeds = seeded_generators(0, number, range(2), Stream.EVALUATION)
            call = {"num_inference_steps": 3, "output_type": "pt", "output": "images", **SHORT}
            means.append(pipeline(prompt=[prompt] * 2, generator=seeds, **call).mean())
        (row,) = [row for row in rows if row["model"] == model]
        assert row["metrics"]["brightness"]["mean"] == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)  # float32


def test_a_network_that_is_told_where_a_step_goes_is_warned_of(caplog):
    from tiny_modular import flux3, flux3_distilled

    if not hasattr(flux3_distilled(), "transformer"):
        pytest.skip("this diffusers has no flow map")
    logger = hosts_logging.get_logger("diffusers_adjoint.replay.selfcheck")
    logger.addHandler(caplog.handler)
    kwargs = {"height": 16, "width": 16, "text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 128}
    told = {}
    for make in (flux3, flux3_distilled):
        caplog.clear()
        check_replay(replay_of(make(), pipeline_kwargs=kwargs), {"prompt": ["a cat"]}, generators()[:1])
        told[make.__name__] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)
    assert not told["flux3"]
    assert all("is told the timestep that each step goes to" in message for message in told["flux3_distilled"])
    assert told["flux3_distilled"]


def test_an_ordinary_folder_stays_an_ordinary_pipeline(tmp_path):
    sd3().save_pretrained(tmp_path)
    assert not isinstance(load_pipeline(tmp_path, None), ModularPipeline)
