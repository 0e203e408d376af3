"""`diffusers-adjoint evaluate`: its numbers against the pipelines' own calls, resuming, several processes, its pictures."""

import csv
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import markdown
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from families import FAMILIES
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import sd3
from tiny_rewards import tiny_clip
from tiny_trainer import make_trainer
from tiny_videos import kandinsky5_video, wan22

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.cli import main
from diffusers_adjoint.cli.commands import load_prompts
from diffusers_adjoint.core.matching import path_kl
from diffusers_adjoint.evaluate import EvaluationArguments, run, sheets, store
from diffusers_adjoint.evaluate.measure import Measured, Plan, Prompt, Setting, Subject, _spread, measure
from diffusers_adjoint.evaluate.models import Model, load_models
from diffusers_adjoint.evaluate.report import make_report
from diffusers_adjoint.evaluate.sheets import SheetRow, contact_sheet
from diffusers_adjoint.metrics import pairwise_diversity, vendi_score
from diffusers_adjoint.model.lora import add_lora, load_lora, save_lora
from diffusers_adjoint.model.paths import sample_trajectory
from diffusers_adjoint.model.randomness import Stream, seeded_generators
from diffusers_adjoint.pictures.pixels import fitted
from diffusers_adjoint.replay import PipelineReplay
from diffusers_adjoint.replay.plain import Media
from diffusers_adjoint.rewards import PickScore, WeightedReward

PROMPTS = ["a cat", "two dogs", "a tree"]
REWARDS = """
import torch

def brightness(images, prompts):
    return images.mean((1, 2, 3))

def redness(images, prompts):
    return images[:, 0].mean((1, 2))

def labelled(images, prompts, label):
    return torch.as_tensor(label, dtype=images.dtype) + 0 * images.mean((1, 2, 3))

def cats_only(images, prompts):
    return [image.mean() if "cat" in prompt else None for image, prompt in zip(images, prompts)]

def counted(images, prompts):
    import os
    with open("counted.txt", "a") as file:
        file.write(f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']} {len(images)}\\n")
    return images.mean((1, 2, 3))

def videos(images, prompts):
    return images.flatten(1).mean(1)

def brightness_of(images):
    return images.mean((1, 2, 3))

def features(images):
    return images.mean((2, 3))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two adapters of it, whose effect can be seen, as training writes them."""
    home = tmp_path_factory.mktemp("models")
    sd3().save_pretrained(home / "base")
    for seed, name in enumerate(("out", "other")):
        add_lora(pipeline := sd3(), "transformer", LoraConfig(r=2, lora_alpha=4))
        torch.manual_seed(seed)
        for key, value in pipeline.transformer.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=3.0)
        save_lora(pipeline, "transformer", home / name)
    return home


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """The current directory: rewards and prompts beside the models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("base", "out", "other"):
        (tmp_path / name).symlink_to(models / name, target_is_directory=True)
    (tmp_path / "my.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


GIVEN = {"model_name_or_path": "base", "dataset_name": "prompts.txt", "reward_funcs": "my.py:brightness"}
SMALL = {"num_generations_eval": 3, "batch_size": 2, "pipeline_kwargs": '{"max_sequence_length": 8}', "num_inference_steps": 3}


def words(options):
    """Of a command line."""
    values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [word for name, items in values.items() for word in (f"--{name}", *map(str, items))]


def evaluate(folder="evaluation", status=0, **options):
    """Runs the command and returns results.json."""
    given = {"adapter": "out", "output_dir": folder}
    given = {name: value for name, value in (GIVEN | given | SMALL | options).items() if value is not None}
    assert main(["evaluate", *words(given)]) == status
    return json.loads(Path(folder, "results.json").read_text()) if status == 0 else None


def rows_of(results, **wanted):
    return [row for row in results["rows"] if all(row[name] == value for name, value in wanted.items())]


def metric(results, name, **wanted):
    (row,) = rows_of(results, **wanted)
    return row["metrics"][name]


def pipeline_of(adapter=None):
    pipeline = DiffusionPipeline.from_pretrained("base")
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        pipeline.load_lora_weights(adapter)
    return pipeline


def own_call(pipeline, sampler="ode", prompts=PROMPTS, samples=3, steps=3, guidance=1.0, integrator="posterior"):
    """(P, N, 3, H, W) by the pipeline's ordinary call, with the seeds of the command."""
    images = []
    for number, prompt in enumerate(prompts):
        generators = seeded_generators(0, number, range(samples), Stream.EVALUATION)
        if sampler == "sde":
            pipeline.scheduler = memoryless_scheduler(pipeline.scheduler, integrator)
            pipeline.scheduler.set_generator(seeded_generators(0, number, range(samples), Stream.EVALUATION_NOISE))
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": 8, "output_type": "pt"}
        images.append(pipeline([prompt] * samples, generator=generators, **call).images)
    return torch.stack(images)


# ------------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("sampler", ["ode", "sde"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rewards_are_those_of_the_pipelines_own_samples(here, sampler, guidance):
    """float32, other batches: 1e-5. The error is over prompts; base and fine-tuned share their seeds."""
    results = evaluate(sampler=sampler, guidance_scale=guidance)
    means = {}
    for model, adapter in {"base": None, "out": "out"}.items():
        images = own_call(pipeline_of(adapter), sampler, guidance=guidance)
        means[model] = images.mean((1, 2, 3, 4)).double()
        found = metric(results, "brightness", model=model)
        assert found["mean"] == pytest.approx(means[model].mean().item(), rel=1e-5)
        assert found["standard_error"] == pytest.approx(means[model].std().item() / 3**0.5, rel=1e-3)
        spread = pairwise_diversity(images.flatten(2)).mean / images[0, 0].numel()
        assert metric(results, "diversity (pixels)", model=model)["mean"] == pytest.approx(spread, rel=1e-4)
    moved = means["out"] - means["base"]
    assert moved.abs().min() > 1e-3  # else the adapter would not have acted
    found = metric(results, "brightness", model="out − base")
    assert found["mean"] == pytest.approx(moved.mean().item(), rel=1e-3)
    assert found["standard_error"] == pytest.approx(moved.std().item() / 3**0.5, rel=1e-2)


