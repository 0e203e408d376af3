"""A LoRA where the pipeline's class saves none: the network's own file, read by diffusers, by us, and as the card says."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_network_lora import ovis
from tiny_pipelines import sd3
from tiny_trainer import difference, make_trainer, weights

from diffusers_adjoint.evaluate.models import load_models
from diffusers_adjoint.model.lora import WEIGHTS_NAME, add_lora, load_lora, load_saved_lora, save_lora

CALL = {"height": 16, "width": 16, "max_sequence_length": 16}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_v": 16.0}},
    "all-linear": {"target_modules": "all-linear"},
}


def sample(pipeline):
    for tensor in (*pipeline.transformer.parameters(), *pipeline.transformer.buffers()):
        tensor.data = tensor.data.clone()  # those of a file begin at other addresses, by which a product may round
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", "return_dict": False}
    return pipeline(["a cat"], generator=generator, **options, **CALL)[0]


def tuned(**config):
    pipeline = ovis()
    add_lora(pipeline, "transformer", LoraConfig(r=2, lora_alpha=8, **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return pipeline


def metadata_of(file):
    with safe_open(file, "pt") as saved:
        metadata = json.loads(saved.metadata()["lora_adapter_metadata"])
    return {name: sorted(value) if isinstance(value, list) else value for name, value in metadata.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_that_of_the_network(tmp_path, kind):
    pipeline = tuned(**KINDS[kind])
    expected = sample(pipeline)
    save_lora(pipeline, "transformer", tmp_path / "ours")
    pipeline.transformer.save_lora_adapter(tmp_path / "hosts", adapter_name="adjoint")
    ours, hosts = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("ours", "hosts"))
    assert ours.keys() == hosts.keys() and all(torch.equal(ours[name], hosts[name]) for name in ours)
    assert metadata_of(tmp_path / "ours" / WEIGHTS_NAME) == metadata_of(tmp_path / "hosts" / WEIGHTS_NAME)

    fresh = ovis()
    assert not torch.equal(sample(fresh), expected)
    fresh.transformer.load_lora_adapter(tmp_path / "ours", prefix=None, weight_name=WEIGHTS_NAME)
    assert torch.equal(sample(fresh), expected)
    again = ovis()
    add_lora(again, "transformer", LoraConfig(r=2, lora_alpha=8, **KINDS[kind]))
    load_lora(again.transformer, "transformer", tmp_path / "ours")
    assert torch.equal(sample(again), expected)


def test_trained_saved_resumed_evaluated(tmp_path):
    ovis().save_pretrained(tmp_path / "base")
    options = {"reward_scale": 500.0, "save_strategy": "steps", "save_steps": 2, "pipeline_kwargs": CALL}

    def trainer(folder, steps):
        return make_trainer(tmp_path / folder, ovis, max_steps=steps, peft_config=LoraConfig(r=2, lora_alpha=8), **options)

    straight = trainer("out", 3)
    straight.train()
    straight.save_model()
    expected = sample(straight.pipeline)
    assert not torch.equal(expected, sample(ovis()))
    trainer("again", 2).train()
    resumed = trainer("again", 3)
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(straight), weights(resumed)) == 0

    # The instruction is no part of the config.
    base, model = load_models(str(tmp_path / "base"), [str(tmp_path / "out")], {}, None, torch.device("cpu"))
    base.pipeline.system_prompt, base.pipeline.user_prompt_begin_id = "", len("user: ")
    with model.active():
        assert torch.equal(sample(model.pipeline), expected)
    assert torch.equal(sample(base.pipeline), sample(ovis()))
    pipe = ovis()
    (line,) = re.findall(r"^pipe\..*load_lora.*$", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    exec(line.replace('"out"', repr(str(tmp_path / "out"))), {"pipe": pipe})
    assert torch.equal(sample(pipe), expected)


def test_adapters_of_the_base_are_switched_on_at_the_network(tmp_path):
    pipeline = ovis()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    trainer = make_trainer(tmp_path / "out", pipeline=pipeline, pipeline_kwargs=CALL)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert '\npipe.transformer.set_adapters(["style", "adjoint"])\n' in card
    pipeline.transformer.set_adapters(["style", "adjoint"], [1.0, 0.5])
    with pytest.raises(ValueError, match=r"call set_adapters\(\['style', 'adjoint'\], \[…\]\) on the transformer"):
        trainer.save_model()
    pipeline.transformer.set_adapters(["style", "adjoint"], [1.0, 1.0])
    trainer.save_model()


def test_the_file_decides_how_it_is_read(tmp_path):
    """A later diffusers may load into the pipeline what only the network takes today, and files of both kinds stay."""
    pipeline = sd3()
    add_lora(pipeline, "transformer", LoraConfig(r=2, init_lora_weights=False))
    expected = get_peft_model_state_dict(pipeline.transformer, adapter_name="adjoint")
    save_lora(pipeline, "transformer", tmp_path / "pipeline")
    pipeline.transformer.save_lora_adapter(tmp_path / "network", adapter_name="adjoint")
    for folder in ("pipeline", "network"):
        evaluated, resumed = sd3(), sd3()
        load_saved_lora(evaluated, "transformer", tmp_path / folder / WEIGHTS_NAME, "adjoint")
        add_lora(resumed, "transformer", LoraConfig(r=2))
        load_lora(resumed.transformer, "transformer", tmp_path / folder)
        for network in (evaluated.transformer, resumed.transformer):
            read = get_peft_model_state_dict(network, adapter_name="adjoint")
            assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)
    other = ovis()
    with pytest.raises(ValueError, match="OvisImagePipeline takes no LoRA of this form"):
        load_saved_lora(other, "transformer", tmp_path / "pipeline" / WEIGHTS_NAME)
