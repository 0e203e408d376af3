"""The adapter, its strength, the trained weights and the optimizer are looked at before training, updates, saving, evaluating."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, config, difference, make_trainer, rehearsed, weights
from transformers import TrainerCallback

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.model.chain import PipelineChain
from diffusers_adjoint.trainer.updates import AfterOptimizerStep


def with_style(build=sd3):
    pipeline = build()
    network = pipeline.unet if build is sd15 else pipeline.transformer
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    return pipeline


def other_lora(pipeline):
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), adapter_name="preview")


def another_network(pipeline):
    pipeline.register_modules(transformer=sd3().transformer)


# What a script may do between two calls of the trainer: what is said then, and the way out that it names.
MEDDLING = {
    "preview": (lambda p: p.set_adapters("adjoint", 0.3), "another strength", r"set_adapters\('adjoint', 1.0\)"),
    "unloaded": (lambda p: p.unload_lora_weights(), "no longer has the adapter 'adjoint'", "resume from a checkpoint"),
    "deleted": (lambda p: p.delete_adapters("adjoint"), "no longer has the adapter 'adjoint'", "resume from a checkpoint"),
    "switched off": (lambda p: p.disable_lora(), "are switched off", r"enable_lora\(\)"),
    "fused": (lambda p: p.fuse_lora(), "a fused adapter", r"unfuse_lora\(\)"),
    "another one loaded": (other_lora, r"are \['preview'\]", r"set_adapters\('adjoint', 1.0\)"),
    "another network": (another_network, "no longer the network in training", "put it back"),
}
CALLS = {"save": lambda t: t.save_model(), "evaluate": lambda t: t.evaluate(), "train": lambda t: t.train()}


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_dict({"prompt": PROMPTS[:2]})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("meddle", "says", "cure"), MEDDLING.values(), ids=MEDDLING.keys())
def test_an_adapter_that_is_not_as_it_was_trained(tmp_path, rows, meddle, says, cure, call):
    trainer = make_trainer(tmp_path, eval_dataset=rows)
    meddle(trainer.pipeline)
    with pytest.raises(ValueError, match=f"{says}.*; .*{cure}.*\\.$") as caught:
        call(trainer)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_is_put_back_is_accepted(tmp_path, rows):
    trainer = make_trainer(tmp_path, eval_dataset=rows)
    trainer.train()
    for away, back in (
        (lambda p: p.set_adapters("adjoint", 0.3), lambda p: p.set_adapters("adjoint", 1.0)),
        (lambda p: p.disable_lora(), lambda p: p.enable_lora()),
        (lambda p: p.fuse_lora(), lambda p: p.unfuse_lora()),
    ):
        away(trainer.pipeline)
        with pytest.raises(ValueError):
            trainer.save_model()
        back(trainer.pipeline)
        trainer.save_model()
    with torch.no_grad():  # only training needs gradients
        trainer.save_model()
        trainer.evaluate()


@pytest.mark.parametrize("build", [sd3, sd15])
def test_the_bases_adapters_are_looked_at_too(tmp_path, build):
    trainer = make_trainer(tmp_path, pipeline=with_style(build))
    for names, scales in ((["style"], [0.7]), (["adjoint"], [1.0]), (["style", "adjoint"], [1.0, 1.0])):
        trainer.pipeline.set_adapters(names, scales)
        with pytest.raises(ValueError, match=r"call set_adapters\(\['style', 'adjoint'\], \[…\]\)"):
            trainer.save_model()
    trainer.pipeline.set_adapters(["style", "adjoint"], [0.7, 1.0])
    trainer.save_model()


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"alpha_pattern": {"to_v": 16}, "rank_pattern": {"to_q": 4}}])
def test_every_strength_that_was_asked_for_is_right(tmp_path, kind):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, lora_alpha=6, **kind))
    trainer.train()
    trainer.save_model()
    trainer.pipeline.set_adapters("adjoint", 0.9)
    with pytest.raises(ValueError, match="another strength"):
        trainer.save_model()


SWITCHES = {
    "off and on": lambda p: (p.disable_lora(), p.enable_lora()),
    "alone and back": lambda p: (p.set_adapters("style", 0.7), p.set_adapters(["style", "adjoint"], [0.7, 1.0])),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
@pytest.mark.parametrize("build", [sd3, sd15])
def test_the_bases_adapters_stay_frozen_when_they_are_switched_on(tmp_path, build, switch):
    """PEFT makes all adapters trainable that are switched on; the optimizer has ours only."""
    trainer = make_trainer(tmp_path, pipeline=with_style(build))
    ours = weights(trainer).keys()
    switch(trainer.pipeline)
    assert weights(trainer).keys() > ours
    trainer.train()
    switch(trainer.pipeline)
    trainer.save_model()
    assert weights(trainer).keys() == ours


class Meddling(TrainerCallback):
    """Does something to the pipeline at one moment of the second update."""

    def __init__(self, moment, meddle):
        self._seen = []
        setattr(self, moment, lambda args, state, control, **kwargs: self._at(state, meddle))

    def _at(self, state, meddle):
        if state.global_step == 1 and not self._seen:
            self._seen.append(meddle())


@pytest.mark.parametrize("moment", ["on_step_end", "on_step_begin", "on_substep_end", "on_log", "on_save"])
def test_no_update_is_made_of_another_strength(tmp_path, moment):
    options = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    if moment == "on_save":
        options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, **options)
    made = []
    trainer.add_callback(Meddling(moment, lambda: trainer.pipeline.set_adapters("adjoint", 0.3)))
    trainer.add_callback(AfterOptimizerStep(lambda: made.append(trainer.state.global_step)))
    with pytest.raises(ValueError, match=r"another strength than in training; call set_adapters\('adjoint', 1.0\)"):
        trainer.train()
    assert made == [0]


@pytest.mark.parametrize("moment", ["on_step_end", "on_step_begin", "on_substep_end"])
def test_the_bases_adapters_are_frozen_before_each_update(tmp_path, monkeypatch, moment):
    trainer = make_trainer(tmp_path, pipeline=with_style(), per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.add_callback(Meddling(moment, lambda: SWITCHES["off and on"](trainer.pipeline)))
    in_rollouts, rollout = [], PipelineChain.rollout

    def seen(chain):
        if not rehearsed(chain):
            in_rollouts.append(weights(trainer).keys())
        return rollout(chain)

    monkeypatch.setattr(PipelineChain, "rollout", seen)
    ours = weights(trainer).keys()
    trainer.train()
    assert in_rollouts == [ours] * 4


def test_a_preview_within_an_update_is_found_at_the_next_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    step = trainer.training_step

    def previewed(*args):
        loss = step(*args)
        if trainer.state.global_step == 1:
            trainer.pipeline.set_adapters("adjoint", 0.3)
        return loss

    trainer.training_step = previewed
    with pytest.raises(ValueError, match="another strength"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lora", [True, False])
def test_training_without_gradients(tmp_path, off, lora):
    trainer = make_trainer(tmp_path, lora=lora)
    with off(), pytest.raises(ValueError, match="gradients are switched off; call train.. outside of torch.no_grad"):
        trainer.train()


@pytest.mark.parametrize("inside", ["pipeline", "trainer"])
def test_weights_made_in_inference_mode(tmp_path, inside):
    with torch.inference_mode() if inside == "pipeline" else contextlib.nullcontext():
        pipeline = sd3()
    with torch.inference_mode() if inside == "trainer" else contextlib.nullcontext():
        trainer = make_trainer(tmp_path, pipeline=pipeline)
    with pytest.raises(
        ValueError, match=r"were created in torch.inference_mode\(\) and cannot have gradients; load the pipeline"
    ):
        trainer.train()


def with_optimizer(tmp_path, pipeline, parameters, lora=True):
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    peft = LoraConfig(r=2) if lora else None
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return AdjointMatchingTrainer(pipeline, brightness, config(tmp_path), rows, peft_config=peft, optimizers=(optimizer, None))


def test_an_optimizer_of_other_weights(tmp_path):
    """It was made before the trainer, when there was no adapter yet: nothing would train."""
    pipeline = sd3()
    trainer = with_optimizer(tmp_path, pipeline, pipeline.transformer.parameters())
    with pytest.raises(ValueError, match=r"holds 0 of the 16 weights in training and \d+ others; leave optimizers out"):
        trainer.train()
    trained = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.SGD(trained[1:], lr=1e-2)
    with pytest.raises(ValueError, match="holds 15 of the 16 weights"):
        trainer.train()
    trainer.optimizer = torch.optim.SGD(trained, lr=1e-2)
    start = weights(trainer)
    trainer.train()
    assert difference(start, weights(trainer)) > 0
    trainer.train()  # with the optimizer that the host has wrapped


def test_an_optimizer_of_all_weights(tmp_path):
    pipeline = sd3()
    trainer = with_optimizer(tmp_path, pipeline, pipeline.transformer.parameters(), lora=False)
    trainer.train()
    pipeline.transformer.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"0 weights of the transformer .* require a gradient, instead of the \d+ .* after making the trainer"
    ):
        trainer.train()