def test_memoryless_samples_are_those_of_the_integrator_asked_for(here):
    results = evaluate(sampler="sde", sampling_integrator="euler")
    expected = own_call(pipeline_of("out"), "sde", integrator="euler").mean().item()
    assert metric(results, "brightness", model="out")["mean"] == pytest.approx(expected, rel=1e-5)  # float32, other batches


def edited(file):
    """Somebody makes a reward better than it was."""
    content = json.loads(file.read_text())
    content["measured"]["ode-steps3-guidance1"]["out"]["rewards"]["brightness"][0] += 0.1
    file.write_text(json.dumps(content))


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def broken_chunk(file):
    """A PNG whose pixels end early, and with them the reader's way to the next chunk."""
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT")
    content[start - 4 : start] = (int.from_bytes(content[start - 4 : start], "big") // 2).to_bytes(4, "big")
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("prompts/000001/measured.json", edited),
        ("prompts/000001/measured.json", halved),
        ("prompts/000001/measured.json", lambda file: file.write_text("")),
        ("prompts/000001/measured.json", lambda file: file.write_text("[]")),
        ("prompts/000001/measured.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
        ("prompts/000001/measured.json", lambda file: file.write_text("[" * 100_000)),
        ("prompts/000001/ode-steps3-guidance1-base.png", halved),
        ("prompts/000001/ode-steps3-guidance1-base.png", broken_chunk),
        ("evaluation.json", halved),
        ("evaluation.json", lambda file: file.write_text("[]")),
    ],
)
def test_a_damaged_result_is_named(here, capsys, name, damage):
    evaluate(sheet_prompts=2)
    damage(Path("evaluation", name))
    capsys.readouterr()
    evaluate(sheet_prompts=2, status=1)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"diffusers-adjoint: error: evaluation/{name} is damaged (")
    assert line.endswith("; delete its folder to measure the prompt again, or pass another output_dir.")
    if name.startswith("prompts"):
        shutil.rmtree(Path("evaluation", name).parent)
        evaluate(sheet_prompts=2)


def test_an_output_dir_that_is_a_file(here, capsys):
    Path("evaluation").touch()
    evaluate(status=1)
    assert "error: output_dir='evaluation' is a file; pass a folder." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/proc/self/mine", "a\0b", "a" * 300])
def test_an_output_dir_that_cannot_be_written(here, capsys, name):
    evaluate(name, status=1)
    assert f"error: output_dir={name!r} cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts", "results.csv"])
def test_a_result_that_cannot_be_written(here, capsys, name):
    """Nothing that is finished is lost by it."""
    here.joinpath("evaluation").mkdir()
    if name == "prompts":
        Path("evaluation", name).touch()
    else:
        Path("evaluation", name).mkdir()
    evaluate(status=1)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"diffusers-adjoint: error: evaluation/{name}")
    assert line.endswith("free some space, and run the same command without overwrite_output_dir to continue.")


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, "half", "another"])
def test_an_adapter_that_is_damaged_or_foreign(here, models, capsys, content):
    Path("broken").mkdir()
    file = Path("broken/pytorch_lora_weights.safetensors")
    if content == "half":
        content = (models / "out" / file.name).read_bytes()[:-100]
    if content == "another":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(content)
    evaluate(adapter="broken", status=1)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("diffusers-adjoint: error: adapter='broken' cannot be loaded (")
    assert line.endswith("); pass the folder or the name of one.")


