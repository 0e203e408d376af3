"""PickScore and the preprocessing that it shares with other rewards."""

import subprocess
import sys

import pytest
import torch
from tiny_rewards import IMAGE_SIZE, tiny_clip
from torch.autograd import gradcheck
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    EfficientNetImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
    ViltImageProcessorPil,
    ViTImageProcessorPil,
)

from diffusers_adjoint.rewards import PickScore, WeightedReward, differentiable_preprocess, reward_gradient
from diffusers_adjoint.rewards.preprocess import check_images, preprocessing_of
from diffusers_adjoint.rewards.texts import check_prompts

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PROMPTS = ["a cat", "the sea", "a red house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def reward(folder):
    return PickScore(folder, folder)


def eight_bit(*shape):
    return torch.randint(256, shape).float() / 255


def by_pil(images, size):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]
    return processor(arrays, return_tensors="pt").pixel_values


@pytest.mark.parametrize("height, width", [(64, 64), (96, 64), (101, 150), (33, 23), (20, 37), (32, 32)])
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_preprocessing_is_that_of_the_pil_processor(height, width, kind):
    """PIL rounds to 8 bits after the rows and after the columns: half a level each, and a little for its integer weights."""
    images = eight_bit(2, 3, height, width)
    if kind == "edges":  # here bicubic weights overshoot most
        images = F.interpolate((torch.rand(2, 3, 9, 9) > 0.5).float(), (height, width))
    ours = differentiable_preprocess(images, 32, MEAN, STD)
    levels = (ours - by_pil(images, 32)).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert ours.shape == (2, 3, 32, 32) and levels.max() < 1.25


@pytest.mark.parametrize("height, width", [(4, 6), (9, 7), (5, 5)])
def test_gradient_of_the_preprocessing(height, width):
    images = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: differentiable_preprocess(x, 5, MEAN, STD), images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_preprocessing_of_half_precision_rounds_nothing_more(dtype):
    images = torch.rand(1, 3, 20, 24).to(dtype)
    ours = differentiable_preprocess(images, 8, MEAN, STD)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, differentiable_preprocess(images.float(), 8, MEAN, STD))


def square(side):
    return {"height": side, "width": side}


PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size=square(14)),
    "CLIP, wide crop": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 14, "width": 21}),
    "SigLIP": SiglipImageProcessorPil(size=square(14)),
    "ViT, bilinear": ViTImageProcessorPil(size=square(14)),
    "ViT, not square": ViTImageProcessorPil(size={"height": 14, "width": 21}),
    "ViT, not normalised": ViTImageProcessorPil(size=square(14), do_normalize=False),
    "DeiT": DeiTImageProcessorPil(size=square(16), crop_size=square(14)),
    "ConvNeXT, cropped": ConvNextImageProcessorPil(size={"shortest_edge": 14}),
    "ConvNeXT, stretched": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "BLIP": BlipImageProcessorPil(size=square(14)),
    "EfficientNet, plain": EfficientNetImageProcessorPil(size=square(14), include_top=False),
}


@pytest.mark.parametrize("height, width", [(40, 40), (64, 41), (33, 57), (9, 20)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_of_a_saved_processor(name, height, width, tmp_path):
    """Two roundings to 8 bits, as above."""
    host = PROCESSORS[name]
    host.save_pretrained(tmp_path)
    images = eight_bit(2, 3, height, width)
    arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]
    theirs = host(arrays, return_tensors="pt").pixel_values
    ours = preprocessing_of(tmp_path)(images)
    std = torch.tensor(host.image_std if host.do_normalize else [1.0] * 3).view(3, 1, 1)
    assert ours.shape == theirs.shape and ((ours - theirs).abs() * std).max() < 1.25 / 255


@pytest.mark.parametrize(
    "host",
    [
        EfficientNetImageProcessorPil(size=square(14), include_top=False, rescale_offset=True),
        EfficientNetImageProcessorPil(size=square(14), include_top=True),  # divides by the deviation twice
        ViltImageProcessorPil(size={"shortest_edge": 64}),  # pads
        LlavaImageProcessorPil(
            size={"shortest_edge": 14}, crop_size=square(14), do_pad=True
        ),  # differs from CLIP's off the square
        CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size=square(14), do_rescale=False),
        CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size=square(14), resample=0),  # nearest pixel
        CLIPImageProcessorPil(size={"shortest_edge": 14}, do_center_crop=False),  # any width
        CLIPImageProcessorPil(size={"longest_edge": 14}, do_center_crop=False),
        ViTImageProcessorPil(size=square(14), do_resize=False),
    ],
)
def test_processors_that_do_more_are_refused(host, tmp_path):
    host.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{type(host).__name__} does more than resize, crop and normalise; pass .*\\.$"):
        preprocessing_of(tmp_path)


def test_scores_are_the_models_own_logits(reward, folder):
    """At the model's size and in 8 bits the PIL processor changes nothing, so that transformers gives the very number."""
    images = eight_bit(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    arrays = [(255 * image).byte().permute(1, 2, 0).numpy() for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(arrays, return_tensors="pt").pixel_values
    logits = model(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), pixel_values=pixels).logits_per_image
    scores = reward(images=images, prompts=PROMPTS)
    assert scores.shape == (3,) and scores.std() > 0.01
    torch.testing.assert_close(scores, logits.diagonal())


def test_gradient_of_the_score(reward):
    images = torch.rand(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: reward.double()(x, PROMPTS[:1]), images)


def test_a_score_does_not_depend_on_its_batch(reward):
    images = torch.rand(3, 3, 16, 20)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone)


