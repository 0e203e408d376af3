"""Rewards on CLIP-like encoders and classifiers: what they share, and each one's formula."""

import json
import sys

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import (
    CLASSES,
    IMAGE_SIZE,
    TinyOpenCLIP,
    aesthetic_head,
    tiny_classifier,
    tiny_clip,
    tiny_open_clip,
    tiny_siglip,
)
from torch.autograd import gradcheck
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipImageProcessorPil,
    SiglipModel,
    T5TokenizerFast,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from diffusers_adjoint.rewards import PickScore, WeightedReward, hpsv2, reward_gradient, weights
from diffusers_adjoint.rewards.aesthetic import AestheticScore
from diffusers_adjoint.rewards.classifier import ClassLogProbability
from diffusers_adjoint.rewards.clipscore import CLIPScore
from diffusers_adjoint.rewards.hpsv2 import HPSv2
from diffusers_adjoint.rewards.prompt_contrast import PromptContrast
from diffusers_adjoint.rewards.weights import published_file, read_weights

PROMPTS = ["a cat", "the sea", "a red house"]
REWARDS = [
    "PickScore",
    "CLIPScore",
    "PromptContrast",
    "PromptContrast of SigLIP",
    "AestheticScore",
    "HPSv2",
    "ClassLogProbability",
]
READ_PROMPTS = REWARDS[:4] + ["HPSv2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of weights, by kind."""
    torch.manual_seed(0)
    head, hps = tmp_path_factory.mktemp("head"), tmp_path_factory.mktemp("hps")
    torch.save(aesthetic_head(), head / "aesthetic-model.pth")
    torch.save({"epoch": 3, "state_dict": TinyOpenCLIP().state_dict()}, hps / "HPS_v2.1_compressed.pt")
    return {
        "clip": tiny_clip(tmp_path_factory.mktemp("clip")),
        "siglip": tiny_siglip(tmp_path_factory.mktemp("siglip")),
        "classifier": tiny_classifier(tmp_path_factory.mktemp("classifier")),
        "head": head,
        "hps": hps,
    }


@pytest.fixture
def make(models, monkeypatch):
    """A reward by its name in `REWARDS`."""

    def hps():
        monkeypatch.setitem(sys.modules, "open_clip", tiny_open_clip())
        return HPSv2(models["hps"])

    clip, siglip = models["clip"], models["siglip"]
    makers = {
        "PickScore": lambda: PickScore(clip, clip),
        "CLIPScore": lambda: CLIPScore(clip),
        "PromptContrast": lambda: PromptContrast(model=clip),
        "PromptContrast of SigLIP": lambda: PromptContrast(model=siglip),
        "AestheticScore": lambda: AestheticScore(models["head"], clip),
        "HPSv2": hps,
        "ClassLogProbability": lambda: ClassLogProbability(models["classifier"], "dog"),
    }
    return lambda name: makers[name]()


def eight_bit(count=3):
    """Images of the models' size on which the PIL processors do no more than normalise."""
    return torch.randint(256, (count, 3, IMAGE_SIZE, IMAGE_SIZE)).float() / 255


def arrays(images):
    return [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]


@pytest.mark.parametrize("name", REWARDS)
def test_one_number_an_image_whatever_its_batch(make, name):
    reward, images = make(name), torch.rand(3, 3, 16, 20)
    scores = reward(images=images, prompts=PROMPTS, other_column=["x"] * 3)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.std() > 1e-4
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone)