def test_names_do_not_break_the_tables(here):
    """An adapter's folder and a reward are named by their owners."""
    shutil.copytree(here / "out", here / "a|b`")
    (here / "odd.py").write_text(REWARDS + "brightness.__name__ = 'bright|`ness'\n")
    evaluate(adapter="a|b`", reward_funcs="odd.py:brightness")
    html = markdown.markdown(Path("evaluation/results.md").read_text(), extensions=["tables"])
    tables = [re.findall(r"<t[hd]\b.*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
    assert {row[0] for row in tables} >= {"a|b`", "a|b` − base"}
    assert "bright|`ness" in tables[0] and len({len(row) for row in tables[:4]}) == 1


def test_a_setting_that_is_named_twice_is_sampled_once():
    options = {"model_name_or_path": "base", "dataset_name": "x", "reward_funcs": ["r"]}
    twice = EvaluationArguments(**options, num_inference_steps=[2, 3, 2], guidance_scale=[1.0, 1.0])
    assert twice.settings == [Setting(2, "ode", 1.0), Setting(3, "ode", 1.0)]


def test_step_noise_is_not_the_start(here):
    """From one generator each, x_0 and the first step's noise would be the same numbers."""
    start, noise = (seeded_generators(0, 0, [0], s)[0] for s in (Stream.EVALUATION, Stream.EVALUATION_NOISE))
    assert not torch.equal(torch.randn(8, generator=start), torch.randn(8, generator=noise))


def test_every_combination_has_a_row_and_every_setting_its_own_numbers(here):
    varied = {"num_inference_steps": [2, 3], "sampler": ["ode", "sde"], "guidance_scale": [1, 4.5]}
    results = evaluate(adapter=["out", "other"], **varied)
    rows = [(row["guidance"], row["steps"], row["sampler"], row["model"]) for row in results["rows"]]
    models = ["base", "out", "other", "out − base", "other − base"]
    settings = [(w, k, s) for w in (1.0, 4.5) for k in (2, 3) for s in ("ode", "sde")]
    assert rows == [(*setting, model) for setting in settings for model in models]
    values = [row["metrics"]["brightness"]["mean"] for row in results["rows"]]
    assert len(set(values)) == len(values)
    table = Path("evaluation", "results.md").read_text()
    assert "| guidance | steps | sampler    | model" in table and "| 4.5      | 3     | memoryless | out " in table
    single = evaluate("single")
    assert "| model " in (text := Path("single", "results.md").read_text()) and "| steps" not in text
    assert "3 prompts × 3 samples, guidance 1, steps 3, sampler ODE." in text
    # A prompt's numbers do not depend on what else is evaluated.
    for model in ("base", "out", "out − base"):
        same = metric(results, "brightness", model=model, steps=3, sampler="ode", guidance=1.0)
        assert metric(single, "brightness", model=model) == same


def test_the_csv_says_what_the_json_says(here):
    results = evaluate(sampler=["ode", "sde"], reward_funcs=["my.py:brightness", "my.py:redness"])
    lines = list(csv.DictReader(io.StringIO(Path("evaluation", "results.csv").read_text())))
    assert len(lines) == len(results["rows"])
    for line, row in zip(lines, results["rows"], strict=True):
        assert (float(line["guidance"]), int(line["steps"]), line["sampler"], line["model"]) == tuple(row.values())[:4]
        numbers = row["metrics"] | {f"image {name}": value for name, value in row["statistics"].items()}
        for name, value in numbers.items():
            for column, key in ((name, "mean"), (f"{name} standard error", "standard_error")):
                assert line[column] == ("" if value[key] is None else str(value[key]))


def test_the_kl_is_the_path_kl_of_the_model_as_it_is_sampled(here):
    results = evaluate(sampler=["ode", "sde"], guidance_scale=3, kl_paths=3, dataset_name="prompts.txt", num_prompts=1)
    trainer = make_trainer("unused", pipeline=pipeline_of(), guidance_scale=3.0, cfg_mode="full", num_inference_steps=3,
                           pipeline_kwargs={"max_sequence_length": 8}, peft_config=LoraConfig(r=2, lora_alpha=4))  # fmt: skip
    load_lora(trainer.denoiser.network, "transformer", "out")
    starts, noise = (seeded_generators(0, 0, range(3), stream) for stream in (Stream.EVALUATION_START, Stream.EVALUATION_NOISE))
    start, conditioning = trainer.replay.prepare({"prompt": PROMPTS[:1] * 3}, starts)
    with torch.no_grad():
        trajectory = sample_trajectory(trainer.denoiser, start, conditioning, noise, guided=True)

        def base_mean(k, x):
            with trainer.denoiser.base():
                return trainer.denoiser(x, k, conditioning, True)

        kl = path_kl(lambda k, x: trainer.denoiser(x, k, conditioning, True), base_mean, trajectory)
    found = metric(results, "KL spent (nats)", model="out", sampler="sde")
    assert found["mean"] == pytest.approx(kl.mean().item(), rel=1e-4) and found["mean"] > 0.01
    assert "KL spent (nats)" not in rows_of(results, model="base", sampler="sde")[0]["metrics"]
    assert "KL spent (nats)" not in rows_of(results, model="out", sampler="ode")[0]["metrics"]


def test_a_fully_fine_tuned_pipeline_is_compared_network_by_network(here, models):
    pipeline = sd3()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.05)
    pipeline.save_pretrained("full")
    results = evaluate(adapter=["full", "out"], sampler=["ode", "sde"])
    for sampler in ("ode", "sde"):
        images = own_call(pipeline, sampler)
        found = metric(results, "brightness", model="full", sampler=sampler)
        assert found["mean"] == pytest.approx(images.mean().item(), rel=1e-5)
    assert metric(results, "KL spent (nats)", model="full", sampler="sde")["mean"] > 0
    # The adapter, loaded beside it, neither disturbs it nor the base.
    alone = evaluate("alone", sampler=["ode", "sde"])
    assert rows_of(alone, model="base") == rows_of(results, model="base")
    assert rows_of(alone, model="out") == rows_of(results, model="out")


def test_a_model_alone(here):
    options = {"reward_funcs": "my.py:redness", "num_inference_steps": 3, "num_generations_eval": 2, "output_dir": "alone"}
    assert main(["evaluate", *words(GIVEN | options)]) == 0
    results = json.loads(Path("alone", "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == ["base"]


def test_columns_reach_the_rewards_and_missing_rewards_are_left_out(here):
    Path("rows.csv").write_text("prompt,label\na cat,1\na dog,2\n")
    results = evaluate(dataset_name="rows.csv", reward_funcs=["my.py:labelled", "my.py:cats_only"])
    assert metric(results, "labelled", model="base")["mean"] == pytest.approx(1.5)
    images = own_call(pipeline_of(), prompts=["a cat"])
    assert metric(results, "cats_only", model="base")["mean"] == pytest.approx(images.mean().item(), rel=1e-5)


def test_diversity_in_features_of_a_reward_or_of_ones_own(here, models):
    tiny_clip(Path("clip"))
    Path("pick.py").write_text("from diffusers_adjoint.rewards import PickScore\npick = PickScore('clip', 'clip')\n")
    results = evaluate(reward_funcs=["pick.py:pick", "my.py:brightness"], diversity=["my.py:features", "pixels"])
    assert {"diversity (my.py:features)", "Vendi (pixels)"} <= results["rows"][0]["metrics"].keys()
    features = own_call(pipeline_of()).mean((3, 4))
    found = metric(results, "diversity (my.py:features)", model="base")["mean"]
    assert found == pytest.approx(pairwise_diversity(features).mean, rel=1e-4)
    results = evaluate("own", reward_funcs=["pick.py:pick", "my.py:brightness"])
    images = own_call(pipeline_of())
    features = PickScore("clip", "clip").features(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    found = metric(results, "diversity (pick.py:pick)", model="base")["mean"]
    assert found == pytest.approx(pairwise_diversity(features).mean, rel=1e-3)


# -------------------------------------------------------------------------------------------------------- resuming, determinism


def counted(monkeypatch):
    """Numbers of images that pipelines were asked for."""
    calls, sample = [], PipelineReplay.sample_media
    monkeypatch.setattr(PipelineReplay, "sample_media", lambda self, c, g, n=None: calls.append(len(g)) or sample(self, c, g, n))
    return calls


def test_it_goes_on_where_it_was_interrupted(here, monkeypatch):
    whole = evaluate("whole")
    calls = counted(monkeypatch)
    write = store.Store.write

    def interrupted(self, prompt, *args):
        write(self, prompt, *args)
        if prompt == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.Store, "write", interrupted)
    evaluate("evaluation", status=130)
    assert sum(calls) == 2 * 2 * 3  # prompts, models, samples
    monkeypatch.setattr(store.Store, "write", write)
    calls.clear()
    assert evaluate("evaluation") == whole
    assert sum(calls) == 2 * 3
    calls.clear()
    # With all samples there, a tilt report needs none.
    assert evaluate("evaluation", reward_scale=2.0)["rows"] == whole["rows"] and not calls
    assert Path("evaluation/results.md").read_text() != Path("whole/results.md").read_text()
    assert (
        Path("evaluation/sheets/ode-steps3-guidance1.png").read_bytes()
        == Path("whole/sheets/ode-steps3-guidance1.png").read_bytes()
    )


@pytest.mark.parametrize(
    "changes",
    [
        *({"guidance_scale": 2}, {"num_generations_eval": 2}, {"kl_paths": 0}, {"dtype": "bfloat16"}),
        *(
            {"pipeline_kwargs": '{"max_sequence_length": 9}'},
            {"dataset_train_split": "test"},
            {"sampler": "sde"},
            {"diversity": "my.py:features"},
        ),
    ],
)
def test_every_option_that_changes_numbers_is_remembered(here, changes):
    """Compared before anything is sampled, so that a store is enough."""
    options = {"model_name_or_path": "base", "dataset_name": "x", "reward_funcs": ["my.py:brightness"]}
    numbers = {name: value[0] if isinstance(value, list) else value for name, value in changes.items()}
    kept = store.Store(here / "kept", [])
    kept.open(run.options_of(EvaluationArguments(**options)), overwrite=False)
    (here / "kept/prompts/000000").mkdir(parents=True)
    (here / "kept/prompts/000000/measured.json").touch()
    with pytest.raises(ValueError, match=f"with other {next(iter(changes))}"):
        kept.open(run.options_of(EvaluationArguments(**options | numbers)), overwrite=False)
    kept.open(run.options_of(EvaluationArguments(**options, batch_size=3, sheet_samples=2, num_prompts=4)), overwrite=False)


def test_a_reward_or_a_base_that_changed_is_noticed(here, models, capsys):
    evaluate()
    (here / "my.py").write_text(REWARDS + "\n# mended")
    evaluate(status=1)
    assert "holds an evaluation with other files; pass another output_dir" in capsys.readouterr().err
    (here / "base").unlink()
    shutil.copytree(models / "base", here / "base")
    evaluate("second")
    weights = next((here / "base/transformer").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    evaluate("second", status=1)
    assert "holds an evaluation with other files" in capsys.readouterr().err


def test_columns_that_changed_are_noticed(here, capsys):
    Path("rows.csv").write_text("prompt,label\na cat,1\na dog,2\n")
    evaluate(dataset_name="rows.csv", reward_funcs="my.py:labelled")
    Path("rows.csv").write_text("prompt,label\na cat,1\na dog,3\n")
    evaluate(dataset_name="rows.csv", reward_funcs="my.py:labelled", status=1)
    assert "evaluation holds prompt 2, 'a dog', with other columns; pass" in capsys.readouterr().err


def test_overwriting_forgets_the_evaluation_and_nothing_else(here):
    for file in ("mine/prompts/000000/mine.txt", "evaluation/prompts/mine.txt", "evaluation/sheets/mine.png"):
        (here / file).parent.mkdir(parents=True)
        (here / file).write_text("precious")
    evaluate(num_inference_steps=2)
    evaluate(overwrite_output_dir=True)
    assert [file.name for file in sorted(Path("evaluation/sheets").iterdir())] == ["mine.png", "ode-steps3-guidance1.png"]
    assert Path("evaluation/prompts/mine.txt").read_text() == "precious"
    store.Store(here / "mine", []).open({}, overwrite=True)  # no evaluation made this folder
    assert Path("mine/prompts/000000/mine.txt").read_text() == "precious"


def test_results_of_unknown_options_are_neither_used_nor_overwritten(here, capsys):
    evaluate(num_prompts=1)
    Path("evaluation/evaluation.json").unlink()
    for options in ({}, {"overwrite_output_dir": True}):
        evaluate(status=1, **options)
        assert (
            "evaluation holds results, but no evaluation.json with their options; pass another output_dir."
            in capsys.readouterr().err
        )
    Path("mine").mkdir()
    Path("mine/results.md").write_text("precious")
    evaluate("mine", status=1)
    assert Path("mine/results.md").read_text() == "precious"


def test_a_prompt_is_whole_or_absent(here, capsys, monkeypatch):
    def fail(self, *args):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    evaluate(status=1)
    assert "error: evaluation cannot be written (no space left); free some space" in capsys.readouterr().err
    assert not list(Path("evaluation/prompts").glob("[0-9]*"))
    monkeypatch.undo()
    os.chdir(here)
    assert evaluate() == evaluate("again")


def test_more_prompts_may_be_added(here, monkeypatch):
    whole = evaluate("whole")
    evaluate(num_prompts=2)
    calls = counted(monkeypatch)
    assert evaluate() == whole and sum(calls) == 2 * 3


def test_a_prompt_that_was_not_finished_is_measured_again(here, monkeypatch):
    whole = evaluate("whole")
    shutil.copytree("whole", "evaluation")
    folder = Path("evaluation/prompts/000001")
    folder = folder.rename(folder.with_name("_000001.partial"))  # what a kill within the write leaves
    (folder / "measured.json").write_text("{")
    calls = counted(monkeypatch)
    assert evaluate("evaluation") == whole
    assert sum(calls) == 2 * 3  # models, samples


def test_other_options_or_weights_are_not_mixed_in(here, capsys, models):
    evaluate()
    for options, named in (
        ({"num_inference_steps": 4}, "num_inference_steps"),
        ({"seed": 1}, "seed"),
        ({"reward_funcs": "my.py:redness"}, "reward_funcs"),
    ):
        evaluate(status=1, **options)
        assert f"evaluation holds an evaluation with other {named}; pass another output_dir" in capsys.readouterr().err
    Path("prompts.txt").write_text("a cat\nanother\na tree")
    evaluate(status=1)
    assert "evaluation holds prompt 2, 'another', as 'two dogs'; pass" in capsys.readouterr().err
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    evaluate(batch_size=3)  # changes no number
    file = models / "out" / "pytorch_lora_weights.safetensors"
    os.utime(file, ns=(1, 1))  # as after another training
    evaluate(status=1)
    assert "holds an evaluation with other files" in capsys.readouterr().err
    evaluate(overwrite_output_dir=True)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(here):
    whole = evaluate("whole", sampler=["ode", "sde"])
    source = Path(__file__).parents[1] / "src"
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "diffusers_adjoint.cli",
        "evaluate",
    ]
    options = GIVEN | SMALL | {"adapter": "out", "reward_funcs": "my.py:counted"}
    argv += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*argv, "--sampler", "ode", "sde", "--output_dir", "two"], env=environment, timeout=300, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Tables and contact sheets are in two/") == 1
    # Matrix products of another process may round differently (its memory lies differently): float32, nothing more.
    counts = [line.split() for line in Path("counted.txt").read_text().splitlines()]
    assert {rank for rank, _ in counts} == {"0/2", "1/2"}
    assert sum(int(images) for _, images in counts) == 3 * 2 * 2 * 3  # prompts, samplers, models, samples
    for row, wanted in zip(json.loads(Path("two/results.json").read_text())["rows"], whole["rows"], strict=True):
        assert row["model"] == wanted["model"]
        for (name, value), same in zip(row["metrics"].items(), wanted["metrics"].values(), strict=True):
            for key, number in value.items():
                assert number == pytest.approx(same[key], rel=1e-4, abs=1e-6), (row["model"], name)


# -------------------------------------------------------------------------------------------------------- pictures, tilt, errors


def test_the_sheet_shows_the_base_above_the_fine_tuned(here):
    evaluate(sheet_prompts=2, sheet_samples=2)
    sheet = np.asarray(Image.open("evaluation/sheets/ode-steps3-guidance1.png").convert("RGB"))
    base, tuned = own_call(pipeline_of()), own_call(pipeline_of("out"))

    def top_of(image):
        """Row of the sheet where the picture begins, at the left edge or beside one other picture."""
        shown = np.asarray(fitted(image, 160)).astype(int)
        height, width = shown.shape[:2]
        for left in (4, 4 + width + 4):
            for top in range(sheet.shape[0] - height + 1):
                if abs(sheet[top : top + height, left : left + width].astype(int) - shown).max() <= 1:
                    return top
        return None

    tops = [[top_of(images[prompt, sample]) for sample in range(2)] for prompt in range(2) for images in (base, tuned)]
    assert all(left == right is not None for left, right in tops)
    assert sorted(top for top, _ in tops) == [top for top, _ in tops]
    assert top_of(base[2, 0]) is None and top_of(base[0, 2]) is None


def test_no_sheets_where_none_are_wanted(here):
    evaluate(sheet_prompts=0)
    assert not Path("evaluation/sheets").exists() and "![" not in Path("evaluation/results.md").read_text()


def test_a_tilt_report_needs_enough_samples(here):
    evaluate(reward_scale=2.0, num_generations_eval=4, num_prompts=1)
    text = Path("evaluation/results.md").read_text()
    assert "## Tilt report, λ = 2" in text and "not estimable" in text
    assert "fewer than 100 effective samples of the base; draw more with --num_generations_eval" in text
    options = {"num_generations_eval": 128, "num_prompts": 1, "batch_size": 64}
    options |= {"sampler": "sde", "num_inference_steps": 2, "kl_paths": 2}
    results = evaluate("many", reward_scale=0.5, **options)
    (shift, *_) = results["tilt"][0]["report"]["shifts"]
    rewards = own_call(pipeline_of(), "sde", PROMPTS[:1], 128, 2).mean((2, 3, 4))[0].double()
    assert shift["target"]["mean"] == pytest.approx(((0.5 * rewards).softmax(0) * rewards).sum().item(), rel=1e-5)
    tuned = own_call(pipeline_of("out"), "sde", PROMPTS[:1], 128, 2).mean().item()
    assert shift["after"]["mean"] == pytest.approx(tuned, rel=1e-5)
    text = Path("many/results.md").read_text()
    assert "| log Z, memoryless " in text and "| KL spent, memoryless " in text
    (line,) = [line for line in text.split("## Tilt report")[1].splitlines() if line.startswith("| reward ")]
    assert "not estimable" not in line.split("|")[5]


def test_image_statistics_of_both_models(here):
    """Means over images and paired differences; a difference beyond three standard errors is marked."""
    results = evaluate()
    means = {
        model: own_call(pipeline_of(adapter)).mean((2, 3, 4)).double() for model, adapter in (("base", None), ("out", "out"))
    }
    found = {row["model"]: row["statistics"]["brightness"] for row in results["rows"]}
    for model, values in means.items():
        assert found[model]["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    moved = (means["out"] - means["base"]).mean(1)
    assert found["out − base"]["mean"] == pytest.approx(moved.mean().item(), rel=1e-3)
    assert found["out − base"]["standard_error"] == pytest.approx((moved.std() / 3**0.5).item(), rel=1e-2)
    assert set(results["rows"][0]["statistics"]) > {"saturation", "contrast", "colourfulness", "sharpness", "saturated pixels"}
    assert "*" not in Path("evaluation/results.md").read_text()  # three prompts


def reported(values, base=0.0, **options):
    """A report on P prompts × N samples, (P, N), of one reward that is also the brightness."""
    setting = Setting(3, "sde", 1.0)
    results = []
    for row, before in zip(values.tolist(), torch.as_tensor(base).expand_as(values).tolist(), strict=True):
        models = {
            name: Measured({"r": v}, {"brightness": v}, {"d": (sum(v), 0.3)}) for name, v in (("base", before), ("out", row))
        }
        results.append({setting: models})
    return make_report(results, **options)


@pytest.mark.parametrize("prompts", [9, 10])
def test_what_stands_out_is_marked_from_ten_prompts_on(prompts):
    """With fewer, the error is too uncertain: noise would be marked in every tenth cell and more."""
    values = torch.randn(prompts, 2, generator=torch.Generator().manual_seed(0))
    text = reported(values + 20).markdown()
    marked = [line for line in text.splitlines() if line.startswith("| out − base") and line.count("*") == line.count("±")]
    assert len(marked) == (2 if prompts == 10 else 0) and ("more than three of them" in text) == (prompts == 10)
    assert "*" not in reported(values).markdown().replace("* is a difference", "")


def test_samples_without_a_value_are_counted():
    values = torch.tensor([[1.0, math.nan], [math.nan, 3.0]])
    report = reported(values)
    assert "Without a value: r of out, 2 times." in report.markdown() and report.missing == {"r of out": 2}
    assert "Without a value" not in reported(torch.ones(2, 2)).markdown()


def test_a_kl_that_overflowed_costs_the_gap_alone():
    values = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    report = reported(values, base=values, reward_scale=0.5)
    assert report.tilts[0].report.gap is None  # none was measured
    setting = Setting(3, "sde", 1.0)
    one = Measured({"r": values[0].tolist()}, {"brightness": values[0].tolist()}, {}, [0.5, math.nan])
    report = make_report([{setting: {"base": one, "out": one}}], reward_scale=0.5)
    assert report.tilts[0].report.gap is None and report.missing["KL spent (nats) of out"] == 1


def test_a_single_prompt_has_errors_too():
    """Of a difference of diversities the upper bound: the two samples count as independent."""
    report = reported(torch.tensor([[1.0, 2.0, 4.0]]), base=torch.tensor([[1.0, 1.0, 1.0]]))
    difference = report.rows[-1].metrics["d"]
    assert difference.mean == pytest.approx(4.0) and difference.standard_error == pytest.approx(0.3 * 2**0.5)
    assert "1 prompt × 3 samples" in report.markdown()


def test_the_tilt_counts_the_rewards_that_are_aimed_at():
    """A reward of weight 0 may have no value anywhere; without any weight there is no tilt."""
    setting, noise = Setting(3, "sde", 1.0), torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    one = Measured({"r": noise, "none": [math.nan] * 300}, {"brightness": noise, "odd": [math.nan, *noise[1:]]}, {}, [0.1, 0.2])
    results = [{setting: {"base": one, "out": one}}]
    report = make_report(results, reward_scale=0.5, weights={"r": 1.0, "none": 0.0})
    (tilt,) = report.tilts
    assert [shift.statistic for shift in tilt.report.shifts] == ["reward", "brightness"]
    log_z = (0.5 * torch.tensor(noise)).double().exp().mean().log().item()
    assert tilt.report.shifts[0].target.log_normalizer == pytest.approx(log_z, rel=1e-6)
    assert "log Z, memoryless" in report.markdown()
    reward = 0.5 * sum(noise) / 300
    assert tilt.report.gap.scaled_reward.mean == pytest.approx(reward, rel=1e-6)
    assert tilt.report.gap.gap.mean == pytest.approx(log_z - (reward - 0.15), rel=1e-6)
    plain = json.loads(report.json())["tilt"][0]["report"]
    assert plain["shifts"][0]["target"]["log_normalizer"] == pytest.approx(log_z, rel=1e-6)
    for weights in ({"r": 0.0, "none": 0.0}, {"r": 0.0, "none": 1.0}):
        assert make_report(results, reward_scale=0.5, weights=weights).tilts[0].report is None


def test_the_tilt_is_of_the_rewards_that_have_a_value():
    """Each of two rewards is for one prompt: the report of one reward that is the one here and twice the other there."""
    setting, nothing = Setting(3, "sde", 1.0), [math.nan] * 300
    first, second = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def tilt(rewards, weights):
        rows = [Measured(values, {"brightness": first.tolist()}, {}, [0.1, 0.2]) for values in rewards]
        results = [{setting: {"base": row, "out": row}} for row in rows]
        return make_report(results, reward_scale=0.5, weights=weights).tilts[0].to_json()

    tasks = tilt([{"a": first.tolist(), "b": nothing}, {"a": nothing, "b": second.tolist()}], {"a": 1.0, "b": 2.0})
    assert tasks == tilt([{"r": first.tolist()}, {"r": (2 * second).tolist()}], {"r": 1.0})
    assert tasks["report"] is not None


def test_an_infinite_reward_is_no_missing_one():
    """It was meant to be in the sum: without it there is no tilt, and no mean over it, after it has been written and read too."""
    setting, noise = Setting(3, "sde", 1.0), torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    one = Measured({"r": noise, "s": [-math.inf, *noise[1:]]}, {"brightness": noise}, {}, [])
    again = Measured.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert again.rewards["s"] == one.rewards["s"]
    report = make_report([{setting: {"base": again, "out": again}}], reward_scale=0.5)
    assert report.tilts[0].report is None and report.missing == {"s of base": 1, "s of out": 1}
    assert report.rows[0].metrics["s"].mean == pytest.approx(sum(noise[1:]) / 299)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_name_or_path": "nowhere"}, "model_name_or_path='nowhere' cannot be loaded"),
        ({"adapter": "nowhere"}, "adapter='nowhere' cannot be loaded"),
        ({"adapter": "./no/where/at/all"}, "adapter='./no/where/at/all' cannot be loaded"),
        ({"model_name_or_path": "no/where/at/all"}, "model_name_or_path='no/where/at/all' cannot be loaded"),
        (
            {"diversity": "my.py:brightness_of"},
            "features 'my.py:brightness_of' returned shape (2,) for 2 images; return one row for each, (B, D)",
        ),
        ({"adapter": ["out", "out"]}, "adapter names the same model twice"),
        ({"dataset_name": "none.txt"}, "dataset_name='none.txt' does not exist"),
        ({"reward_funcs": "my.py:none"}, "my.py has no 'none'"),
        ({"reward_funcs": "my.py:labelled"}, "reward 'labelled' cannot be called"),
        ({"diversity": "Fuzz"}, "diversity 'Fuzz' is none of "),
        ({"pipeline_kwargs": '{"prompt": "x"}'}, "pipeline_kwargs contains 'prompt'"),
        ({"adapter": None, "reward_scale": 2}, "training has left none in output_dir='evaluation'; pass adapter."),
        ({"reward_weights": [1, 2]}, "reward_weights has 2 entries for 1 reward functions"),
    ],
)
def test_one_sentence_for_what_cannot_be_evaluated(here, capsys, options, message):
    evaluate(status=1, **options)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("diffusers-adjoint: error: ") and message in line and line.endswith(".")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sampler", "magic"], "sampler='magic' is unknown; pass 'ode', 'sde' or both."),
        (["--num_inference_steps", "0"], "must be at least 1"),
        (["--guidance_scale", "1", "0"], "guidance_scale=0 is not a guidance scale; pass 1 for none, or more."),
        (["--num_generations_eval", "0"], "num_generations_eval=0 is too small; pass 1 or more."),
        (["--guidance_scale", "nan"], "guidance_scale=nan is not a guidance scale"),
        (["--seed", "-1"], "seed=-1 is below 0; pass 0 or more."),
        (["--reward_scale", "nan"], "reward_scale=nan gives no tilt report"),
        (["--reward_weights", "inf"], "reward_weights=[inf] are not all finite"),
        (["--dtype", "int8"], "dtype='int8' is not one of diffusers"),
        (["--pipeline_kwargs", "{x"], "pipeline_kwargs='{x' is not JSON"),
        (["--pipeline_kwargs", "[1]"], "pipeline_kwargs='[1]' is a list; pass an object"),
        (["--model_name_or_path", ""], "model_name_or_path is missing; pass --model_name_or_path."),
        (["--stepps", "3"], "unknown options --stepps 3"),
    ],
)
def test_bad_options_end_with_status_two(here, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words(GIVEN), *options])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_options_may_come_from_a_file(here):
    lines = ["model_name_or_path: base", "adapter: out", "dataset_name: prompts.txt", "reward_funcs: my.py:brightness"]
    lines += ["num_inference_steps: [2, 3]", "guidance_scale: 1.0"]
    lines += ["num_generations_eval: 2", "pipeline_kwargs: {max_sequence_length: 8}", "output_dir: file"]
    Path("evaluation.yaml").write_text("\n".join(lines))
    assert main(["evaluate", "--config", "evaluation.yaml", "--num_inference_steps", "2"]) == 0
    results = json.loads(Path("file/results.json").read_text())
    assert {row["steps"] for row in results["rows"]} == {2} and len(results["rows"]) == 3


