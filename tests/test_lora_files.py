"""The file of a LoRA gives the trained images to the bit, whatever it adapts: read by diffusers, by us, and as the card says."""

import itertools
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_images import hidream, sdxl
from tiny_parts import randomise
from tiny_pipelines import sd3, sd15
from tiny_trainer import difference, make_trainer, weights

from diffusers_adjoint.evaluate.models import load_models
from diffusers_adjoint.model.lora import WEIGHTS_NAME, add_lora, load_lora, load_saved_lora, save_lora

PIPELINES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": {"target_modules": ATTENTION},
    "attention, ff": {"target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2"]},
    "attention, proj": {"target_modules": [*ATTENTION, "proj_in", "proj_out"]},
    "attention, convolutions": {"target_modules": [*ATTENTION, "conv1", "conv2", "conv_in", "conv_shortcut", "proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*(to_q|to_v|proj_in|ff\.net\.2)$"},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"to_q": 4, r"attn2\.to_k|attn\.to_k": 1},
        "alpha_pattern": {"to_v": 16.0},
    },
    "layers": {"target_modules": ["to_q", "to_k"], "layers_to_transform": [0], "layers_pattern": "transformer_blocks"},
    "excluded": {"target_modules": ATTENTION, "exclude_modules": r".*attn2\.to_k|.*blocks\.1\..*"},
}
KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ALL = list(itertools.product(PIPELINES, TARGETS, KINDS))
FAST = {(p, t, k) for i, (p, t, k) in enumerate(ALL) if i % 7 == 0}
FAST |= {("sd15", "all-linear", "plain"), ("sd15", "attention, proj", "dora"), ("sdxl", "attention, convolutions", "dora")}
MATRIX = [pytest.param(*row, marks=[] if row in FAST else [pytest.mark.slow]) for row in ALL]


def component_of(pipeline):
    return "unet" if "unet" in pipeline.components else "transformer"