@pytest.mark.parametrize("name", REWARDS)
def test_gradients(make, name):
    reward = make(name).double()
    images = torch.rand(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    assert reward(images, PROMPTS[:2]).dtype == torch.float64
    assert gradcheck(lambda x: reward(x, PROMPTS[:2]), images, fast_mode=True)


@pytest.mark.parametrize("name", REWARDS)
def test_half_precision_images(make, name):
    reward, images = make(name), torch.rand(3, 3, 16, 16).bfloat16().requires_grad_()
    scores = reward(images, PROMPTS)
    assert torch.equal(scores, reward(images.detach().float(), PROMPTS))
    scores.sum().backward()
    assert images.grad.dtype == torch.bfloat16 and images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", REWARDS)
def test_half_precision_model_rounds_its_features_alone(make, name):
    """bfloat16 has 8 bits: a cosine is off by a few times 2⁻⁸, times the scale; the result itself is not rounded."""
    reward, images = make(name), torch.rand(3, 3, 16, 16)
    exact, rounded = reward(images, PROMPTS), reward.bfloat16()(images, PROMPTS)
    scale = {"CLIPScore": 100, "AestheticScore": 1, "HPSv2": 1, "ClassLogProbability": 2}.get(name) or 2 * reward.encoder.scale
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02 * scale)


@pytest.mark.parametrize("name", REWARDS)
def test_as_a_reward_of_the_trainer(make, name):
    reward = make(name)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    weighted = WeightedReward(reward)
    weighted.require_arguments({"caption": ["x"]})
    result = reward_gradient(torch.rand(3, 3, 16, 16), lambda x: x, weighted, PROMPTS, {"caption": ["x"] * 3})
    assert list(result.values) == [name.split()[0]] and (result.gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.rand(3), ValueError, r"images has shape \(3,\); pass"),
        (torch.rand(3, 16, 16), ValueError, r"images has shape \(3, 16, 16\); pass"),
        (torch.rand(3, 4, 16, 16), ValueError, r"images has shape \(3, 4, 16, 16\); pass"),
        (torch.ones(3, 3, 16, 16, dtype=torch.uint8), TypeError, "images has dtype torch.uint8; pass floating"),
        (torch.full((3, 3, 16, 16), torch.nan), ValueError, "images hold NaN; pass"),
        (2 * torch.rand(3, 3, 16, 16) - 1, ValueError, r"images reach from -(1|0\.\d+) to"),
    ],
)
def test_bad_images(make, name, images, error, message):
    with pytest.raises(error, match=f"^{message}.*\\.$"):
        make(name)(images, PROMPTS)


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_bad_prompts(make, name):
    reward, images = make(name), torch.rand(3, 3, 16, 16)
    for prompts, got in [(PROMPTS[:2], "a list of 2"), ("cat", "one string")]:
        with pytest.raises(ValueError, match=f"^prompts is {got} for 3 images; pass .*\\.$"):
            reward(images, prompts)


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_long_prompts_are_cut_with_one_warning(make, name, caplog):
    """16 tokens: start and end of CLIP leave fourteen words of one letter, start of word and end of SigLIP as many letters."""
    reward, images = make(name), torch.rand(2, 3, 16, 16)
    fits = "a" * 13 + "b" if "SigLIP" in name else " ".join("abcdefghijklmn")
    full = reward(images, [fits, fits])
    assert reward(images, [fits[:-1] + "z", fits])[0] != full[0]  # the last token that fits is read
    assert not caplog.records
    for _ in range(2):
        torch.testing.assert_close(reward(images, [fits + " o", fits]), full)
    first = name.split()[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"{first} reads the first 16 tokens of a prompt; longer prompts are cut."
    ]


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "ClassLogProbability"])
def test_features_have_norm_one_and_a_gradient(make, name):
    images = torch.rand(3, 3, 16, 20, requires_grad=True)
    features = make(name).features(images)
    assert features.shape[0] == 3 and features.ndim == 2 and features.requires_grad
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert (features.detach().T.std(1) > 1e-4).any()  # not the same for every image


def clip_outputs(folder, images, texts):
    """Pixels and tokens by transformers' own processors; the outputs of the whole model."""
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(arrays(images), return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    return CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels)


def test_clipscore_is_a_hundred_cosines(models):
    images = eight_bit()
    outputs = clip_outputs(models["clip"], images, PROMPTS)
    cosines = F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
    scores = CLIPScore(models["clip"])(images, PROMPTS)
    torch.testing.assert_close(scores, 100 * cosines)
    assert (scores < 0).any()  # not cut at 0


