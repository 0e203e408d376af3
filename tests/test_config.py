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
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (1e-4, "constant", 0.0)
    assert (args.reward_scale, args.guidance_scale, args.num_inference_steps) == (1.0, 1.0, 20)
    assert not args.remove_unused_columns
