"""Every example with `--smoke`, every recipe, and what their headers say."""

import itertools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_adjoint.cli.commands import load_rewards, parse_arguments
from diffusers_adjoint.objectives import AdjointMatching

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHARED = {"common", "smoke"}
DRAWINGS = {"figure2_memoryless": 4, "tilt_2d": 9}  # without a pipeline; and how many rows their `run` returns
NAMES = sorted({file.stem for file in EXAMPLES.glob("*.py")} - SHARED - DRAWINGS.keys())
MODELS = {
    "black_box": "examples/digits/pipeline",
    "flux1_dev": "black-forest-labs/FLUX.1-dev",
    "flux2_klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "full_finetuning": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "multi_reward": "stabilityai/stable-diffusion-3.5-medium",
    "own_reward": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "paper": "stabilityai/stable-diffusion-3.5-medium",
    "qwen_image": "Qwen/Qwen-Image",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd35_medium": "stabilityai/stable-diffusion-3.5-medium",
    "wan_video": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "z_image_modular": "Tongyi-MAI/Z-Image",
}
OWN_REWARDS = {"black_box", "multi_reward", "own_reward", "wan_video"}  # their recipes name no reward
ALL_WEIGHTS = {"full_finetuning", "paper"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example as `python examples/NAME.py OPTIONS` does, in this process: imports are what takes long."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])

    def start(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--output_dir", str(tmp_path)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return tmp_path

    return start


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full_finetuning"])
def test_example_trains_and_saves_a_lora(run, name):
    folder = run(name, "--smoke")
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)  # they start at zero


def test_full_finetuning_saves_a_pipeline(run):
    folder = run("full_finetuning", "--smoke")
    from smoke import FOLDER

    tuned = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    base = DiffusionPipeline.from_pretrained(Path(FOLDER.name) / "full_finetuning").unet.state_dict()
    assert any(not torch.equal(tuned[key], base[key]) for key in base)
    with pytest.raises(ValueError, match="use_peft asks for an adapter"):
        run("full_finetuning", "--smoke", "--use_peft", "true")


def test_flux1_refuses_weights_without_guidance_embedding(run, tmp_path):
    from tiny_images import flux_schnell

    flux_schnell().save_pretrained(tmp_path / "schnell")
    with pytest.raises(ValueError, match="has no guidance embedding"):
        run("flux1_dev", "--smoke", "--model_name_or_path", str(tmp_path / "schnell"))


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_draws(run, name, capsys):
    folder = run(name, "--smoke")
    with Image.open(folder / f"{name}.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(2**24)) > 50
    assert "nan" not in capsys.readouterr().out
    header = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert f"python examples/{name}.py" in header and f"python examples/{name}.py --smoke" in header
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_example_runs_as_a_script(tmp_path):
    command = [sys.executable, str(EXAMPLES / "sd15.py"), "--smoke", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_rewards_of_the_examples_by_their_file(monkeypatch):
    """What the headers tell to pass to `diffusers-adjoint train --reward_funcs`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    warm_light, unsaturated = load_rewards(["examples/own_reward.py:warm_light", "examples/multi_reward.py:unsaturated"])
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert warm_light(red, [""]).item() == 1.0
    assert unsaturated(red, [""]).item() == pytest.approx(-0.05) and unsaturated(0.5 * torch.ones_like(red), [""]).item() == 0


def test_holes_are_what_the_strokes_enclose(monkeypatch):
    """On digits drawn by hand, and on the real ones: zeros, sixes, nines and eights, not the others."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (holes,) = load_rewards(["examples/black_box.py:holes"])
    frame, two = torch.zeros(9, 9), torch.zeros(9, 9)
    frame[2:7, 2:7], two[1:8, 1:8] = 1.0, 1.0
    frame[4, 4] = two[2:4, 2:7] = two[5:7, 2:7] = 0.0
    open_ring = frame.clone()
    open_ring[4, 4:] = 0.0  # a way out
    corner = torch.zeros(9, 9)
    corner[0, 1] = corner[1, 0] = corner[1, 1] = 1.0  # cut off by the border alone, which is no stroke
    assert holes(pictures_of([frame, two, open_ring, corner, torch.zeros(9, 9)]), [""] * 5) == [1, 2, 0, 0, 0]

    from data import digit_images

    images, labels = digit_images()
    counts = torch.tensor(holes(pictures_of(images[:, 0]), [])).double()
    means = [counts[labels == digit].mean().item() for digit in range(10)]
    assert min(means[0], means[6], means[9]) > 0.7 and means[8] > 1.2 and max(means[i] for i in (1, 2, 3, 4, 5, 7)) < 0.2


def test_counting_holes_to_a_budget_is_compared_with_the_tilt_that_it_found(run, tmp_path, capsys):
    """λ is in no setting then."""
    recipe = tmp_path / "recipe.yaml"
    text = (EXAMPLES / "recipes" / "black_box.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace("reward_scale: 1.5 ", "target_kl: 0.2 "), encoding="utf-8")
    run("black_box", "--smoke", "--config", str(recipe))
    assert "share with a hole" in capsys.readouterr().out


def pictures_of(grey):
    return [Image.fromarray((255 * picture).round().byte().numpy()) for picture in grey]


# ------------------------------------------------------------------------------------------------------------ recipes, headers


def test_every_example_has_a_recipe_and_a_row():
    recipes = {file.stem for file in (EXAMPLES / "recipes").glob("*.yaml")}
    assert recipes == {*NAMES, "paper"} == set(MODELS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in readme for name in NAMES)


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_one_of_the_command_line(name, monkeypatch):
    """An unknown key or a bad value would exit."""
    monkeypatch.chdir(ROOT)
    arguments = parse_arguments(["--config", f"examples/recipes/{name}.yaml", "--use_cpu", "true"])  # a recipe may ask for bf16
    assert arguments.model.model_name_or_path == MODELS[name]
    rewards = ["ImageReward"] if name == "paper" else ["PickScore"]
    assert arguments.script.reward_funcs == ([] if name in OWN_REWARDS else rewards)
    assert Path(arguments.script.dataset_name).is_file()
    assert arguments.config.output_dir == f"out/{name}"
    assert arguments.model.use_peft == (name not in ALL_WEIGHTS)


@pytest.mark.parametrize("name", MODELS)
def test_recipe_says_what_was_run_and_what_was_not(name):
    lines = (EXAMPLES / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    (checked,) = [line for line in header if line.startswith("# Checked: ")]
    (missing,) = [line for line in header if line.startswith("# Not run: ")]
    if name in NAMES and name != "black_box":  # test_example_trains_and_saves_a_lora runs that
        assert f"`python examples/{name}.py --smoke` ran" in checked and "on the published weights" in missing


def test_the_recipe_of_the_paper_has_its_settings_and_trains(run):
    recipe = ["--config", "examples/recipes/paper.yaml"]
    config = parse_arguments([*recipe, "--use_cpu", "true", "--bf16", "false"]).config
    assert config.objective == AdjointMatching(pairing="paper") and config.integrator == "euler"
    assert (config.num_inference_steps, config.num_loss_steps, config.loss_step_selection) == (40, 20, "paper")
    # The paper's 1.6 λ² is for terms without the length of a step: test_scheduler_transitions.
    assert config.loss_clip == pytest.approx(1.6 * config.reward_scale**2 / config.num_inference_steps)
    images = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    assert (images, config.max_steps, config.learning_rate, config.weight_decay) == (40, 1000, 2e-5, 1e-2)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm) == (0.95, 0.999, 1e-8, 1)

    folder = run(
        "sd35_medium",
        "--smoke",
        *recipe,
        "--num_inference_steps",
        "4",
        "--num_loss_steps",
        "2",
        "--max_steps",
        "1",
        "--probe_base",
        "false",
    )
    from smoke import FOLDER

    tuned = DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
    base = DiffusionPipeline.from_pretrained(Path(FOLDER.name) / "sd35_medium").transformer.state_dict()
    assert any(not torch.equal(tuned[key], base[key]) for key in base)


@pytest.mark.parametrize("name", NAMES)
def test_header_says_how_to_run_and_what_was_run(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    header = text.split('"""')[1]
    assert f"python examples/{name}.py" in header and f"python examples/{name}.py --smoke" in header
    ran = "Run so far: --smoke. Not run on the published weights: no GPU, no Hub here"
    memory = "GPU memory (estimate)."
    if name == "black_box":  # on a pipeline of this repository
        ran, memory = "Run so far: the recipe itself, on the pipeline in digits/", "of memory, on a CPU (measured)."
    assert "Hardware: needs about " in header and memory in header and ran in header
    assert len(text.splitlines()) <= 120


def test_prompts_are_thirty_different_lines():
    prompts = (EXAMPLES / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 30 and all(prompts)