def test_contrast_is_the_log_odds_of_clips_choice(models):
    images = eight_bit()
    probabilities = clip_outputs(models["clip"], images, ["a sunny day", "rain"]).logits_per_image.softmax(1)
    reward = PromptContrast("a sunny day", "rain", models["clip"])
    torch.testing.assert_close(reward(images, PROMPTS), (probabilities[:, 0] / probabilities[:, 1]).log(), rtol=0, atol=1e-5)


def test_contrast_with_the_images_own_prompts(models):
    images = eight_bit()
    logits = clip_outputs(models["clip"], images, [*PROMPTS, ""]).logits_per_image
    scores = PromptContrast(model=models["clip"])(images, PROMPTS)
    torch.testing.assert_close(scores, logits[:, :3].diagonal() - logits[:, 3], rtol=0, atol=1e-5)


def test_contrast_by_siglip_is_the_difference_of_its_log_odds(models):
    """Each text alone: log p/(1 − p), p a sigmoid with a bias of −10. SigLIP reads texts padded to its length, without a mask."""
    images, folder = eight_bit(), models["siglip"]
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(arrays(images), return_tensors="pt").pixel_values
    ids = T5TokenizerFast.from_pretrained(folder)([*PROMPTS, "noise"], padding="max_length", return_tensors="pt").input_ids
    logits = SiglipModel.from_pretrained(folder).double()(input_ids=ids, pixel_values=pixels.double()).logits_per_image
    assert ids.shape == (4, 16) and (logits < -5).any()  # the bias is there
    p = logits.sigmoid()
    log_odds = (p / (1 - p)).log()
    scores = PromptContrast(negative="noise", model=folder)(images, PROMPTS)
    torch.testing.assert_close(scores.double(), log_odds[:, :3].diagonal() - log_odds[:, 3], rtol=0, atol=1e-4)


def test_two_contrasts_that_swap_their_texts_add_up_to_zero(models):
    images = torch.rand(3, 3, 16, 20)
    there, back = PromptContrast("day", "night", models["siglip"]), PromptContrast("night", "day", models["siglip"])
    torch.testing.assert_close(there(images, PROMPTS), -back(images, PROMPTS))


def test_aesthetic_score_is_its_five_layers_on_the_normed_embedding(models):
    images, layers = eight_bit(), aesthetic_head()
    x = F.normalize(clip_outputs(models["clip"], images, PROMPTS).image_embeds)
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, layers[f"layers.{number}.weight"], layers[f"layers.{number}.bias"])
    torch.testing.assert_close(AestheticScore(models["head"], models["clip"])(images), x[:, 0])


def test_aesthetic_score_keeps_no_text_tower(models):
    reward = AestheticScore(models["head"], models["clip"])
    names = [name for name, _ in reward.named_parameters()]
    assert any("visual_projection" in name for name in names) and not any("text" in name for name in names)


def test_aesthetic_head_from_a_folder_or_file_pickled_or_not(models, tmp_path):
    pickled = models["head"] / "aesthetic-model.pth"
    save_file(aesthetic_head(seed=1), tmp_path / "model.safetensors")
    torch.save(aesthetic_head(), tmp_path / "aesthetic-model.pth")
    images = torch.rand(2, 3, 16, 16)
    from_folder, from_file = (AestheticScore(head, models["clip"])(images) for head in (tmp_path, pickled))
    from_safetensors = AestheticScore(tmp_path / "model.safetensors", models["clip"])(images)
    assert torch.equal(from_folder, from_safetensors) and not torch.equal(from_folder, from_file)


@pytest.mark.parametrize(
    "head, message",
    [
        ({"linear.weight": torch.ones(1, 32)}, "holds linear.weight, …; pass the head's file, with layers.0"),
        (aesthetic_head((16, 8, 6, 5, 4, 1)), "does not map 32 features to one number; pass"),
        (aesthetic_head((32, 8, 6, 5, 4, 2)), "does not map 32 features to one number; pass"),
    ],
)
def test_other_heads_are_refused(models, tmp_path, head, message):
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=rf"head\.pth {message}.*\.$"):
        AestheticScore(tmp_path / "head.pth", models["clip"])


