"""ImageReward: weights in the published layout against the published architecture, written out in plain torch."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_imagereward import HEADS, IMAGE_SIZE, LAYERS, tiny_imagereward, tiny_weights
from torch.autograd import gradcheck
from transformers import AutoTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffusers_adjoint.rewards import WeightedReward, differentiable_preprocess, reward_gradient
from diffusers_adjoint.rewards.imagereward import ImageReward

PROMPTS = ["a cat", "the red house a cats the sea", "sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_imagereward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture
def reward(folder):
    return ImageReward(folder, folder / "bert")


class Published:
    """Names, order of operations and constants of the authors' package; float64."""

    def __init__(self, folder):
        self.w = {name: value.double() for name, value in tiny_weights().items()}
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x, eps):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def gelu(self, x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def attend(self, query, key, value, heads, mask=0.0):
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = torch.einsum("bhqc,bhkc->bhqk", query, key) / query.shape[-1] ** 0.5 + mask
        return torch.einsum("bhqk,bhkc->bhqc", scores.softmax(-1), value).transpose(1, 2).flatten(2)

    def see(self, pixels):
        vit = "blip.visual_encoder"
        kernel = self.w[f"{vit}.patch_embed.proj.weight"]
        patches = pixels.unfold(2, kernel.shape[-1], kernel.shape[-1]).unfold(3, kernel.shape[-1], kernel.shape[-1])
        x = torch.einsum("bcijkl,ockl->bijo", patches, kernel).flatten(1, 2) + self.w[f"{vit}.patch_embed.proj.bias"]
        x = torch.cat([self.w[f"{vit}.cls_token"].expand(len(x), -1, -1), x], 1) + self.w[f"{vit}.pos_embed"]
        for block in (f"{vit}.blocks.{number}" for number in range(LAYERS)):
            query, key, value = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(query, key, value, x.shape[-1] // 64))
            hidden = self.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{vit}.norm", x, 1e-6)

    def bert_attention(self, name, x, states, mask):
        query, key, value = (
            self.linear(f"{name}.query", x),
            self.linear(f"{name}.key", states),
            self.linear(f"{name}.value", states),
        )
        return self.attend(query, key, value, HEADS, mask)

    def read(self, prompts, seen):
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        mask = -10000.0 * (1 - tokens.attention_mask[:, None, None].double())
        bert = "blip.text_encoder"
        x = self.w[f"{bert}.embeddings.word_embeddings.weight"][tokens.input_ids]
        x = x + self.w[f"{bert}.embeddings.position_embeddings.weight"][:35]
        x = self.norm(f"{bert}.embeddings.LayerNorm", x, 1e-12)
        for layer in (f"{bert}.encoder.layer.{number}" for number in range(LAYERS)):
            for part, states, hidden in (("attention", None, mask), ("crossattention", seen, 0.0)):
                y = self.bert_attention(f"{layer}.{part}.self", x, x if states is None else states, hidden)
                y = self.linear(f"{layer}.{part}.output.dense", y)
                x = self.norm(f"{layer}.{part}.output.LayerNorm", x + y, 1e-12)
            y = self.linear(f"{layer}.output.dense", self.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + y, 1e-12)
        return x[:, 0]

    def __call__(self, images, prompts):
        pixels = differentiable_preprocess(images.double(), IMAGE_SIZE, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        x = self.read(prompts, self.see(pixels))
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("prompts", [PROMPTS, ["sea", "sea", "sea"], ["[ENC] cat", "a[DEC]", ""]])
def test_scores_are_those_of_the_published_architecture(reward, folder, prompts):
    """1e-10 is far above float64's rounding here and far below a layer norm's 1e-12 in place of 1e-6."""
    images = torch.rand(3, 3, 20, 26, dtype=torch.float64)
    scores = reward.double()(images, prompts)
    assert scores.shape == (3,) and scores.std() > 0.1
    torch.testing.assert_close(scores, Published(folder)(images, prompts), rtol=0, atol=1e-10)


def test_float32_scores(reward, folder):
    """Rounding of single precision through layers of unit gain: measured below 1e-6."""
    images = torch.rand(3, 3, 16, 16)
    scores = reward(images=images, prompts=PROMPTS, caption=PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), Published(folder)(images, PROMPTS), rtol=0, atol=1e-5)


def test_gradient_of_the_score(reward):
    images = torch.rand(1, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: reward.double()(x, PROMPTS[:1]), images)


def test_gradient_is_that_of_the_published_architecture(reward, folder):
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(reward.double()(images, PROMPTS[:2]).sum(), images)
    (theirs,) = torch.autograd.grad(Published(folder)(images, PROMPTS[:2]).sum(), images)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_score_does_not_depend_on_its_batch(reward):
    """Neither on the other images nor on how far longer prompts pad the shorter ones."""
    images = torch.rand(3, 3, 16, 20, dtype=torch.float64)
    reward.double()
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone, rtol=0, atol=1e-12)


def test_half_precision_images(reward):
    images = torch.rand(3, 3, 16, 16).bfloat16().requires_grad_()
    scores = reward(images, PROMPTS)
    assert torch.equal(scores, reward(images.detach().float(), PROMPTS))
    scores.sum().backward()
    assert images.grad.dtype == torch.bfloat16 and images.grad.abs().sum() > 0


def test_half_precision_model_keeps_the_head_in_float32(reward):
    """bfloat16 rounds by 0.4 %, and every layer of unit gain adds to it: measured 0.02."""
    images = torch.rand(8, 3, 16, 16)
    exact, rounded = reward(images, ["a cat"] * 8), reward.bfloat16()(images, ["a cat"] * 8)
    assert rounded.dtype == torch.float32
    raw = 1.0333394966054072 * rounded + 0.16717362830052426
    assert (raw - raw.bfloat16().float()).abs().max() > 1e-4  # a head in bfloat16 leaves float32's rounding, 1e-7
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


def test_as_a_reward_of_the_trainer(reward):
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    weighted = WeightedReward(reward)
    weighted.require_arguments({"caption": ["x"]})
    result = reward_gradient(torch.rand(3, 3, 16, 16), lambda x: x, weighted, PROMPTS, {"caption": ["x"] * 3})
    assert list(result.values) == ["ImageReward"] and (result.gradient.flatten(1).norm(dim=1) > 0).all()


def test_long_prompts_are_cut_with_one_warning(reward, caplog):
    """35 tokens: start, 33 words, end."""
    images = torch.rand(2, 3, 16, 16)
    fits = "cat sea " * 16 + "red"
    full = reward(images, [fits, fits])
    assert reward(images, [fits.removesuffix(" red"), fits])[0] != full[0]  # the last word that fits is read
    assert not caplog.records
    for _ in range(2):
        torch.testing.assert_close(reward(images, [fits + " house", fits]), full)
    assert [record.getMessage() for record in caplog.records] == [
        "ImageReward reads the first 35 tokens of a prompt; longer prompts are cut."
    ]


@pytest.mark.parametrize("name", ["ImageReward.pt", "ImageReward.safetensors", "renamed.pt"])
def test_weights_of_every_form(reward, folder, tmp_path, name):
    """Both files in a folder, and the path of the weights; half-precision weights become float32."""
    shutil.copy(folder / "med_config.json", tmp_path)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in tiny_weights().items()}
    (torch.save if name.endswith("pt") else save_file)(weights, tmp_path / name)
    loaded = ImageReward(tmp_path / name if name.startswith("renamed") else str(tmp_path), folder / "bert")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for ours, exact in zip(loaded.parameters(), reward.parameters(), strict=True):
        assert torch.equal(ours, exact.half().float())


