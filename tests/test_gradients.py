"""Every trained tensor gets its gradient: with gradient checkpointing the same as without, and none is left out in silence."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny_images import flux
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, difference, make_trainer, weights
from transformers import TrainerCallback

from diffusers_adjoint.trainer.gradients import require_checkpointing, require_gradients, warn_of_unused
from diffusers_adjoint.trainer.parallel import require_fsdp2

SCALED = {sd15: "cross_attention_kwargs", sd3: "joint_attention_kwargs"}
REFUSAL = "with gradient checkpointing.*leave a LoRA scale out of pipeline_kwargs and set lora_alpha instead, or train without"


def scaled(build, scale=0.5):
    return {"pipeline_kwargs": {SCALED[build]: {"scale": scale}}}


class Stop(TrainerCallback):
    """Ends `train` when the check at its start is over."""

    def __init__(self):
        self.reached = False

    def on_train_begin(self, *args, **kwargs):
        self.reached = True
        raise InterruptedError


def passes_the_start(trainer):
    trainer.add_callback(stop := Stop())
    with pytest.raises(InterruptedError):
        trainer.train()
    return stop.reached


# ------------------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("build", [sd15, sd3], ids=["sd15", "sd3"])
def test_a_scale_that_checkpointed_layers_lose_is_refused(tmp_path, build):
    with pytest.raises(ValueError, match=REFUSAL) as caught:
        make_trainer(tmp_path, build, gradient_checkpointing=True, **scaled(build)).train()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert passes_the_start(make_trainer(tmp_path, build, **scaled(build)))
    assert passes_the_start(make_trainer(tmp_path, build, gradient_checkpointing=True, **scaled(build, 1.0)))


def test_checkpointing_that_was_switched_on_for_the_network_is_compared_too(tmp_path):
    pipeline = sd3()
    pipeline.transformer.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=REFUSAL):
        make_trainer(tmp_path, pipeline=pipeline, **scaled(sd3)).train()


def test_a_scale_is_refused_on_top_of_the_base_s_adapters_and_in_16_bits(tmp_path):
    pipeline = sd3()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match=REFUSAL):
        make_trainer(tmp_path, pipeline=pipeline, gradient_checkpointing=True, **scaled(sd3)).train()
    with pytest.raises(ValueError, match=REFUSAL):
        make_trainer(tmp_path, pipeline=sd3().to(torch.bfloat16), gradient_checkpointing=True, **scaled(sd3)).train()
    assert passes_the_start(make_trainer(tmp_path, pipeline=sd3().to(torch.bfloat16), gradient_checkpointing=True))


def test_the_scale_of_the_base_s_adapters_is_refused_where_none_of_ours_is_checkpointed(tmp_path):
    """The trained layer comes after the checkpointed ones, but the adjoint goes through them."""
    pipeline, last = sd3(), LoraConfig(r=2, target_modules=["proj_out"])
    style = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.transformer.add_adapter(style, adapter_name="style")
    with pytest.raises(ValueError, match=REFUSAL):
        make_trainer(tmp_path, pipeline=pipeline, peft_config=last, gradient_checkpointing=True, **scaled(sd3)).train()


def test_a_scale_where_no_trained_layer_is_checkpointed_trains(tmp_path):
    """The gradient of what comes after the last block needs nothing that is evaluated again."""

    def train(checkpointing):
        target = LoraConfig(r=2, lora_alpha=4, target_modules=["proj_out"])
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, peft_config=target, **scaled(sd3))
        start = weights(trainer)
        trainer.train()
        return weights(trainer), start

    plain, start = train(False)
    assert difference(plain, start) > 0
    assert difference(plain, train(True)[0]) <= 1e-6  # recomputed activations, same numbers up to rounding


def prepared(trainer):
    columns, generators = {"prompt": PROMPTS[:2]}, [torch.Generator().manual_seed(i) for i in (0, 1)]
    trainer.replay.find_state(columns, generators)
    return trainer.replay.prepare(columns, generators)


def test_the_comparison_leaves_weights_switches_and_random_numbers_and_costs_two_evaluations(tmp_path):
    trainer = make_trainer(tmp_path, gradient_checkpointing=True, learning_rate=0.1)
    trainer.train()  # trained values come back as exactly as the zeros of the start
    network = trainer.denoiser.network
    x, conditioning = prepared(trainer)
    calls, functions = [], []
    network.register_forward_pre_hook(lambda *_: calls.append(network.is_gradient_checkpointing))
    random, before = torch.get_rng_state(), {name: p.detach().clone() for name, p in network.named_parameters()}
    assert any(before[name].abs().max() > 0 for name in before if "lora_B" in name)

    def own(layer, *args):
        functions.append(layer)
        return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)

    network.enable_gradient_checkpointing(own)
    require_checkpointing(trainer.denoiser, x, 1, conditioning)
    assert calls == [True, False]
    assert functions and network.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(network.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in after.values())
    functions.clear()
    with torch.enable_grad():
        trainer.replay.predict(x, 1, conditioning)
    assert functions  # the function that checkpoints is the user's own again


def test_an_error_on_the_way_leaves_the_weights_too(tmp_path):
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    x, conditioning = prepared(trainer)
    network, before = trainer.denoiser.network, weights(trainer)
    network.enable_gradient_checkpointing()
    seen = []

    def fail(*_):
        seen.append(difference(weights(trainer), before))
        if not network.is_gradient_checkpointing:
            raise InterruptedError

    network.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        require_checkpointing(trainer.denoiser, x, 1, conditioning)
    assert min(seen) > 0  # both were evaluated at other values
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert network.is_gradient_checkpointing


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("taken_back", [True, False], ids=["taken back", "left"])
def test_whatever_a_forward_takes_back_is_noticed(tmp_path, lora, taken_back):
    """Another width of a norm, for the time of a forward."""
    trainer = make_trainer(tmp_path, lora=lora)
    x, conditioning = prepared(trainer)
    network = trainer.denoiser.network
    network.enable_gradient_checkpointing()
    norm = network.transformer_blocks[0].norm1.norm
    own = norm.eps
    network.register_forward_pre_hook(lambda *_: setattr(norm, "eps", 0.5))
    if taken_back:
        network.register_forward_hook(lambda *_: setattr(norm, "eps", own))
        with pytest.raises(ValueError, match="resets at the end of its forward"):
            require_checkpointing(trainer.denoiser, x, 1, conditioning)
    else:
        require_checkpointing(trainer.denoiser, x, 1, conditioning)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_either_half_of_an_adapter_is_compared(tmp_path, part):
    """A gradient that is doubled when a layer is evaluated again, of one tensor alone."""
    trainer = make_trainer(tmp_path)
    x, conditioning = prepared(trainer)
    network = trainer.denoiser.network
    network.enable_gradient_checkpointing()
    tensor = next(p for name, p in network.named_parameters() if f"to_k.{part}." in name)
    tensor.register_hook(lambda gradient: 2 * gradient if network.is_gradient_checkpointing else gradient)
    with pytest.raises(ValueError, match="a gradient is off by 100.0%"):
        require_checkpointing(trainer.denoiser, x, 1, conditioning)


@pytest.mark.parametrize(("plain", "refused"), [(1.0, True), (torch.inf, False)], ids=["there alone", "in any case"])
def test_a_gradient_that_overflows_is_told_from_a_wrong_one(tmp_path, plain, refused):
    trainer = make_trainer(tmp_path)
    x, conditioning = prepared(trainer)
    network = trainer.denoiser.network
    network.enable_gradient_checkpointing()
    tensor = next(p for p in network.parameters() if p.requires_grad)
    tensor.register_hook(lambda gradient: gradient * (torch.inf if network.is_gradient_checkpointing else plain))
    if refused:
        with pytest.raises(ValueError, match="a gradient is off by inf%"):
            require_checkpointing(trainer.denoiser, x, 1, conditioning)
    else:
        require_checkpointing(trainer.denoiser, x, 1, conditioning)


def test_fsdp_s_own_checkpointing_is_refused():
    """It is put into the network after the comparison."""
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=True)
    with pytest.raises(ValueError, match="fsdp_activation_checkpointing.*pass false, and gradient_checkpointing=True."):
        require_fsdp2(plugin)


# ------------------------------------------------------------------------------------------------------- tensors without gradient


def fused_flux():
    pipeline = flux()
    pipeline.transformer.fuse_qkv_projections()
    return pipeline


FLUX = {
    "pipeline_kwargs": {"height": 16, "width": 16, "max_sequence_length": 8},
    "guidance_scale": 3.0,
    "num_inference_steps": 3,
    "num_loss_steps": 1,
}


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_beside_fused_projections_are_refused_before_a_weight_moves(tmp_path, kind):
    config = LoraConfig(r=2, lora_alpha=4, **kind)
    trainer = make_trainer(tmp_path, pipeline=fused_flux(), peft_config=config, gradient_accumulation_steps=2, **FLUX)
    start = weights(trainer)
    with pytest.raises(ValueError, match=r"no gradient reaches any to_q, to_k or to_v .*unfuse_qkv_projections\(\)") as caught:
        trainer.train()
    sentence = str(caught.value)
    assert "transformer_blocks.0.attn.to_q" in sentence and "leave these out of target_modules." in sentence
    assert "to_out" not in sentence and "\n" not in sentence
    assert difference(start, weights(trainer)) == 0.0
    trainer.pipeline.transformer.unfuse_qkv_projections()
    assert trainer.train().global_step == 2


def test_all_weights_beside_fused_projections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no gradient reaches any to_q, to_k or to_v .*pass a peft_config without them"):
        make_trainer(tmp_path, pipeline=fused_flux(), lora=False, **FLUX).train()


def test_a_layer_that_the_call_does_not_use_is_told_once(tmp_path, caplog):
    """As networks have them whose last block computes what nobody reads."""
    pipeline = sd3()
    block = pipeline.transformer.transformer_blocks[0]
    block.unread = torch.nn.Module()
    block.unread.to_k = torch.nn.Linear(4, 4)
    block.unread.only_here = torch.nn.Linear(4, 4)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "only_here"])
    trainer = make_trainer(tmp_path, pipeline=pipeline, peft_config=config, max_steps=3)
    start = weights(trainer)
    trainer.train()
    told = [record.message for record in caplog.records if "get no gradient" in record.message]
    assert len(told) == 1
    unread = {name for name in start if ".unread." in name}
    assert told[0].startswith(f"{len(unread)} of {len(start)} trained tensors get no gradient") and len(unread) == 4
    assert all(name in told[0] for name in unread)
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved == start.keys() - unread


def test_a_part_that_one_micro_batch_alone_uses_is_trained(tmp_path, caplog):
    """It is judged after the last backward pass of an update: here the first one does not use the adapters of to_q."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, num_loss_steps=1, max_steps=1)
    layers = [m for name, m in trainer.denoiser.network.named_modules() if name.endswith("attn.to_q")]
    original, batches = trainer.regress, []

    def regress(*args):
        batches.append(1)
        for layer in layers:
            layer.scaling["adjoint"] = 2.0 if len(batches) == 2 else None
        found = original(*args)
        for layer in layers:
            layer.scaling["adjoint"] = 2.0  # what it was: the adapter is looked at before the next micro-batch
        return found

    forwards = {layer: layer.forward for layer in layers}
    for layer in layers:
        layer.forward = lambda x, *a, layer=layer, **k: (
            layer.base_layer(x) if layer.scaling["adjoint"] is None else forwards[layer](x, *a, **k)
        )
    trainer.regress = regress
    trainer.train()
    assert len(batches) == 2
    assert "get no gradient" not in caplog.text