def test_half_precision_images(reward):
    images = torch.rand(3, 3, 16, 16).bfloat16().requires_grad_()
    scores = reward(images, PROMPTS)
    assert torch.equal(scores, reward(images.detach().float(), PROMPTS))
    scores.sum().backward()
    assert images.grad.dtype == torch.bfloat16 and images.grad.abs().sum() > 0


def test_half_precision_model_keeps_the_scale_and_the_cosine_in_float32(reward):
    images = torch.rand(3, 3, 16, 16)
    exact, rounded = reward(images, PROMPTS), reward.bfloat16()(images, PROMPTS)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02 * reward.encoder.scale)


def test_as_a_reward_of_the_trainer(reward):
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training
    weighted = WeightedReward(reward)
    weighted.require_arguments({"caption": ["x"]})
    result = reward_gradient(torch.rand(3, 3, 16, 16), lambda x: x, weighted, PROMPTS, {"caption": ["x"] * 3})
    assert list(result.values) == ["PickScore"] and (result.gradient.flatten(1).norm(dim=1) > 0).all()


def test_long_prompts_are_cut_with_one_warning(reward, caplog):
    """16 tokens: start, fourteen words of one letter, end."""
    images = torch.rand(2, 3, 16, 16)
    fits, long = " ".join("abcdefghijklmn"), " ".join("abcdefghijklmnop")
    full = reward(images, [fits, fits])
    assert reward(images, [fits.removesuffix(" n"), fits])[0] != full[0]  # the last word that fits is read
    assert not caplog.records
    for _ in range(2):
        torch.testing.assert_close(reward(images, [long, fits]), full)
    assert [record.getMessage() for record in caplog.records] == [
        "PickScore reads the first 16 tokens of a prompt; longer prompts are cut."
    ]


@pytest.mark.parametrize(
    "images, prompts, error, message",
    [
        (torch.rand(3, 16, 16), PROMPTS, ValueError, r"images has shape \(3, 16, 16\); pass"),
        (torch.rand(3, 4, 16, 16), PROMPTS, ValueError, r"images has shape \(3, 4, 16, 16\); pass"),
        (torch.rand(1, 3, 2, 16, 16), PROMPTS[:1], ValueError, r"images has shape \(1, 3, 2, 16, 16\); pass"),
        (torch.rand(0, 3, 16, 16), [], ValueError, r"images has shape \(0, 3, 16, 16\); pass a non-empty batch"),
        (torch.ones(3, 3, 16, 16, dtype=torch.uint8), PROMPTS, TypeError, "images has dtype torch.uint8; pass floating"),
        (torch.full((3, 3, 16, 16), torch.nan), PROMPTS, ValueError, "images hold NaN; pass"),
        (
            2 * torch.rand(3, 3, 16, 16) - 1,
            PROMPTS,
            ValueError,
            r"images reach from -(1|0\.\d+) to (1|0\.\d+); pass .* in \[0, 1\]",
        ),
        (torch.rand(3, 3, 16, 16), PROMPTS[:2], ValueError, "prompts is a list of 2 for 3 images; pass"),
        (torch.rand(3, 3, 16, 16), "cat", ValueError, "prompts is one string for 3 images; pass"),
    ],
)
def test_bad_input(reward, images, prompts, error, message):
    with pytest.raises(error, match=f"^{message}.*\\.$"):
        reward(images, prompts)


@pytest.mark.slow
def test_needs_neither_torchvision_nor_open_clip(folder):
    code = f"""
import sys
sys.modules.update(torchvision=None, open_clip=None)  # importing either is now an ImportError
import torch
from diffusers_adjoint.rewards import PickScore
assert PickScore({str(folder)!r}, {str(folder)!r})(torch.rand(1, 3, 16, 16), ["a cat"]).shape == (1,)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_local_model_brings_its_own_processor(reward, folder):
    images = torch.rand(3, 3, 16, 20)
    assert torch.equal(PickScore(folder)(images, PROMPTS), reward(images, PROMPTS))


def test_a_processor_that_is_saved_whole_is_found(reward, folder, tmp_path):
    """transformers' `CLIPProcessor` writes processor_config.json alone."""
    reward.encoder.model.save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    images = torch.rand(3, 3, 16, 20)
    assert torch.equal(PickScore(tmp_path)(images, PROMPTS), reward(images, PROMPTS))


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        ([torch.rand(3, 4, 4)], PROMPTS, "images is a list; pass a tensor of shape"),
        (None, PROMPTS, "images is a NoneType; pass a tensor of shape"),
        (None, ["of one image"], "images is a NoneType; pass a tensor of shape"),
        (torch.rand(3, 3, 16, 16), [1, 2, 3], r"prompts is \[1, 2, 3\]; pass a list of strings"),
        (torch.rand(3, 3, 16, 16), None, "prompts is None; pass a list of strings"),
    ],
)
def test_what_is_no_tensor_and_no_text(reward, images, prompts, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        reward(images, prompts)
    with pytest.raises(TypeError, match=f"^{message}"):
        check_images(images)
        check_prompts(prompts, images)


def test_a_video_is_told_of_per_frame(reward):
    with pytest.raises(ValueError, match="or wrap the reward in per_frame for videos.$"):
        reward(torch.rand(3, 2, 3, 16, 16), PROMPTS)


def test_a_prompt_of_several_images_is_encoded_once(reward):
    read = []
    reward.encoder.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    images, prompts = torch.rand(5, 3, 16, 16), ["a cat", "the sea", "a cat", "a cat", "the sea"]
    scores = reward(images, prompts)
    assert read == [2]
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scores, alone)
