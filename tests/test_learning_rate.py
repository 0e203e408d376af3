"""The default learning rate: of a LoRA, and of all weights."""

import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, brightness, config, logged, make_trainer

from diffusers_adjoint import AdjointMatchingTrainer


@pytest.mark.parametrize(
    ("given", "lora", "expected"), [({}, True, 1e-4), ({}, False, 2e-5), ({"learning_rate": 7e-4}, False, 7e-4)]
)
def test_a_full_fine_tuning_has_a_rate_of_its_own(tmp_path, given, lora, expected):
    options = {"learning_rate": None, "max_steps": 1, **given}
    trainer = make_trainer(tmp_path, lora=lora, **options)
    trainer.train()
    assert trainer.args.learning_rate == expected
    assert logged(trainer, "learning_rate") == [expected]
    assert json.loads(trainer.args.to_json_string())["learning_rate"] == expected


def test_one_config_serves_two_trainers(tmp_path):
    args = config(tmp_path, learning_rate=None)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    adapted = AdjointMatchingTrainer(sd3(), brightness, args, rows, peft_config=LoraConfig(r=2))
    whole = AdjointMatchingTrainer(sd3(), brightness, args, rows)
    assert (adapted.args.learning_rate, whole.args.learning_rate, args.learning_rate) == (1e-4, 2e-5, None)


def test_a_deepspeed_config_wants_a_rate_at_once(tmp_path):
    with pytest.raises(ValueError, match="learning_rate is missing, and DeepSpeed's config needs it; pass it"):
        config(tmp_path, learning_rate=None, deepspeed={"zero_optimization": {"stage": 2}})
