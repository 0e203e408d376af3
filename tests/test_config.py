"""The configuration explains itself: every field of ours, and every default of ours, is described where a user looks."""

import ast
import dataclasses
import json
import re
import typing

import numpy as np
import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from diffusers_adjoint import AdjointMatchingConfig
from diffusers_adjoint.evaluate import EvaluationArguments

HOST = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
OURS = [
    field
    for field in dataclasses.fields(AdjointMatchingConfig)
    if field.name not in HOST or repr(field.default) != repr(HOST[field.name])
]


@pytest.mark.parametrize("field", OURS, ids=lambda field: field.name)
def test_a_field_is_described_with_its_default(field):
    described = re.search(rf"^\s+{field.name} \((.*?)\):", AdjointMatchingConfig.__doc__, re.MULTILINE)
    assert described, f"{field.name} is not in the docstring"
    default = re.search(r"defaults to `?([^`]+)`?$", described[1])
    if default is None:
        assert "*optional*" in described[1] and field.default is None
    else:
        assert ast.literal_eval(default[1]) == field.default
    assert re.sub("%%", "", field.metadata["help"]).count("%") == 0  # argparse would take it for a format


def test_defaults_are_those_of_reward_tuning_not_of_text(tmp_path):
    args = AdjointMatchingConfig(output_dir=str(tmp_path))
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (None, "constant", 0.0)
    assert (args.reward_scale, args.guidance_scale, args.num_inference_steps) == (1.0, 1.0, 20)
    assert not args.remove_unused_columns


def test_no_token_is_shown(tmp_path):
    secret = "hf_" + "s" * 34
    args = AdjointMatchingConfig(
        str(tmp_path),
        hub_token=secret,
        model_init_kwargs={
            "token": secret,
            "variant": "fp16",
            "parts": [{"use_auth_token": secret}],
            "pair": (1, {"HF_TOKEN": secret}),
        },
        pipeline_kwargs={"height": 64},
        report_to="none",
        use_cpu=True,
    )
    shown = [repr(args), str(args), f"{args}", str(args.to_dict()), args.to_json_string(), str(args.to_sanitized_dict())]
    assert not [text for text in shown if secret in text]
    assert all("fp16" in text and "height" in text for text in shown)  # what is no token stays
    assert args.to_dict()["model_init_kwargs"]["token"] == "<TOKEN>"
    assert args.model_init_kwargs["token"] == args.hub_token == secret  # in use they are what they were


def config(tmp_path, **changes):
    return AdjointMatchingConfig(**{"output_dir": tmp_path, "report_to": "none", "use_cpu": True} | changes)


def test_whole_numbers_and_those_of_numpy_are_numbers(tmp_path):
    args = config(tmp_path, reward_scale=10, loss_clip=np.float32(0.5), reward_weights=[1, 2.5], num_generations=np.int64(2))
    assert (args.reward_scale, args.loss_clip, args.reward_weights, args.num_generations) == (10, 0.5, [1, 2.5], 2)
    read = json.loads(args.to_json_string())  # as trackers and checkpoints keep it
    assert (read["loss_clip"], read["num_generations"]) == (0.5, 2)


def test_numbers_of_the_host_keep_what_it_takes(tmp_path):
    """Shares of all updates, fractions of an epoch, and whole numbers of NumPy, which become Python's."""
    shares = {"logging_steps": 0.5, "save_steps": 0.25, "eval_steps": 0.1, "num_train_epochs": 1.5, "warmup_steps": 0.1}
    args = config(tmp_path, max_steps=np.int32(7), seed=np.uint8(3), save_total_limit=np.int64(2), data_seed=-1, **shares)
    assert {name: getattr(args, name) for name in shares} == shares
    found = [args.max_steps, args.seed, args.save_total_limit, args.data_seed]
    assert found == [7, 3, 2, -1] and {type(value) for value in found} == {int}
    assert config(tmp_path, max_steps=5, num_train_epochs=float("inf")).max_steps == 5  # the epochs are not used


def test_numbers_of_numpy_in_a_list_can_be_written(tmp_path):
    args = config(tmp_path, reward_weights=[np.float32(0.5), np.int64(2)])
    assert json.loads(args.to_json_string())["reward_weights"] == [0.5, 2]


HOST_HINTS = typing.get_type_hints(TrainingArguments)


@pytest.mark.parametrize("name", [name for name, hint in HOST_HINTS.items() if hint in (int, int | None)])
@pytest.mark.parametrize("value", [2.5, True, "2"])
def test_every_whole_number_of_the_host_refuses_what_is_none(tmp_path, name, value):
    with pytest.raises(TypeError, match=rf"^{name}={value!r} is of type {type(value).__name__}; pass a whole number.*\.$"):
        config(tmp_path, **{name: value})


def test_a_config_is_made_again_from_its_own_values(tmp_path):
    """The host has made enums, lists and objects of some of them."""
    args = config(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", debug="")
    again = dataclasses.replace(args, reward_scale=3.0)
    assert again.reward_scale == 3.0 and again.lr_scheduler_type == args.lr_scheduler_type == "constant"


@pytest.mark.parametrize("reader", [HfArgumentParser, TrlParser])
def test_a_recipe_and_a_command_line_are_text_that_becomes_numbers(tmp_path, reader):
    parser = reader(AdjointMatchingConfig)
    options = {"reward_scale": "10", "num_generations": "2", "loss_clip": "3", "probe_base": "false", "max_steps": "7"}
    words = ["--reward_weights", "1", "0.5"] + [word for name, value in options.items() for word in (f"--{name}", value)]
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *words])
    assert (args.reward_scale, args.num_generations, args.reward_weights, args.loss_clip) == (10.0, 2, [1.0, 0.5], 3.0)
    assert args.probe_base is False and args.max_steps == 7
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nreward_scale: 10\nreward_weights: [1, 2]\npipeline_kwargs: {{height: 64}}\n"
    )
    (args,) = parser.parse_yaml_file(recipe)
    assert (args.reward_scale, args.reward_weights, args.pipeline_kwargs) == (10, [1, 2], {"height": 64})
    recipe.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\ntarget_kl: 0.5\n")
    (args,) = parser.parse_yaml_file(recipe)
    assert (args.reward_scale, args.target_kl) == (None, 0.5)


def test_every_field_of_ours_refuses_what_it_is_not(tmp_path):
    """By its annotation: an object is of no type that a config has."""
    for field in (field for field in OURS if "Literal" not in str(field.type)):
        with pytest.raises(TypeError, match=f"^{field.name}.* pass .*\\.$"):
            config(tmp_path, **{field.name: object()})


def test_options_of_evaluate_have_types_too(tmp_path):
    with pytest.raises(TypeError, match=r"^num_generations_eval='4' is of type str; pass a whole number\.$"):
        EvaluationArguments("base", "prompts.txt", ["brightness"], num_generations_eval="4")
    with pytest.raises(TypeError, match=r"^guidance_scale=\['2'\] is of type list of str; pass a list of numbers\.$"):
        EvaluationArguments("base", "prompts.txt", ["brightness"], guidance_scale="2")
    with pytest.raises(
        ValueError, match=r"^guidance_scale has a whole number larger than any float; pass one below 1\.8e\+308\.$"
    ):
        EvaluationArguments("base", "prompts.txt", ["brightness"], guidance_scale=[10**400])