def test_arguments_of_the_base_are_not_those_of_a_pipeline_that_was_trained(here):
    """A component that is left out of the base is shared, too; a variant names files of the base."""
    Path("whole").symlink_to(here / "base", target_is_directory=True)
    left_out = {"text_encoder_3": None, "tokenizer_3": None}
    base, whole = load_models("base", ["whole"], left_out, None, torch.device("cpu"))
    assert base.pipeline.text_encoder_3 is None and whole.pipeline.text_encoder_3 is None
    assert base.pipeline.transformer is not whole.pipeline.transformer


def test_rows_of_a_stream_are_those_of_the_file(here):
    given = {name: value for name, value in GIVEN.items() if name != "dataset_name"}
    for streaming in (False, True):
        args = EvaluationArguments(**given, dataset_name="prompts.txt", dataset_streaming=streaming)
        assert [row["prompt"] for row in run._rows(load_prompts(args, args.dataset_train_split), 2)] == PROMPTS[:2]


def test_an_adapter_of_another_network_is_refused(here, capsys):
    Path("text").mkdir()
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)},
        "text/pytorch_lora_weights.safetensors",
    )
    evaluate(status=1, adapter="text")
    assert "cannot be loaded (it has no layer in the transformer); pass" in capsys.readouterr().err
    save_file({"x": torch.ones(2)}, "text/pytorch_lora_weights.safetensors")
    evaluate(status=1, adapter="text")
    assert "adapter='text' cannot be loaded" in capsys.readouterr().err


