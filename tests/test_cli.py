"""The command line, end to end on a tiny pipeline: recipes, rewards by name, datasets in files, one-line errors."""

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny_pipelines import sd3
from transformers import TrainingArguments
from trl import ModelConfig

from diffusers_adjoint import AdjointMatchingConfig, __version__
from diffusers_adjoint.cli import main
from diffusers_adjoint.cli.commands import COMMANDS, TrainArguments, load_prompts, load_rewards, lora_config, parse_arguments
from diffusers_adjoint.cli.options import NOT_FOR_PIPELINES
from diffusers_adjoint.cli.program import SUMMARIES
from diffusers_adjoint.evaluate import EvaluationArguments
from diffusers_adjoint.objectives import AdjointMatching, Ram
from diffusers_adjoint.rewards import PickScore

REWARDS = """
import torch

def brightness(images, prompts, **columns):
    return images.mean((1, 2, 3))

class Redness(torch.nn.Module):
    def forward(self, images, prompts):
        return images[:, 0].mean((1, 2))
"""
RECIPE = """
model_name_or_path: {model}
dataset_name: {prompts}
reward_funcs: {rewards}:brightness
output_dir: {output}
use_peft: true
lora_r: 2
lora_alpha: 4
reward_scale: 10
learning_rate: 1e-3
num_inference_steps: 3
pipeline_kwargs: {{max_sequence_length: 8}}
per_device_train_batch_size: 2
max_steps: 2
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
num_images_to_log: 0
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    sd3().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model, tmp_path, monkeypatch):
    """A recipe file beside its prompts and rewards; the current directory is theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # names of modules may be looked up in the current directory
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  \ntwo dogs\na tree\n")
    parts = {"model": model, "prompts": "prompts.txt", "rewards": "my_rewards.py", "output": "out"}
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(**parts))
    return str(tmp_path / "recipe.yaml")


