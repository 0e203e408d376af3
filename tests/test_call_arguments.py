"""Options, `pipeline_kwargs` and dataset columns become the arguments of a pipeline's call; what does not fit is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_adjoint.replay.arguments import CallArguments


def text_to_image(
    self,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    image: list[Image.Image] | Image.Image | None = None,
    height: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_scale_2: float | None = None,
    sigmas: list[float] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    callback_on_step_end: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
    latents: torch.Tensor | None = None,
    prompt_embeds: torch.Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
): ...


def true_cfg(
    self,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    true_cfg_scale: float = 4.0,
    guidance_scale: float | None = None,
    output_type: str = "pil",
): ...


def perturbed(self, prompt: str | list[str] | None = None, guidance_scale: float = 5.0, pag_scale: float = 3.0): ...


def class_conditional(self, class_labels: list[int], guidance_scale: float = 4.0): ...


def guided_by_frame(self, image: Image.Image, min_guidance_scale: float = 1.0, max_guidance_scale: float = 3.0): ...


def unconditional(self, batch_size: int = 1): ...


def make(call=text_to_image, guidance_scale=1.0, kwargs=None, *, embedded=False, no_guidance=1.0):
    return CallArguments("Pipe", call, 4, guidance_scale, kwargs or {}, guidance_embedded=embedded, no_guidance=no_guidance)


TWO = {"prompt": ["a", "b"]}


def test_columns_named_like_arguments_are_passed_and_others_are_not():
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]
    arguments = make()({**TWO, "image": images, "label": [1, 2]}, 2)
    assert arguments["prompt"] == ["a", "b"]
    assert arguments["image"] == images
    assert "label" not in arguments


def test_tensors_are_stacked():
    embeds = [torch.zeros(3, 4), torch.ones(3, 4)]
    arguments = make()({"prompt_embeds": embeds}, 2)
    assert torch.equal(arguments["prompt_embeds"], torch.stack(embeds))


def test_what_a_single_sample_has_is_passed_as_it_is():
    """Some pipelines take one image or text and no list of one; others understand a list as several references."""
    image, embeds = Image.new("RGB", (4, 4)), torch.zeros(3, 4)
    arguments = make()({"prompt": ["a"], "image": [image]}, 1)
    assert arguments["image"] is image
    assert arguments["prompt"] == "a"
    assert make()({"prompt_embeds": [embeds]}, 1)["prompt_embeds"].shape == (1, 3, 4)
    assert make()({"prompt": ["a"], "image": [[image, image]]}, 1)["image"] == [image, image]
    assert make(class_conditional)({"class_labels": [3]}, 1)["class_labels"] == [3]


def test_a_text_beside_its_embeddings_is_for_the_rewards_alone():
    arguments = make()({**TWO, "prompt_embeds": [torch.zeros(3, 4), torch.ones(3, 4)]}, 2)
    assert "prompt" not in arguments
    assert arguments["prompt_embeds"].shape == (2, 3, 4)


def test_a_text_for_all_samples_goes_with_a_list_of_prompts():
    arguments = make(kwargs={"negative_prompt": "blurry", "height": 32})(TWO, 2)
    assert arguments["negative_prompt"] == ["blurry", "blurry"]
    assert arguments["height"] == 32
    assert arguments["output_type"] == "pt"
    assert make(kwargs={"negative_prompt": "blurry"})({"prompt": ["a"]}, 1)["negative_prompt"] == "blurry"


def test_a_column_replaces_what_all_samples_share():
    arguments = make(kwargs={"negative_prompt": "blurry"})({**TWO, "negative_prompt": ["x", "y"]}, 2)
    assert arguments["negative_prompt"] == ["x", "y"]


def test_the_batch_is_told_to_pipelines_that_have_nothing_to_count():
    assert make(unconditional)({"prompt": ["", "", ""]}, 3)["batch_size"] == 3


@pytest.mark.parametrize(
    ("settings", "guided", "unguided"),
    [
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_scale_2": None}, {"guidance_scale": 1.0}),
        ({"guidance_scale": 3.0, "kwargs": {"guidance_scale_2": 2.0}}, {"guidance_scale_2": 2.0}, {"guidance_scale_2": 1.0}),
        ({"guidance_scale": 3.0, "embedded": True}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"guidance_scale": 3.0, "no_guidance": 0.0}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}),
        ({"guidance_scale": 1.0, "no_guidance": 0.0}, {"guidance_scale": 0.0}, {"guidance_scale": 0.0}),
        ({"call": perturbed, "guidance_scale": 3.0}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0, "pag_scale": 0.0}),
        ({"call": perturbed, "guidance_scale": 1.0, "kwargs": {"pag_scale": 2.0}}, {"pag_scale": 2.0}, {"pag_scale": 0.0}),
        (
            {"call": true_cfg, "guidance_scale": 3.0, "kwargs": {"negative_prompt": " "}},
            {"true_cfg_scale": 3.0, "guidance_scale": None},
            {"true_cfg_scale": 1.0, "guidance_scale": None},
        ),
        (
            {
                "call": true_cfg,
                "guidance_scale": 3.0,
                "embedded": True,
                "kwargs": {"true_cfg_scale": 2.0, "negative_prompt": " "},
            },
            {"guidance_scale": 3.0, "true_cfg_scale": 2.0},
            {"guidance_scale": 3.0, "true_cfg_scale": 1.0},
        ),
        ({"call": class_conditional, "guidance_scale": 3.0}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}),
        ({"call": guided_by_frame, "guidance_scale": 2.0}, {"max_guidance_scale": 2.0}, {"max_guidance_scale": 1.0}),
        ({"call": guided_by_frame}, {"max_guidance_scale": 1.0}, {"max_guidance_scale": 1.0}),
    ],
)
def test_guidance_on_and_off(settings, guided, unguided):
    arguments = make(**settings)
    columns = {class_conditional: {"class_labels": [1, 2]}, guided_by_frame: {"image": [1, 2]}}.get(settings.get("call"), TWO)
    on, off = arguments(columns, 2), arguments(columns, 2, guided=False)
    assert {name: on.get(name) for name in guided} == guided
    assert {name: off.get(name) for name in unguided} == unguided
    assert arguments.guides == (on != off)


def test_a_scale_that_is_none_by_default_does_not_guide():
    """FLUX.1-dev: guidance_scale is an input of the network, true_cfg_scale is 1 unless set."""

    def flux(self, prompt, true_cfg_scale: float = 1.0, guidance_scale: float = 3.5): ...

    assert not make(flux, 3.5, embedded=True).guides
    assert make(flux, 3.5, {"true_cfg_scale": 2.0}, embedded=True).guides


@pytest.mark.parametrize(
    ("settings", "columns", "message"),
    [
        ({}, {"text": ["a", "b"]}, r"Pipe needs prompts, but the columns are \['text'\]; add a 'prompt' column"),
        ({}, {**TWO, "image": [1]}, "column 'image' has 1 values for 2 generators"),
        ({}, {**TWO, "latents": [1, 2]}, "column 'latents' would set an argument that the replay sets itself"),
        ({}, {**TWO, "height": [16, 32]}, "column 'height' would set an argument that Pipe takes once for all samples"),
        ({}, {**TWO, "sigmas": [1.0, 0.5]}, "column 'sigmas' would set an argument that Pipe takes once for all samples"),
        ({}, {**TWO, "attention_kwargs": [{}, {}]}, "column 'attention_kwargs' would set an argument that Pipe takes once"),
        ({"call": class_conditional}, {"label": [1, 2]}, r"Pipe needs 'class_labels', but the columns are \['label'\]"),
        ({"call": true_cfg, "guidance_scale": 3.0}, TWO, "Pipe guides only against a negative prompt, and there is none"),
    ],
)
def test_columns_that_do_not_fit_are_refused(settings, columns, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)(columns, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kwargs": {"hight": 32}}, "'hight', which Pipe does not take; take 'height' if that is meant"),
        ({"kwargs": {"colour": 32}}, "'colour', which Pipe does not take; remove it"),
        ({"kwargs": {"callback_on_step_end": print}}, "'callback_on_step_end', which is not set there; remove it, no callback"),
        ({"kwargs": {"generator": 1}}, "'generator', which is not set there; use the option seed"),
        ({"call": true_cfg, "kwargs": {"true_cfg_scale": 2.0}}, "'true_cfg_scale', which is not set there; use the option guid"),
        ({"kwargs": {"prompt": "a"}}, "pass prompts as the dataset's 'prompt' column"),
        ({"call": unconditional, "guidance_scale": 2.0}, "Pipe takes no guidance_scale, but 2.0 was asked for"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_misspelt_column_is_told_from_one_for_the_reward():
    arguments = make()
    arguments.require_known({**TWO, "negative_prompt": 0, "label": 0, "quality": 0}, set())
    arguments.require_known({**TWO, "negativ_prompt": 0}, {"negativ_prompt"})
    with pytest.raises(ValueError, match="column 'negativ_prompt' .* rename it to 'negative_prompt'"):
        arguments.require_known({**TWO, "negativ_prompt": 0}, set())