def test_nothing_is_lost_of_a_number_without_a_value():
    one = Measured({"r": [1.0, math.nan]}, {"s": [math.inf]}, {"d": (0.5, math.nan)}, [])
    again = Measured.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert again.rewards["r"][0] == 1.0 and math.isnan(again.rewards["r"][1]) and again.statistics["s"][0] == math.inf


def test_black_images_have_a_diversity_but_no_direction():
    f = torch.rand(4, 6)
    f[0] = 0
    spread = _spread({"pixels": [f[:2], f[2:]], "nothing": [], "one": [f[:1]]})
    assert spread["diversity (pixels)"][0] == pytest.approx(pairwise_diversity(f[None]).mean)
    assert spread["Vendi (pixels)"][0] == pytest.approx(vendi_score(f[None, 1:]).mean)
    assert all(math.isnan(spread[f"{label} ({name})"][0]) for label in ("diversity", "Vendi") for name in ("nothing", "one"))


def measured(images, count, **features):
    """What `measure` says of a pipeline that gives these images, one a sample, whatever it is asked for."""
    given = iter(images)
    made = lambda columns, generators, noise: Media(torch.stack([next(given) for _ in generators]))  # noqa: E731
    replay = SimpleNamespace(sample_media=made)
    reward = WeightedReward(lambda images, prompts: images.flatten(1).mean(1))
    plan = Plan(len(images), 2, 0, 0, reward, {"mean": lambda shown: shown.mean((2, 3))} | features)
    model = Model("base", None)
    subject = Subject(model, model, Setting(3, "ode", 1.0), replay)
    return measure(subject, Prompt(0, {"prompt": ["x"]}, count), plan)