def sample(pipeline):
    # Weights that lie in a file's mapped memory begin at other addresses, by which a matrix product may round (4e-7 seen).
    for module in (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["a cat"], num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt").images
    return torch.as_tensor(images)


def tuned(build, **config):
    """A pipeline whose adapter has weights as after a training."""
    pipeline = build()
    component = component_of(pipeline)
    add_lora(pipeline, component, LoraConfig(r=2, lora_alpha=8, **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in getattr(pipeline, component).named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if "lora_magnitude" in name:
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return pipeline


def code_of_the_card(folder):
    """The lines of README.md that load the LoRA."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^pipe\.(?:load_lora_weights|set_adapters)\(.*\)$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "targets", "kind"), MATRIX)
def test_the_file_gives_the_tuned_images(tmp_path, name, targets, kind):
    build, config = PIPELINES[name], TARGETS[targets] | KINDS[kind]
    pipeline = tuned(build, **config)
    component, expected, base = component_of(pipeline), sample(pipeline), sample(build())
    assert not torch.equal(expected, base)
    save_lora(pipeline, component, tmp_path)
    fresh = build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(fresh), expected)
    fresh.fuse_lora()
    # Fusing adds the product to the weight first: another order of the same float32 sums.
    assert (sample(fresh) - expected).abs().max() <= 1e-5
    again = build()  # as resuming reads it
    add_lora(again, component, LoraConfig(r=2, lora_alpha=8, **config))
    load_lora(getattr(again, component), component, tmp_path)
    assert torch.equal(sample(again), expected)


@pytest.mark.parametrize(
    ("name", "targets", "kind"),
    [
        ("sd15", "all-linear", "dora"),
        ("sd3", "patterns", "plain"),
        pytest.param("sdxl", "attention, convolutions", "plain", marks=pytest.mark.slow),
        pytest.param("sd15", "regex", "rslora", marks=pytest.mark.slow),
        pytest.param("sd3", "all-linear", "dora", marks=pytest.mark.slow),
    ],
)
def test_trained_saved_resumed_evaluated(tmp_path, name, targets, kind):
    build, config = PIPELINES[name], TARGETS[targets] | KINDS[kind]
    build().save_pretrained(tmp_path / "base")
    options = {"reward_scale": 500.0, "save_strategy": "steps", "save_steps": 2}
    lora = {"peft_config": LoraConfig(r=2, lora_alpha=8, **config)}

    def trainer(folder, steps):
        return make_trainer(tmp_path / folder, build, max_steps=steps, **options, **lora)

    straight = trainer("out", 3)
    straight.train()
    straight.save_model()
    expected = sample(straight.pipeline)
    assert not torch.equal(expected, sample(build()))
    trainer("again", 2).train()
    resumed = trainer("again", 3)
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(straight), weights(resumed)) == 0

    base, model = load_models(str(tmp_path / "base"), [str(tmp_path / "out")], {}, None, torch.device("cpu"))
    with model.active():
        assert torch.equal(sample(model.pipeline), expected)
    assert torch.equal(sample(base.pipeline), sample(build()))
    pipe = build()
    (line,) = code_of_the_card(tmp_path / "out")
    exec(line.replace('"out"', repr(str(tmp_path / "out"))), {"pipe": pipe})
    assert torch.equal(sample(pipe), expected)


def of_the_old_version(folder):
    """Write the file anew as this package once did: the names of attention layers changed, the others not."""
    file = folder / WEIGHTS_NAME
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    names = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
    save_file({f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(names).items()}, file, metadata)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_a_file_of_the_old_version_is_read_whole(tmp_path, targets, kind):
    config = TARGETS[targets] | KINDS[kind]
    pipeline = tuned(sd15, **config)
    save_lora(pipeline, "unet", tmp_path / "out")
    of_the_old_version(tmp_path / "out")
    assert any(".lora.up." in name for name in load_file(tmp_path / "out" / WEIGHTS_NAME))
    if targets == "all-linear" and kind != "dora":  # what was wrong: diffusers alone loses a part; DoRA it cannot even run
        alone = sd15()
        alone.load_lora_weights(tmp_path / "out")
        assert not torch.equal(sample(alone), sample(pipeline))
    again = sd15()
    add_lora(again, "unet", LoraConfig(r=2, lora_alpha=8, **config))
    load_lora(again.unet, "unet", tmp_path / "out")
    assert torch.equal(sample(again), sample(pipeline))
    sd15().save_pretrained(tmp_path / "base")
    model = load_models(str(tmp_path / "base"), [str(tmp_path / "out")], {}, None, torch.device("cpu"))[1]
    with model.active():
        assert torch.equal(sample(model.pipeline), sample(pipeline))


def with_processors():
    """A UNet whose attention processors have layers of their own, as those of Custom Diffusion and IP-Adapter have."""
    pipeline = sd15()
    processors = pipeline.unet.attn_processors
    for name in processors:
        attention = pipeline.unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:
            sizes = {"hidden_size": attention.inner_dim, "cross_attention_dim": attention.cross_attention_dim}
            processors[name] = CustomDiffusionAttnProcessor2_0(**sizes)
    pipeline.unet.set_attn_processor(processors)
    randomise(pipeline.unet, 0.2)
    return pipeline


def with_pooled_text():
    """A UNet with layers named q_proj, k_proj, v_proj, which the earlier version renamed in another way."""
    pipeline = sd15()
    names = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    torch.manual_seed(0)
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(pipeline.unet.config, **names).eval())
    return pipeline


ODD_NAMES = {"processors": (with_processors, ".processor."), "pooled text": (with_pooled_text, ".q_proj.")}


@pytest.mark.parametrize("version", ["this", "earlier"])
@pytest.mark.parametrize("kind", ["plain", "dora"])
@pytest.mark.parametrize(("build", "part"), ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_odd_names_of_layers_are_read_whole(tmp_path, build, part, kind, version):
    """The earlier version took "processor" away, and called the matrices of q_proj otherwise than those of to_q."""
    config = TARGETS["all-linear"] | KINDS[kind]
    pipeline = tuned(build, **config)
    expected = sample(pipeline)
    assert not torch.equal(expected, sample(build()))
    save_lora(pipeline, "unet", tmp_path)
    names = load_file(tmp_path / WEIGHTS_NAME).keys()
    assert any(part in name for name in names)
    if version == "earlier":
        of_the_old_version(tmp_path)
        assert not any(name in load_file(tmp_path / WEIGHTS_NAME) for name in names if part in name and "lora_A" in name)
    again = build()
    add_lora(again, "unet", LoraConfig(r=2, lora_alpha=8, **config))
    load_lora(again.unet, "unet", tmp_path)
    assert torch.equal(sample(again), expected)
    fresh = build()
    load_saved_lora(fresh, "unet", tmp_path / WEIGHTS_NAME)
    assert torch.equal(sample(fresh), expected)


def test_the_output_of_an_attention_that_is_one_layer_keeps_its_name(tmp_path):
    """Transformers have an attention whose to_out is a layer, not a list of a layer and a dropout."""
    config = {"target_modules": ["to_out"], "use_dora": True}
    pipeline = tuned(hidream, **config)
    save_lora(pipeline, "transformer", tmp_path)
    assert any(name.endswith(".to_out.lora_magnitude_vector") for name in load_file(tmp_path / WEIGHTS_NAME))
    again = hidream()
    add_lora(again, "transformer", LoraConfig(r=2, lora_alpha=8, **config))
    load_lora(again.transformer, "transformer", tmp_path)
    fresh = hidream()
    load_saved_lora(fresh, "transformer", tmp_path / WEIGHTS_NAME, "adjoint")
    expected = get_peft_model_state_dict(pipeline.transformer, adapter_name="adjoint")
    for network in (again.transformer, fresh.transformer):
        read = get_peft_model_state_dict(network, adapter_name="adjoint")
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_lora_with_the_names_of_old_attention_processors_is_evaluated(tmp_path):
    """Such files are on the Hub; diffusers itself reads them."""
    pipeline = tuned(sd15)
    save_lora(pipeline, "unet", tmp_path)
    file = tmp_path / WEIGHTS_NAME
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    old = {}
    for name, value in load_file(file).items():
        layer, matrix, _ = name.rsplit(".", 2)
        attention, projection = layer.removesuffix(".0").rsplit(".", 1)
        old[f"{attention}.processor.{projection}_lora.{'down' if matrix == 'lora_A' else 'up'}.weight"] = value
    save_file(old, file, metadata)
    fresh = sd15()
    load_saved_lora(fresh, "unet", file)
    assert torch.equal(sample(fresh), sample(pipeline))


def test_a_lost_weight_is_noticed(tmp_path, monkeypatch):
    pipeline = tuned(sd15, target_modules="all-linear")
    write = type(pipeline).save_lora_weights

    def forgetful(folder, unet_lora_layers, unet_lora_adapter_metadata):
        kept = dict(list(unet_lora_layers.items())[1:])
        write(folder, unet_lora_layers=kept, unet_lora_adapter_metadata=unet_lora_adapter_metadata)

    monkeypatch.setattr(type(pipeline), "save_lora_weights", forgetful)
    with pytest.raises(OSError, match="does not hold the weights of the adapter"):
        save_lora(pipeline, "unet", tmp_path)