ALL = [f"blocks.{i}.{layer}.lora_{part}.adjoint.weight" for i in (0, 1) for layer in ("to_q", "to_out.0") for part in "AB"]


def test_what_counts_as_all_of_a_kind():
    require_gradients(ALL, [], lora=True)
    first = [name for name in ALL if "0.to_q" in name]
    require_gradients(ALL, first, lora=True)  # another to_q learns
    require_gradients([*ALL, "unread.weight", "unread.bias"], ["unread.weight", "unread.bias"], lora=False)  # there is only one
    with pytest.raises(
        ValueError, match=r"reaches any to_out\.0 of the network \(blocks\.0\.to_out\.0 and blocks\.1\.to_out\.0\)"
    ):
        require_gradients(ALL, [name for name in ALL if "to_out" in name], lora=True)
    with pytest.raises(ValueError, match="no gradient reaches any to_q"):  # one adapter, and it is all that is trained
        require_gradients(first, first, lora=True)


def test_a_long_list_of_unused_tensors_is_cut(caplog):
    warn_of_unused(ALL, [])
    assert not caplog.records
    many = [f"blocks.{i}.unread_{i}.weight" for i in range(20)]
    warn_of_unused([*many, "proj_out.weight"], many)
    assert "20 of 21 trained tensors" in caplog.text
    assert "blocks.0.unread_0.weight, " in caplog.text and " and 14 more." in caplog.text