def test_features_and_rewards_may_write_into_their_images():
    images = torch.rand(4, 3, 5, 5)
    numbers, shown = measured(
        images.clone(), 4, first=lambda shown: shown.zero_().mean((2, 3)), last=lambda shown: shown.mean((2, 3))
    )
    assert torch.equal(shown, images) and numbers.spread["diversity (first)"][0] == 0
    assert numbers.spread["diversity (last)"] == numbers.spread["diversity (mean)"]
    assert numbers.spread["diversity (last)"][0] == pytest.approx(pairwise_diversity(images.mean((2, 3))[None]).mean, rel=1e-6)


def test_images_that_overflowed_are_left_out():
    images = torch.rand(6, 3, 5, 5)
    images[1, 0, 0, 0], images[2], images[3] = math.inf, math.nan, math.nan  # a whole batch of two among them
    numbers, shown = measured(images, 4)
    assert len(shown) == 4
    kept = images[[0, 4, 5]]
    rewards = next(iter(numbers.rewards.values()))
    assert [math.isfinite(value) for value in rewards] == [True, False, False, False, True, True]
    assert [math.isfinite(value) for value in numbers.statistics["contrast"]] == [True, False, False, False, True, True]
    assert numbers.spread["diversity (mean)"][0] == pytest.approx(pairwise_diversity(kept.mean((2, 3))[None]).mean, rel=1e-6)