def test_safetensors_come_first(reward, folder, tmp_path):
    shutil.copy(folder / "med_config.json", tmp_path)
    save_file(tiny_weights(), tmp_path / "ImageReward.safetensors")
    torch.save(tiny_weights(seed=1), tmp_path / "ImageReward.pt")
    loaded = ImageReward(tmp_path, folder / "bert")
    assert torch.equal(loaded.text.embeddings.word_embeddings.weight, reward.text.embeddings.word_embeddings.weight)


def written(folder, target, *, weights=None, config=None):
    """The tiny model in `target`, with changes; `None` as a new value takes an entry away."""
    settings = json.loads((folder / "med_config.json").read_text()) | (config or {})
    tensors = tiny_weights() | (weights or {})
    (target / "med_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    torch.save({k: v for k, v in tensors.items() if v is not None}, target / "ImageReward.pt")
    return target


ATTENTION = "blip.text_encoder.encoder.layer.1.crossattention.self"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"weights": {f"{ATTENTION}.key.weight": None}},
            f"has missing, .* tensors, 1 in all, such as {ATTENTION}.key.weight; pass",
        ),
        (
            {"weights": {"blip.visual_encoder.norm.extra": torch.ones(2)}},
            "1 in all, such as blip.visual_encoder.norm.extra; pass",
        ),
        ({"weights": {f"{ATTENTION}.key.bias": torch.ones(2)}}, f"1 in all, such as {ATTENTION}.key.bias; pass"),
        ({"weights": {"mlp.layers.4.weight": None}}, "has no 'mlp.layers.4.weight'; pass"),
        ({"weights": {"blip.visual_encoder.cls_token": None}}, "has no 'blip.visual_encoder.cls_token'; pass"),
        ({"config": {"num_hidden_layers": 1}}, r"26 in all, such as (blip.text_encoder.encoder.layer.1\S+, ){2}\S+; pass"),
        ({"config": {"num_attention_heads": None}}, "has no 'num_attention_heads'; pass"),
        ({"config": {"vocab_size": 30524}}, "1 in all, such as blip.text_encoder.embeddings.word_embeddings.weight; pass"),
    ],
)
def test_other_weights(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"{message}.*\.$"):
        ImageReward(written(folder, tmp_path, **changes), folder / "bert")


def test_weights_without_configuration(folder, tmp_path):
    torch.save(tiny_weights(), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"holds no med_config.json; pass"):
        ImageReward(tmp_path, folder / "bert")


def test_another_tokenizer(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    tokenizer.add_tokens(["dog"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer has 18 tokens .* but the text encoder has 17; pass .*\.$"):
        ImageReward(folder, tmp_path)


@pytest.mark.parametrize(
    "images, prompts, error, message",
    [
        (torch.rand(3, 16, 16), PROMPTS, ValueError, r"images has shape \(3, 16, 16\); pass"),
        (torch.ones(3, 3, 16, 16, dtype=torch.uint8), PROMPTS, TypeError, "images has dtype torch.uint8; pass floating"),
        (2 * torch.rand(3, 3, 16, 16) - 1, PROMPTS, ValueError, r"images reach from -(1|0\.\d+) to (1|0\.\d+); pass"),
        (torch.rand(3, 3, 16, 16), PROMPTS[:2], ValueError, "prompts is a list of 2 for 3 images; pass"),
        (torch.rand(3, 3, 16, 16), "cat", ValueError, "prompts is one string for 3 images; pass"),
    ],
)
def test_bad_input(reward, images, prompts, error, message):
    with pytest.raises(error, match=f"^{message}.*\\.$"):
        reward(images, prompts)
