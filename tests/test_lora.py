"""LoRA: adapters that the pipeline comes with, DoRA and rsLoRA, and what a reload gives."""

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import sample, sd3, sd15
from tiny_trainer import PROMPTS, difference, make_trainer, weights

from diffusers_adjoint.model.lora import ADAPTER


def with_style(build=sd3, weight=0.7):
    """A pipeline that carries an adapter, at a weight of its own."""
    pipeline = build()
    network = pipeline.unet if build is sd15 else pipeline.transformer
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), adapter_name="style")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    pipeline.set_adapters("style", weight)
    return pipeline


@pytest.fixture(params=[sd3, sd15], ids=["sd3", "sd15"])
def build(request):
    return request.param


def test_an_adapter_that_is_there_belongs_to_the_base(tmp_path, build):
    pipeline = with_style(build)
    before = sample(pipeline)
    assert not torch.equal(before, sample(build()))
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    network = trainer.denoiser.network
    style = {name: p.detach().clone() for name, p in network.named_parameters() if ".style." in name}
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    start, conditioning = trainer.replay.prepare({"prompt": PROMPTS[:2]}, generators)
    untouched = with_style(build)
    with torch.no_grad():
        reference = trainer.replay.predict(
            start, 1, conditioning, denoiser=untouched.unet if build is sd15 else untouched.transformer
        )
    assert trainer.denoiser.base_adapters == ["style"]
    assert torch.equal(sample(pipeline), before)  # ours starts at zero
    trainer.train()
    assert all(
        ".adjoint." in name for name in weights(trainer)
    )  # nothing else is trainable, also after base and model took turns
    assert all(torch.equal(p, style[name]) for name, p in network.named_parameters() if name in style)
    with torch.no_grad(), trainer.denoiser.base():
        assert torch.equal(trainer.replay.predict(start, 1, conditioning), reference)
    assert not torch.equal(sample(pipeline), before)

    trainer.save_model()
    fresh = with_style(build)
    fresh.load_lora_weights(tmp_path, adapter_name="tuned")
    fresh.set_adapters(["style", "tuned"], [0.7, 1.0])
    assert torch.equal(sample(fresh), sample(pipeline))


def test_a_disabled_adapter_is_not_part_of_the_base(tmp_path):
    pipeline = with_style()
    pipeline.disable_lora()
    before = sample(pipeline)
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    assert trainer.denoiser.base_adapters == []
    trainer.train()
    with trainer.denoiser.base():
        assert torch.equal(sample(pipeline), before)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_dora_and_rslora_train_and_reload(tmp_path, build, kind):
    trainer = make_trainer(tmp_path, build, peft_config=LoraConfig(r=4, lora_alpha=6, **kind), max_steps=3, reward_scale=500.0)
    start = weights(trainer)
    base = sample(build())
    trainer.train()
    if "use_dora" in kind:
        magnitudes = [name for name in start if "magnitude" in name]
        assert magnitudes and all(not torch.equal(start[name], weights(trainer)[name]) for name in magnitudes)
    trainer.save_model()
    fresh = build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(fresh), sample(trainer.pipeline))
    assert not torch.equal(sample(fresh), base)
    fresh.fuse_lora()
    # Fusing adds the product to the weight first: another order of the same float32 sums.
    assert (sample(fresh) - sample(trainer.pipeline)).abs().max() <= 1e-4 * (sample(fresh) - base).abs().max() + 1e-5


@pytest.mark.parametrize("make", [sd3, with_style], ids=["plain", "with an adapter"])
@pytest.mark.parametrize("targets", ["no_such.*", ["norm1"], ["pos_embed.proj", "norm1"]], ids=str)
def test_a_pipeline_whose_lora_was_refused_is_as_before(tmp_path, make, targets):
    """PEFT stops in the middle: some layers have the adapter already when it meets one that cannot."""
    pipeline = make()
    before = sample(pipeline)
    with pytest.raises(ValueError, match="cannot take this LoRA"):
        make_trainer(tmp_path, pipeline=pipeline, peft_config=LoraConfig(r=2, target_modules=targets))
    assert torch.equal(sample(pipeline), before)
    assert not any(f".{ADAPTER}." in name for name, _ in pipeline.transformer.named_parameters())
    trainer = make_trainer(tmp_path, pipeline=pipeline)
    trainer.train()
    fresh = make_trainer(tmp_path, pipeline=make())
    fresh.train()
    assert difference(weights(trainer), weights(fresh)) == 0.0


def test_the_same_pipeline_again(tmp_path):
    """A second trainer needs the first one's adapter gone, fused or not."""
    pipeline = sd3()
    make_trainer(tmp_path, pipeline=pipeline).train()
    with pytest.raises(ValueError, match=r"delete_adapters\('adjoint'\)"):
        make_trainer(tmp_path, pipeline=pipeline)
    tuned = sample(pipeline)
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"unload_lora_weights\(\) after fuse_lora\(\)"):
        make_trainer(tmp_path, pipeline=pipeline)
    pipeline.unload_lora_weights()
    again = make_trainer(tmp_path, pipeline=pipeline)
    assert (sample(pipeline) - tuned).abs().max() < 1e-5
    start = weights(again)
    again.train()
    assert difference(start, weights(again)) > 0
    pipeline.delete_adapters(ADAPTER)
    make_trainer(tmp_path, pipeline=pipeline)