def test_videos_are_measured_by_the_mean_over_frames_and_sound_by_rewards_alone():
    videos = torch.rand(4, 3, 3, 5, 5)
    numbers, shown = measured(videos, 1)
    assert shown.shape == (1, 3, 3, 5, 5)
    features = videos.mean((3, 4)).mean(1)
    assert numbers.spread["diversity (mean)"][0] == pytest.approx(pairwise_diversity(features[None]).mean, rel=1e-6)
    assert numbers.statistics["brightness"] == pytest.approx(videos.mean((1, 2, 3, 4)).tolist(), rel=1e-6)
    numbers, _ = measured(torch.randn(2, 2, 40), 0)
    assert numbers.statistics == {} and len(next(iter(numbers.rewards.values()))) == 2


def test_images_of_sixteen_bits_are_measured_in_float32():
    images = torch.rand(2, 3, 5, 5).bfloat16()
    numbers, shown = measured(images, 2)
    assert shown.dtype == torch.float32 and next(iter(numbers.rewards.values())) == pytest.approx(
        images.float().mean((1, 2, 3)).tolist(), rel=1e-6
    )


def test_the_host_says_the_same_thing_once(caplog):
    handler, logger = logging.StreamHandler(stream := io.StringIO()), logging.getLogger("some_host")
    logger.addHandler(handler)
    with run.each_once([logger]):
        for text in ("cut", "cut", "else", "cut"):
            logger.warning(text)
    logger.warning("cut")
    assert stream.getvalue().split() == ["cut", "else", "cut"]


