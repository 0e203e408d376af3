"""A reward as a metric."""

import pytest
import torch

from diffusers_adjoint.metrics import mean_score


def test_mean_and_error_over_prompts_without_a_graph():
    images = torch.rand(4, 5, 3, 6, 6, requires_grad=True)
    seen = []

    def reward(images, prompts):
        value = images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])
        seen.append((prompts, value.requires_grad))
        return value

    prompts = ["a", "bb", "ccc", "dddd"]
    found = mean_score(reward, images, prompts)
    means = images.detach().double().mean((1, 2, 3, 4)) + torch.arange(1.0, 5.0)
    assert found.mean == pytest.approx(means.mean().item(), rel=1e-6)  # float32 sums
    assert found.standard_error == pytest.approx(means.std().item() / 2, rel=1e-5)
    assert seen == [([prompt] * 5, False) for prompt in prompts]


def test_one_prompt_is_spread_over_its_images():
    values = torch.rand(1, 6)
    found = mean_score(lambda images, prompts: images[:, 0, 0, 0], values[..., None, None, None], ["x"])
    assert found.standard_error == pytest.approx(values.double().std().item() / 6**0.5, rel=1e-6)


def test_prompts_must_fit():
    with pytest.raises(ValueError, match="^images are of 2 prompts, but there are 1; pass one prompt for each row.$"):
        mean_score(lambda images, prompts: images, torch.rand(2, 3, 3, 4, 4), ["x"])