class Payload:
    """What a pickle may hold: this one would run a command."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [{"state_dict": Payload()}, {"weight": 1.0}, [torch.ones(1)], b"no weights at all"])
def test_files_with_more_than_named_tensors_are_refused(tmp_path, capsys, content):
    file = tmp_path / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"weights\.pth holds more than .*; pass the published file\.$"):
        read_weights(file)
    assert "unpickled" not in capsys.readouterr().out


def test_damaged_safetensors_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"is damaged; pass the published file\.$"):
        read_weights(tmp_path / "model.safetensors")


def test_a_folder_without_the_file_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"holds no model.safetensors or aesthetic-model.pth or .*; pass the folder .*\.$"):
        AestheticScore(tmp_path, models["clip"])


def test_the_hub_is_asked_for_one_name_after_the_other(monkeypatch):
    def download(model, name):
        if name != "last.pt":
            raise EntryNotFoundError("404")
        return f"/cache/{model}/{name}"

    monkeypatch.setattr(weights, "hf_hub_download", download)
    assert published_file("some/model", "first.safetensors", "last.pt").as_posix() == "/cache/some/model/last.pt"
    with pytest.raises(EntryNotFoundError):
        published_file("some/model", "first.safetensors", "second.pt")


def test_hpsv2_is_the_cosine_of_its_towers(make, models):
    reward, images = make("HPSv2"), eight_bit()
    standin = tiny_open_clip()
    model = TinyOpenCLIP()
    model.load_state_dict(torch.load(models["hps"] / "HPS_v2.1_compressed.pt")["state_dict"])
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (standin.OPENAI_DATASET_MEAN, standin.OPENAI_DATASET_STD))
    texts = model.encode_text(standin.get_tokenizer("")(PROMPTS))
    torch.testing.assert_close(reward(images, PROMPTS), F.cosine_similarity(model.encode_image((images - mean) / std), texts))


@pytest.mark.parametrize("height, width", [(40, 25), (25, 40), (9, 5), (200, 40), (30, 30)])
def test_hpsv2_sees_the_whole_picture_with_black_around_it(height, width):
    """HPS's evaluation on PIL images: the longer side to the model's size, then black borders; 8-bit rounding as above."""
    size, mean, std = 12, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    picture = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    longer = max(height, width)
    small = (round(width * size / longer), round(height * size / longer))
    resized, framed = Image.fromarray(picture.numpy()).resize(small, Image.Resampling.BICUBIC), Image.new("RGB", (size, size))
    framed.paste(resized, ((size - small[0]) // 2, (size - small[1]) // 2))
    theirs = torch.tensor(list(framed.tobytes())).view(size, size, 3).permute(2, 0, 1) / 255
    ours = hpsv2._with_borders(picture.permute(2, 0, 1)[None] / 255, size, mean, std)[0]
    levels = (ours * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1) - theirs).abs() * 255
    assert levels.max() < 1.25


def test_hpsv2_refuses_other_weights(make, models, tmp_path):
    make("HPSv2")  # puts the stand-in in place
    torch.save({"state_dict": aesthetic_head()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"does not hold the weights of a ViT-H-14; pass HPS_v2\.1_compressed\.pt\.$"):
        HPSv2(tmp_path)


def test_hpsv2_without_open_clip_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        ImportError, match=r'^the package open_clip cannot be imported .* run pip install "diffusers-adjoint\[rewards\]"\.$'
    ):
        HPSv2(models["hps"])


def test_hpsv2_on_open_clip_itself(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 28, "layers": 2, "width": 16, "head_width": 8, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    (tmp_path / "tiny-HPS.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "tiny-HPS")
    model = open_clip.create_model("tiny-HPS").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = HPSv2(tmp_path)

    # Model, tokens and preprocessing by open_clip alone, of pictures that are not square.
    images, prompts = torch.randint(256, (3, 3, 60, 50)).float() / 255, ["A cat, 4k", "the  sea", "word " * 100]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(28, is_train=False, mean=mean, std=std, resize_mode="longest")
    pixels = torch.stack([transform(Image.fromarray(array)) for array in arrays(images)])
    with torch.no_grad():
        image_features, text_features, _ = model(pixels, open_clip.tokenize(prompts))
    # PIL's 8-bit rounding moves these scores by about 0.001, a crop instead of borders by 0.05 and more.
    torch.testing.assert_close(reward(images, prompts), (image_features * text_features).sum(-1), rtol=0, atol=3e-3)
    double = torch.rand(1, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: reward.double()(x, PROMPTS[:1]), double, fast_mode=True)


def test_log_probability_is_that_of_the_classifier(models):
    images, folder = eight_bit(), models["classifier"]
    pixels = ViTImageProcessorPil.from_pretrained(folder)(arrays(images), return_tensors="pt").pixel_values
    log_p = ViTForImageClassification.from_pretrained(folder)(pixels).logits.softmax(1).log()
    for label in ("dog", 2):
        torch.testing.assert_close(ClassLogProbability(folder, label)(images), log_p[:, 2])
    by_column = ClassLogProbability(folder)(images, label=["dog", 1, "cat"])
    torch.testing.assert_close(by_column, log_p[torch.arange(3), torch.tensor([2, 1, 0])])
    assert (by_column < 0).all()


def test_probabilities_of_all_classes_sum_to_one(models):
    images = torch.rand(2, 3, 16, 20)
    total = sum(ClassLogProbability(models["classifier"], label)(images).exp() for label in CLASSES)
    torch.testing.assert_close(total, torch.ones(2))


def test_labels_from_the_dataset_reach_the_classifier(models):
    weighted = WeightedReward(ClassLogProbability(models["classifier"]))
    images, columns = torch.rand(2, 3, 16, 16), {"label": ["cat", "dog"], "caption": ["x", "y"]}
    assert "label" in weighted.require_arguments(columns)
    values = weighted(images, PROMPTS[:2], **columns)["ClassLogProbability"]
    expected = torch.cat(
        [ClassLogProbability(models["classifier"], name)(images)[i : i + 1] for i, name in enumerate(["cat", "dog"])]
    )
    assert torch.equal(values, expected)


def test_the_given_label_goes_before_the_datasets(models):
    reward, images = ClassLogProbability(models["classifier"], "cat"), torch.rand(2, 3, 16, 16)
    assert torch.equal(reward(images, label=["dog", "dog"]), reward(images))


@pytest.mark.parametrize(
    "label, message",
    [
        ("zebra", r"label 'zebra' is none of the model's 4 classes; pass one of 0 \('cat'\), 1 \('crane'\), .*"),
        (4, "label 4 is none of the model's 4 classes; pass"),
        (-1, "label -1 is none of the model's 4 classes; pass"),
        ("crane", r"label 'crane' names the classes \[1, 3\]; pass one of these numbers"),
    ],
)
def test_bad_labels(models, label, message):
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        ClassLogProbability(models["classifier"], label)
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        ClassLogProbability(models["classifier"])(torch.rand(2, 3, 16, 16), label=["cat", label])


@pytest.mark.parametrize(
    "label, message",
    [
        (None, "label is missing; pass"),
        ("cat", "label is one string for 2 images; pass"),
        (["cat"], "label is a list of 1 for 2 images; pass"),
    ],
)
def test_bad_label_columns(models, label, message):
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        ClassLogProbability(models["classifier"])(torch.rand(2, 3, 16, 16), label=label)


@pytest.mark.parametrize("config", [{"problem_type": "multi_label_classification"}, {"id2label": {0: "quality"}}])
def test_models_that_do_not_choose_a_class_are_refused(tmp_path, config):
    folder = tiny_classifier(tmp_path, **config)
    with pytest.raises(ValueError, match=r"does not choose one of several classes; pass a classifier with exclusive classes\.$"):
        ClassLogProbability(folder, 0)