def test_the_lora_of_a_second_transformer(tmp_path, monkeypatch):
    """Where it acts, at the later steps, the samples change; loaded into the first one they would at the earlier steps."""
    monkeypatch.chdir(tmp_path)
    wan22().save_pretrained("base")
    add_lora(pipeline := wan22(), "transformer_2", LoraConfig(r=2))
    for key, value in pipeline.transformer_2.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=3.0)
    save_lora(pipeline, "transformer_2", "out")
    models = load_models("base", ["out"], {}, "transformer_2", torch.device("cpu"))
    with models[1].active():
        assert "tuned_0" in models[1].pipeline.transformer_2.active_adapters()
    assert "peft_config" not in vars(models[0].pipeline.transformer) and not hasattr(
        models[0].pipeline.transformer, "peft_config"
    )


def test_models_of_the_hub_come_from_its_cache(here, models, monkeypatch):
    for name in ("base", "out"):
        repository = here / "cache" / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(models / name, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    results = evaluate(model_name_or_path="me/base", adapter="me/out")
    local = evaluate("local")
    assert rows_of(results, model="out") == rows_of(local, model="out") and rows_of(results, model="base")


def test_a_prompt_is_written_once_on_a_sheet():
    strip = Image.new("RGB", (50, 20))
    heights = [
        contact_sheet("title", [SheetRow(number, "a cat", "base", strip) for number in numbers]).height
        for numbers in ((0, 0), (0, 1), (0, 1, 1))
    ]
    assert heights[1] - heights[0] == sheets.LINE
    assert heights[2] - heights[1] == sheets.LINE + strip.height + 4


def test_the_kl_of_a_lora_where_the_state_is_a_part_of_the_latents(tmp_path, monkeypatch):
    """Frames that are conditions lie in the same tensor: where the state is must be found first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipeline = kandinsky5_video()
    layers = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=layers[-1:]), adapter_name="tuned_0")
    pipeline.transformer.disable_adapters()
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(run, "load_models", lambda *_: [Model("base", pipeline), Model("out", pipeline, "tuned_0")])
    Path("p.txt").write_text("a cat")
    Path("my.py").write_text(REWARDS)
    (family,) = [family for family in FAMILIES if family.build is kandinsky5_video]
    kwargs = {"num_generations_eval": 1, "num_inference_steps": 2, "pipeline_kwargs": json.dumps(family.kwargs)}
    results = evaluate(dataset_name="p.txt", reward_funcs="my.py:videos", sampler="sde", **kwargs)
    assert metric(results, "KL spent (nats)", model="out")["mean"] == 0.0  # a new adapter changes nothing


def test_a_file_of_options_may_name_single_ones(here):
    given = {"model_name_or_path": "m", "dataset_name": "p", "reward_funcs": "r"}
    singles = {"adapter": "a", "num_inference_steps": 3, "guidance_scale": 2.0, "reward_weights": 2.0}
    options = EvaluationArguments(**given, **singles)
    assert options.reward_funcs == ["r"]
    assert {name: getattr(options, name) for name in singles} == {name: [value] for name, value in singles.items()}
    with pytest.raises(ValueError, match=r"^pipeline_kwargs=\[1\] is a list; pass an object"):
        EvaluationArguments(**given, pipeline_kwargs=[1])
    with pytest.raises(ValueError, match=r"^model_init_kwargs contains 'dtype'; pass dtype instead\.$"):
        EvaluationArguments(**given, model_init_kwargs={"dtype": "float16"})


def test_a_single_channel_is_measured_as_grey():
    images = torch.rand(3, 1, 5, 5)
    numbers, shown = measured(images, 2)
    assert numbers.statistics["brightness"] == pytest.approx(images.mean((1, 2, 3)).tolist(), rel=1e-6)
    assert numbers.statistics["saturation"] == [0.0] * 3 and shown.shape == (2, 1, 5, 5)


def test_a_row_without_a_text_is_named(here, capsys):
    Dataset.from_list([{"prompt": "a cat"}, {"prompt": None}]).to_parquet("rows.parquet")
    evaluate(dataset_name="rows.parquet", status=1)
    assert "error: prompt 1 is of type NoneType; pass a string in each row." in capsys.readouterr().err
