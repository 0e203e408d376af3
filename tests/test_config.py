"""The configuration explains itself: every field of ours, and every default of ours, is described where a user looks."""

import ast
import dataclasses
import re

import pytest
from transformers import TrainingArguments

from diffusers_adjoint import AdjointMatchingConfig

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
        model_init_kwargs={"token": secret, "variant": "fp16", "parts": [{"use_auth_token": secret}]},
        pipeline_kwargs={"height": 64},
        report_to="none",
        use_cpu=True,
    )
    shown = [repr(args), str(args), f"{args}", str(args.to_dict()), args.to_json_string(), str(args.to_sanitized_dict())]
    assert not [text for text in shown if secret in text]
    assert all("fp16" in text and "height" in text for text in shown)  # what is no token stays
    assert args.to_dict()["model_init_kwargs"]["token"] == "<TOKEN>"
    assert args.model_init_kwargs["token"] == args.hub_token == secret  # in use they are what they were