def failure(capsys, *argv) -> str:
    """The one line on stderr of a command that fails with status 1."""
    capsys.readouterr()
    assert main(list(argv)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("diffusers-adjoint: error: ") and line.endswith("."), line
    return line


def test_a_long_error_line_is_cut_in_its_middle(capsys):
    line = failure(capsys, "demo", "--path", "folder/" * 300)
    assert len(line) < 1100 and "[…]" in line
    assert line.startswith("diffusers-adjoint: error: there is no folder/")
    assert line.endswith("of a checkout of diffusers-adjoint.")


def refusal(capsys, *argv) -> str:
    """The last line on stderr of a command whose arguments are refused, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return captured.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------- train


def test_a_method_of_back_propagation_trains_by_the_same_recipe(recipe, tmp_path, capsys):
    assert main(["train", "--config", recipe, "--method", "discrete_adjoint"]) == 0
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert "differentiable reward" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    line = failure(capsys, "train", "--config", recipe, "--method", "discrete_adjoint", "--num_loss_steps", "2")
    assert "num_loss_steps=2 has no meaning for method='discrete_adjoint'; leave it out." in line
    line = refusal(capsys, "train", "--config", recipe, "--method", "reinforce")
    assert "method='reinforce' is unknown; pass adjoint_matching or discrete_adjoint." in line


def test_options_of_an_objective_come_from_the_command_line(recipe, capsys):
    paper = ["--loss_type", "adjoint_matching", "--loss_kwargs", '{"pairing": "paper"}']
    arguments = parse_arguments(["--config", recipe, *paper])
    assert arguments.config.objective == AdjointMatching(pairing="paper")
    line = refusal(capsys, "train", "--config", recipe, "--loss_kwargs", '{"pairing": "previous"}')
    assert "pairing='previous' is unknown; pass 'score', 'next' or 'paper'." in line


def test_a_reward_that_is_a_number_trains_by_the_same_recipe(recipe, tmp_path):
    (tmp_path / "counts.py").write_text(
        "def bright(images, prompts):\n    return [sum(image.convert('L').histogram()[100:]) for image in images]\n"
    )
    options = ["--loss_type", "ram", "--num_generations", "4", "--images_as", "pil", "--reward_workers", "2"]
    assert main(["train", "--config", recipe, "--reward_funcs", "counts.py:bright", *options]) == 0
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    kwargs = ["--loss_kwargs", '{"mode": "tilt_matching", "stages": 2}']
    assert parse_arguments(["--config", recipe, *options, *kwargs]).config.objective == Ram("tilt_matching", stages=2)


def test_a_recipe_trains_and_saves_a_lora_that_loads(recipe, model, tmp_path):
    assert main(["train", "--config", recipe]) == 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.load_lora_weights(tmp_path / "out")
    adapter = pipeline.transformer.peft_config["default_0"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.task_type) == (2, 4, 0.0, None)
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)  # they start at zero


def test_a_word_on_the_command_line_wins_over_the_recipe(recipe):
    options = ["--max_steps", "7", "--pipeline_kwargs", '{"height": 16}', "--dtype", "bfloat16"]
    options += ["--model_init_kwargs", '{"variant": "fp16"}']
    for spelling in (["--config", recipe], [f"--config={recipe}"]):
        arguments = parse_arguments([*spelling, *options])
        assert arguments.config.max_steps == 7 and arguments.config.reward_scale == 10
        assert arguments.config.learning_rate == 1e-3  # YAML reads 1e-3 as text
        assert arguments.config.pipeline_kwargs == {"height": 16}
        assert arguments.config.model_init_kwargs == {"variant": "fp16", "dtype": torch.bfloat16, "revision": "main"}
        assert arguments.script.reward_funcs == ["my_rewards.py:brightness"]


def test_without_peft_the_whole_pipeline_is_saved(recipe, tmp_path, model):
    assert main(["train", "--config", recipe, "--use_peft", "false", "--max_steps", "1"]) == 0
    tuned = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    base = StableDiffusion3Pipeline.from_pretrained(model).transformer.state_dict()
    assert any(not torch.equal(tuned[name], base[name]) for name in base)


def test_evaluation_and_resuming(recipe, tmp_path):
    options = ["--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train[:1]", "--save_strategy", "steps"]
    options += ["--save_steps", "1", "--reward_funcs", "my_rewards:Redness"]
    assert main(["train", "--config", recipe, *options, "--max_steps", "1"]) == 0
    assert main(["train", "--config", recipe, *options, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "eval_rewards/Redness/mean" in line] == [1, 2]


def test_a_dry_run_evaluates_and_writes_nothing(recipe, tmp_path, capsys):
    def files():
        return {path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}  # of the rewards' own file

    before = files()
    options = ["--eval_strategy", "steps", "--eval_steps", "100", "--dataset_test_split", "train"]
    assert main(["train", "--config", recipe, *options, "--dry_run", "true"]) == 0
    assert files() == before and "eval_reward" not in capsys.readouterr().out


def test_a_recipe_that_trained_evaluates_what_it_trained(recipe, tmp_path, capsys):
    line = failure(capsys, "evaluate", "--config", recipe)
    assert "reward_scale=10 is for a report on a fine-tuned model, but training has left none in output_dir='out'" in line
    assert main(["train", "--config", recipe, "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--config", recipe, "--num_prompts", "2", "--num_generations_eval", "3"]) == 0
    said = capsys.readouterr().err
    keys = re.findall(r"^(\w+):", RECIPE, re.MULTILINE)
    shared = {"model_name_or_path", "dataset_name", "reward_funcs", "output_dir", "reward_scale", "num_inference_steps"}
    passed_over = ", ".join(key for key in keys if key not in shared | {"pipeline_kwargs"})
    assert f"diffusers-adjoint: ignored, because they are options of train only: {passed_over}." in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["model"], row["steps"]) for row in results["rows"]] == [("base", 3), ("out", 3), ("out − base", 3)]
    assert results["reward_scale"] == 10 and results["rows"][2]["metrics"]["brightness"]["mean"] != 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(parse_arguments(["--config", recipe]).model.model_name_or_path)
    pipeline.load_lora_weights(tmp_path / "out")  # what lies beside it does not matter


@pytest.mark.slow
def test_module_runs_alone_and_under_accelerate(recipe, tmp_path):
    launcher = ["accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
    python = [sys.executable, "-m", *launcher, "diffusers_adjoint.cli"]
    done = subprocess.run([*python, "train", "--config", recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    alone = [sys.executable, "-m", "diffusers_adjoint.cli"]
    done = subprocess.run([*alone, "train", "--config", recipe, "--dataset_name", "none.txt"], capture_output=True, text=True)
    assert done.returncode == 1 and "dataset_name='none.txt' does not exist" in done.stderr


# ------------------------------------------------------------------------------------------------------------------- arguments


def shown_by(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 0
    return capsys.readouterr().out


OURS = ["adjoint matching", "model and LoRA", "data and rewards", "logging"]


def test_help_shows_our_sections_and_help_all_the_rest(capsys):
    text = shown_by(capsys, "train", "--help")
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["options", *OURS]
    own = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    host = {field.name for field in dataclasses.fields(TrainingArguments)}
    for options in (TrainArguments, ModelConfig, AdjointMatchingConfig):
        ours = {field.name for field in dataclasses.fields(options)} - host - NOT_FOR_PIPELINES
        assert ours - own <= {"adjoint_pairing"}  # which only says where it has moved to
    assert not own & {"adam_beta1", "fsdp", "hub_token"}
    everything = shown_by(capsys, "train", "--help-all")
    assert everything.startswith(text.rstrip())
    listed = set(re.findall(r"^  --(\w+)", everything, re.MULTILINE))
    assert host - NOT_FOR_PIPELINES - {"parallelism_config"} <= listed | {"config"}
    assert not listed & NOT_FOR_PIPELINES
    assert (
        "--config FILE" in text
        and "--lora_r INT " in text
        and "--reward_scale FLOAT" in text
        and "--dtype {bfloat16,float16,float32}" in text
    )


def test_help_tells_the_defaults_that_hold(capsys):
    """Of every option that a run without any other option has."""
    config = parse_arguments(["--model_name_or_path", "x"], save_on_interrupt=True)
    objects = (config.script, config.config, config.model)
    text = " ".join(shown_by(capsys, "train", "--help").split())
    told = re.findall(r"--(\w+) (?:(?! --).)*?\(default: ([^)]*)\)", text)
    assert len(told) > 20 and dict(told)["save_on_interrupt"] == "True" and dict(told)["num_inference_steps"] == "20"
    for name, value in told:
        (held,) = [getattr(each, name) for each in objects if hasattr(each, name)]
        assert name == "report_to" or str(getattr(held, "value", held)) == value, name


def test_help_of_evaluate_lists_every_option(capsys):
    text = shown_by(capsys, "evaluate", "--help")
    assert set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) == {
        "config",
        *(f.name for f in dataclasses.fields(EvaluationArguments)),
    }
    assert "--num_inference_steps INT [INT ...]" in text and "(default: 40)" in text and "default: None" not in text


def test_help_names_the_commands(capsys):
    text = shown_by(capsys, "--help")
    assert SUMMARIES.keys() == COMMANDS.keys()
    for name, summary in SUMMARIES.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_top_command_answers_without_torch(option):
    """And without what would import it: a user who looks for a command need not wait."""
    program = ["import sys", "from diffusers_adjoint.cli import main", "try:", f"    main([{option!r}])", "finally:"]
    program += ["    print(sorted({'torch', 'diffusers', 'transformers', 'trl', 'peft', 'datasets'} & sys.modules.keys()))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, loaded = done.stdout.splitlines()
    assert loaded == "[]" and said[0] == (f"diffusers-adjoint {__version__}" if option == "--version" else said[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: command"),
        (["tune"], "invalid choice: 'tune'"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--config", "none.yaml"], "No such file"),
        (["train", "--config", "broken.yaml"], "while parsing"),
        (["train", "--config", "recipe.yaml", "--max_stepz", "3"], "unknown options --max_stepz 3"),
        (
            ["train", "--config", "recipe.yaml", "--reward_scal", "3"],
            "unknown options --reward_scal 3 (did you mean --reward_scale?); diffusers-adjoint train --help-all",
        ),
        (["train", "--config", "recipe.yaml", "--neftune-noise-alpha=5"], "neftune_noise_alpha is no option for a pipeline"),
        (["evaluate", "--config", "unknown.yaml"], "unknown options --colour blue; diffusers-adjoint evaluate --help lists"),
        (["evaluate", "--config", "recipe.yaml", "--learning_rate", "1"], "unknown options --learning_rate 1"),
        (["--vers"], "the following arguments are required: command"),
        (["train", "--config", "unknown.yaml"], "unknown options --colour blue"),
        (["train", "--config", "recipe.yaml", "--max_steps", "many"], "invalid int value: 'many'"),
        (["train", "--config", "recipe.yaml", "--reward_scale", "-1"], "reward_scale=-1.0 is not a scale"),
        (["train", "--config", "recipe.yaml", "--target_kl", "1"], "target_kl=1.0 and reward_scale=10 both set λ"),
        (["train", "--config", "recipe.yaml", "--dtype", "auto"], "dtype='auto' is not one of diffusers"),
        (["train", "--config", "recipe.yaml", "--load_in_4bit"], "load_in_4bit is no option for a pipeline; leave it out."),
        (
            ["train", "--config", "recipe.yaml", "--attn_implementation", "sdpa"],
            "attn_implementation is no option for a pipeline",
        ),
        (["train", "--config", "recipe.yaml", "--model_init_kwargs", '{"dtype": "float16"}'], "pass dtype instead"),
        (["train", "--output_dir", "out"], "model_name_or_path is missing"),
    ],
)
def test_bad_arguments_end_with_status_2_and_one_line(recipe, tmp_path, capsys, argv, message):
    (tmp_path / "broken.yaml").write_text("max_steps: [1\nx: }")
    (tmp_path / "unknown.yaml").write_text("model_name_or_path: x\ndataset_name: x\nreward_funcs: x\ncolour: blue\n")
    assert message in refusal(capsys, *argv)


def test_lora_dropout_of_trl_becomes_none_and_a_chosen_one_stays():
    assert lora_config(ModelConfig(use_peft=False)) is None
    assert lora_config(ModelConfig(use_peft=True)).lora_dropout == 0.0
    assert lora_config(ModelConfig(use_peft=True, lora_dropout=0.2)).lora_dropout == 0.2  # the trainer warns of it


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (["to_q"], {"to_q"}), (["to_q", "to_k"], {"to_q", "to_k"}), ([".*attn.to_q"], ".*attn.to_q")],
)
def test_one_target_module_is_a_name_and_a_pattern_a_pattern(given, expected):
    """trl.ModelConfig makes a string of a list of one, and PEFT takes a string for a pattern of whole names."""
    assert lora_config(ModelConfig(use_peft=True, lora_target_modules=given)).target_modules == expected


# ---------------------------------------------------------------------------------------------------------------- interruption

INTERRUPTING = """
import os, signal, time

def brightness(images, prompts, **columns):
    if os.path.exists("stop"):
        number, calls = open("stop").read().split()
        if int(calls):
            open("stop", "w").write(f"{number} {int(calls) - 1}")
        else:
            os.remove("stop")
            os.kill(os.getpid(), int(number))
    return images.mean((1, 2, 3))
"""
# Without the probe of the base, which calls the reward before training, too.
RUN = ["--max_steps", "3", "--probe_base", "false", "--reward_funcs", "interrupting.py:brightness"]


def interrupt_in(tmp_path, number, calls):
    """The reward sends the signal when it has been called so often; the first call is the check before training."""
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    (tmp_path / "stop").write_text(f"{number:d} {calls}")


def final_weights(tmp_path):
    return load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_an_interrupted_command_saves_and_says_how_to_go_on(recipe, tmp_path, capsys, number, code):
    interrupt_in(tmp_path, number, 2)  # in the second update
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    secrets = ["--hub_token=secret-1", "--hub_token", "secret-2", "--model_init_kwargs", '{"token": "hf_secret3"}']
    secrets += ["--run_name", "hf_secret" + "x" * 28]
    assert main(["train", "--config", recipe, *RUN, *secrets]) == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    captured = capsys.readouterr().err
    assert "secret" not in captured
    said, again = captured.strip().splitlines()[-1].split("; resume with: ")
    assert said == f"diffusers-adjoint: interrupted after update 2 of 3; newest checkpoint: {Path('out/checkpoint-2')}"
    words = shlex.split(again)
    assert words[0] == "diffusers-adjoint" and main(words[1:]) == 0
    assert "out/checkpoint-2" not in capsys.readouterr().err  # no warning: the run goes on as it was
    assert any(value.any() for name, value in final_weights(tmp_path).items() if "lora_B" in name)


def test_what_looks_a_little_like_a_token_is_told(recipe, model, tmp_path, capsys):
    """The command is to be pasted into a shell."""
    (tmp_path / "hf_models").symlink_to(model)
    interrupt_in(tmp_path, signal.SIGTERM, 2)
    options = ["--model_name_or_path", "hf_models", "--output_dir", "hf_out", "--run_name", "input_tokens 8"]
    assert main(["train", "--config", recipe, *RUN, *options]) == 143
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"newest checkpoint: {Path('hf_out/checkpoint-2')}; resume with: " in line
    assert line.endswith(shlex.join([*options, "--resume_from_checkpoint", "true"]))


def test_an_interrupted_start_of_a_run_that_goes_on_says_so(recipe, tmp_path, capsys, monkeypatch):
    interrupt_in(tmp_path, signal.SIGINT, 10**6)
    assert main(["train", "--config", recipe, *RUN, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    monkeypatch.setattr("diffusers_adjoint.cli.commands.trainer_of", lambda arguments: signal.raise_signal(signal.SIGINT))
    assert main(["train", "--config", recipe, *RUN, "--resume_from_checkpoint", "true"]) == 130
    said = "diffusers-adjoint: interrupted before the first update of this start; the same command resumes it."
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_without_a_checkpoint_the_line_says_so(recipe, tmp_path, capsys):
    interrupt_in(tmp_path, signal.SIGTERM, 0)  # in the check before training
    assert main(["train", "--config", recipe, *RUN]) == 143
    said = "diffusers-adjoint: interrupted before the first update, without a checkpoint; the same command starts again."
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_a_checkpoint_of_an_earlier_run_is_not_what_to_go_on_from(recipe, tmp_path, capsys):
    interrupt_in(tmp_path, signal.SIGINT, 10**6)
    assert main(["train", "--config", recipe, *RUN, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    interrupt_in(tmp_path, signal.SIGINT, 1)
    assert main(["train", "--config", recipe, *RUN, "--save_on_interrupt", "false"]) == 130
    assert "without a checkpoint; the same command starts again." in capsys.readouterr().err


def test_an_interrupt_after_training_repeats_what_comes_then(recipe, tmp_path, capsys, monkeypatch):
    interrupt_in(tmp_path, signal.SIGINT, 10**6)
    options = ["--save_strategy", "steps", "--save_steps", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(
            "diffusers_adjoint.trainer.adjoint_matching.AdjointMatchingTrainer.save_model",
            lambda self: signal.raise_signal(signal.SIGTERM),
        )
        assert main(["train", "--config", recipe, *RUN, *options]) == 143
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "interrupted after update 3 of 3; newest checkpoint: " in line
    assert main(shlex.split(line.split("; resume with: ")[1])[1:]) == 0
    assert any(value.any() for name, value in final_weights(tmp_path).items() if "lora_B" in name)


def test_an_evaluation_that_fails_does_not_take_the_weights_along(recipe, tmp_path, monkeypatch):
    """The recipe saves no checkpoint."""
    interrupt_in(tmp_path, signal.SIGINT, 10**6)

    def failing(self, **kwargs):
        if not self.is_in_train:
            raise RuntimeError("in the evaluation")
        return {}

    monkeypatch.setattr("diffusers_adjoint.trainer.adjoint_matching.AdjointMatchingTrainer.evaluate", failing)
    options = ["--eval_strategy", "steps", "--eval_steps", "100", "--dataset_test_split", "train"]
    with pytest.raises(RuntimeError, match="in the evaluation"):
        main(["train", "--config", recipe, *RUN, *options])
    assert any(value.any() for name, value in final_weights(tmp_path).items() if "lora_B" in name)


def test_another_exit_is_not_an_interruption(recipe, tmp_path):
    (tmp_path / "leaving.py").write_text("import sys\n\ndef leave(images, prompts):\n    sys.exit(3)\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", recipe, "--reward_funcs", "leaving.py:leave"])
    assert caught.value.code == 3


def test_only_the_command_saves_on_an_interrupt_unasked(recipe):
    assert parse_arguments(["--config", recipe]).config.save_on_interrupt is False
    assert AdjointMatchingConfig("out").save_on_interrupt is False


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_of_an_interrupted_process(recipe, tmp_path, number, code):
    interrupt_in(tmp_path, number, 2)
    command = [sys.executable, "-m", "diffusers_adjoint.cli", "train", "--config", recipe, *RUN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "interrupted after update 2 of 3; newest checkpoint: " in done.stderr.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_are_found_by_file_module_and_class(recipe):
    by_file, by_module, module = load_rewards(["my_rewards.py:brightness", "my_rewards:brightness", "my_rewards:Redness"])
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(by_file(images, []), images.mean((1, 2, 3))) and torch.equal(by_module(images, []), by_file(images, []))
    assert torch.equal(module(images, []), images[:, 0].mean((1, 2)))


def test_a_reward_file_may_import_what_lies_beside_it(recipe, tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "beside_it.py").write_text("def f(images, prompts):\n    return images.sum((1, 2, 3))\n")
    (tmp_path / "deeper" / "uses_it.py").write_text("from beside_it import f\n")
    (reward,) = load_rewards(["deeper/uses_it.py:f"])
    assert reward(torch.ones(2, 3, 2, 2), []).tolist() == [12.0, 12.0]


def test_a_class_of_the_package_is_instantiated(monkeypatch):
    started = []
    monkeypatch.setattr(PickScore, "__init__", lambda self: started.append(self))  # the real one would download its weights
    (reward,) = load_rewards(["PickScore"])
    assert type(reward) is PickScore and started == [reward]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loveliness", "reward 'loveliness' is none of"),
        ("WeightedReward", "reward 'WeightedReward' is none of"),
        ("no_module:f", "there is no module 'no_module'"),
        ("my_rewards.deeper:f", "there is no module 'my_rewards.deeper'"),
        ("my_rewards:darkness", "my_rewards has no 'darkness'"),
        ("my_rewards.py:darkness", "my_rewards.py has no 'darkness'"),
        ("other.py:f", "there is no file 'other.py'"),
    ],
)
def test_unknown_rewards_are_one_sentence(recipe, capsys, name, message):
    assert message in failure(capsys, "train", "--config", recipe, "--reward_funcs", name)


def test_an_import_that_fails_inside_a_reward_module_is_not_called_a_missing_module(recipe, tmp_path):
    (tmp_path / "needy_rewards.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_rewards(["needy_rewards:f"])


# -------------------------------------------------------------------------------------------------------------------- datasets


def prompts_in(name, **options):
    return [row["prompt"] for row in load_prompts(TrainArguments(dataset_name=str(name), **options), "train")]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind(tmp_path, streaming):
    rows = [{"prompt": "a cat", "size": 1}, {"prompt": "two, dogs", "size": 2}]
    (tmp_path / "p.txt").write_text("a cat\n\n   \ntwo, dogs\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text('prompt,size\na cat,1\n"two, dogs",2\n')
    for kind in ("txt", "jsonl", "json", "csv"):
        assert prompts_in(tmp_path / f"p.{kind}", dataset_streaming=streaming) == ["a cat", "two, dogs"], kind
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt\na tree\n")
    assert prompts_in(folder, dataset_streaming=streaming) == ["a tree"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "none.txt"], "dataset_name='none.txt' does not exist"),
        (["--dataset_name", "empty.json"], "dataset_name='empty.json' is empty"),
        (["--dataset_name", "blank.txt"], "dataset_name='blank.txt' is empty"),
        (["--dataset_name", "header.csv"], "corresponds to no data"),
        (["--dataset_name", "header.csv", "--dataset_streaming"], "split 'train' of dataset_name='header.csv' has no row"),
        (["--dataset_name", "broken.json"], "JSON parse error"),
        (["--dataset_name", "recipe.yaml"], "is a file of unknown type"),
        (["--dataset_name", "nobody/nothing"], "cannot be read"),
        (["--dataset_name", "captions.csv"], "the rows of the train_dataset have columns ['caption']; add a 'prompt' column"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "split 'test' of dataset_name='prompts.txt' cannot be read"),
        (["--model_name_or_path", "nobody/nothing"], "model_name_or_path='nobody/nothing' cannot be loaded"),
        (["--lora_target_modules", "no_such_layer"], "has no module named no_such_layer"),
    ],
)
def test_bad_data_and_models_are_one_sentence(recipe, tmp_path, capsys, options, message):
    (tmp_path / "empty.json").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "header.csv").write_text("prompt\n")
    (tmp_path / "broken.json").write_text("{x")
    (tmp_path / "captions.csv").write_text("caption\na cat\n")
    assert message in failure(capsys, "train", "--config", recipe, *options)


def test_an_error_inside_a_reward_keeps_its_traceback(recipe, tmp_path):
    (tmp_path / "bad_rewards.py").write_text("def f(images, prompts):\n    raise ValueError('mine')\n")
    with pytest.raises(ValueError, match="mine"):
        main(["train", "--config", recipe, "--reward_funcs", "bad_rewards:f"])


# ------------------------------------------------------------------------------------------------------------------------ demo


def test_demo_runs_the_script_of_a_checkout(tmp_path, capfd):
    (tmp_path / "demo.py").write_text("import sys, data\nprint(data.WORDS, sys.argv[1:])\nsys.exit(3)\n")
    (tmp_path / "data.py").write_text("WORDS = 'beside it'\n")
    assert main(["demo", "--path", str(tmp_path), "--reward", "three"]) == 3
    assert "beside it ['--reward', 'three']" in capfd.readouterr().out


@pytest.mark.slow
def test_demo_of_this_checkout_is_found(capfd):
    assert main(["demo", "--reward", "nothing"]) == 1  # demo.py starts, and refuses the reward
    assert "REWARD='nothing' is unknown" in capfd.readouterr().err


def test_demo_without_a_checkout_is_one_sentence(tmp_path, capsys):
    assert "there is no" in failure(capsys, "demo", "--path", str(tmp_path))
