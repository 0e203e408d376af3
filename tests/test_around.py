"""Functions around rewards: against the plain expressions, and as the trainer uses them."""

import math

import pytest
import torch
from tiny_rewards import Unreached, brightness
from torch import nn
from torch.autograd import gradcheck

from diffusers_adjoint.rewards import WeightedReward, reward_gradient
from diffusers_adjoint.rewards.around import clamped, gradient_clipped, normalised, per_frame, smoothed, weighted_sum

PROMPTS = ["a cat", "the sea", "a red house"]


def energy(images, prompts):
    return images.square().flatten(1).sum(1)


def target(images, prompts, target):
    return -(images.mean((1, 2, 3)) - images.new_tensor(target)).square()


class Linear(nn.Module):
    """A reward with weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images, prompts):
        return self.dropout(images.mean((2, 3)) @ self.weight)


WRAPPERS = {
    "weighted_sum": lambda reward: weighted_sum([reward, brightness], [2.0, 1.0]),
    "normalised": lambda reward: normalised(reward, 0.2, 3.0),
    "clamped": lambda reward: clamped(reward, -100.0, 100.0),
    "smoothed": lambda reward: smoothed(reward, num_copies=3),
    "gradient_clipped": lambda reward: gradient_clipped(reward, 1e-3),
}
around_any = pytest.mark.parametrize("around", WRAPPERS.values(), ids=WRAPPERS)


def gradient_of(reward, images, prompts=PROMPTS, **columns):
    x = images.detach().requires_grad_()
    return torch.autograd.grad(reward(x, prompts, **columns).sum(), x)[0]


# ------------------------------------------------------------------------------------------------------------------------ algebra


def test_weighted_sum():
    images = torch.rand(3, 3, 4, 5)
    reward = weighted_sum([brightness, energy], [2.0, -0.5])
    torch.testing.assert_close(reward(images, PROMPTS), 2 * images.mean((1, 2, 3)) - 0.5 * (images**2).sum((1, 2, 3)))
    torch.testing.assert_close(gradient_of(reward, images), torch.full_like(images, 2 / 60) - images)


def test_weight_of_zero_leaves_out_nan():
    reward = weighted_sum([brightness, lambda images, prompts: brightness(images, prompts) * torch.nan], [1.0, 0.0])
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(reward(images, PROMPTS[:2]), images.mean((1, 2, 3)))


def test_normalised():
    images = torch.rand(3, 3, 4, 5)
    torch.testing.assert_close(normalised(energy, 20.0, 4.0)(images, PROMPTS), ((images**2).sum((1, 2, 3)) - 20) / 4)
    torch.testing.assert_close(gradient_of(normalised(energy, 20.0, 4.0), images), images / 2)


@pytest.mark.parametrize("low, high", [(0.3, 0.6), (None, 0.6), (0.3, None)])
def test_clamped(low, high):
    """Images of one value each: below, between and above the bounds."""
    images = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    values = [max(v, low or 0) if high is None else min(max(v, low or 0), high) for v in (0.1, 0.5, 0.9)]
    torch.testing.assert_close(clamped(brightness, low, high)(images, PROMPTS), torch.tensor(values))
    inside = torch.tensor([low is None, True, high is None]).view(3, 1, 1, 1)
    torch.testing.assert_close(gradient_of(clamped(brightness, low, high), images), inside / 48 * torch.ones_like(images))


@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - {"gradient_clipped"}))
def test_gradient(name):
    """Away from the edges of [0, 1], where copies are clipped; a gradient that is clipped is the derivative of nothing."""
    images = 0.3 + 0.4 * torch.rand(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    reward = WRAPPERS[name](lambda images, prompts: (images**3).sum((1, 2, 3)))
    assert gradcheck(lambda x: reward(x, PROMPTS[:2]), images)


# ------------------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    "length, num_frames, chosen",
    [(9, 4, [0, 3, 5, 8]), (9, 3, [0, 4, 8]), (5, 2, [0, 4]), (5, 1, [2]), (1, 4, [0]), (3, 4, [0, 1, 2]), (4, 4, [0, 1, 2, 3])],
)
def test_frames_of_a_video(length, num_frames, chosen):
    videos = torch.rand(3, length, 3, 4, 5)
    reward = per_frame(energy, num_frames)
    expected = torch.stack([(videos[:, i] ** 2).sum((1, 2, 3)) for i in chosen]).mean(0)
    torch.testing.assert_close(reward(videos, PROMPTS), expected)
    scored = gradient_of(reward, videos).flatten(2).norm(dim=2) > 0
    assert [row.nonzero().flatten().tolist() for row in scored] == [chosen] * 3


def test_gradient_of_frames():
    videos = torch.rand(2, 5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: per_frame(energy, 3)(x, PROMPTS[:2]), videos)


def test_frames_keep_the_prompt_and_columns_of_their_video():
    def reward(images, prompts, names):
        assert prompts == names
        return brightness(images, prompts) + 10.0 * images.new_tensor([PROMPTS.index(prompt) for prompt in prompts])

    videos = torch.rand(3, 4, 3, 4, 5)
    values = per_frame(reward, 4)(videos, PROMPTS, names=PROMPTS, others=[1, 2, 3])
    torch.testing.assert_close(values, videos.flatten(1).mean(1) + torch.tensor([0.0, 10.0, 20.0]))


def test_images_are_no_videos():
    with pytest.raises(ValueError, match=r"^images has shape \(3, 3, 4, 4\); pass videos \(B, F, 3, H, W\), .*\.$"):
        per_frame(brightness)(torch.rand(3, 3, 4, 4), PROMPTS)


# ---------------------------------------------------------------------------------------------------------------------- smoothing


def test_smoothed_is_the_mean_over_noisy_copies():
    images = torch.rand(3, 3, 4, 5)
    generator = torch.Generator().manual_seed(7)
    copies = [(images + 0.1 * torch.randn(3, 4, 5, generator=generator)).clamp(0, 1) for _ in range(4)]
    reward = smoothed(energy, std=0.1, num_copies=4, seed=7)
    torch.testing.assert_close(reward(images, PROMPTS), torch.stack([energy(copy, PROMPTS) for copy in copies]).mean(0))
    kept = [(copy > 0) & (copy < 1) for copy in copies]
    expected = sum(2 * copy * keep for copy, keep in zip(copies, kept, strict=True)) / 4
    torch.testing.assert_close(gradient_of(reward, images), expected)


def test_smoothed_is_one_function_for_all_calls_and_batches():
    images, reward = torch.rand(3, 3, 8, 8), smoothed(energy, std=0.1)
    values = reward(images, PROMPTS)
    torch.manual_seed(1)
    assert torch.equal(reward(images, PROMPTS), values)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(values, alone)
    assert not torch.allclose(values, smoothed(energy, std=0.1, seed=1)(images, PROMPTS))


def test_smoothing_takes_out_the_detail_that_only_a_reward_sees():
    """r = Σ sin(ωx): the gradient's mean square falls by the closed form e^{−s²} + (1 − e^{−s²})/n, s = ω·std, which for s = 2
    and n = 20 is 1/15. 24 576 pixels estimate it to a few per cent."""
    frequency, std, copies = 100.0, 0.02, 20

    def detail(images, prompts):
        return torch.sin(frequency * images).flatten(1).sum(1)

    images = 0.2 + 0.6 * torch.rand(2, 3, 64, 64)
    plain, smooth = (gradient_of(r, images, PROMPTS[:2]) for r in (detail, smoothed(detail, std, copies).forward))
    ratio = (smooth.square().mean() / plain.square().mean()).item()
    decay = math.exp(-((frequency * std) ** 2))
    assert ratio == pytest.approx(decay + (1 - decay) / copies, rel=0.08)


def test_smoothing_holds_the_graph_of_one_copy():
    """What autograd keeps between forward and backward, in elements: of the reward's own graph next to nothing."""
    kept = []

    def deep(images, prompts):
        x = images
        for _ in range(10):
            x = torch.sin(x)
        return x.flatten(1).sum(1)

    images = torch.rand(2, 3, 8, 8, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        smoothed(deep, num_copies=5)(images, PROMPTS[:2])
    assert sum(kept) < 5 * 3 * images.numel()  # the deep graph alone would be 5 · 10


def test_noise_is_not_rounded_to_the_images_dtype():
    images = torch.full((1, 3, 8, 8), 0.5, dtype=torch.bfloat16)
    reward = smoothed(energy, std=1e-3)  # levels of bfloat16 are 2e-3 to 4e-3 apart here
    torch.testing.assert_close(reward(images, [""]), reward(images.float(), [""]), rtol=0, atol=0)
    assert reward(images, [""]).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------- clipping


def test_clipped_gradients_have_the_norm_and_the_direction():
    """Of Σ ½x² the gradient is 2x·½ = x; images of known norm below, at and above the bound."""
    images = torch.rand(4, 3, 4, 5)
    images = images / images.flatten(1).norm(dim=1).view(4, 1, 1, 1) * torch.tensor([0.1, 0.5, 1.0, 3.0]).view(4, 1, 1, 1)
    reward = gradient_clipped(lambda images, prompts: energy(images, prompts) / 2, 0.75)
    prompts = [""] * 4
    torch.testing.assert_close(reward(images, prompts), images.square().sum((1, 2, 3)) / 2)
    gradient = gradient_of(reward, images, prompts)
    assert torch.equal(gradient[:2], images[:2])
    torch.testing.assert_close(gradient[2:].flatten(1).norm(dim=1), torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(nn.functional.cosine_similarity(gradient.flatten(1), images.flatten(1)), torch.ones(4))


def test_clipping_bounds_one_reward_of_several():
    """Of an image of norm 1 the gradient has norm 2: one clipped to 1 and then weighted by 3, the other whole."""
    images = torch.full((1, 3, 2, 2), 1 / math.sqrt(12))
    reward = WeightedReward([gradient_clipped(energy, 1.0), energy], [3.0, 1.0])
    result = reward_gradient(images, lambda x: x, reward, [""], {})
    assert result.rewards.item() == pytest.approx(4) and result.gradient.norm().item() == pytest.approx(3 * 1 + 2)


def test_clipping_under_a_flat_function_is_flat():
    """Factor 0, norm 0: their quotient would be NaN."""
    images = torch.rand(2, 3, 4, 4)
    assert not gradient_of(clamped(gradient_clipped(energy, 1.0), high=-1.0), images, PROMPTS[:2]).any()


def test_clipping_leaves_nan_gradients_to_be_counted():
    def spoilt(images, prompts):
        scale = images.new_tensor([1.0, 0.0])  # value 0, derivative 0 · ∞
        return (images.mean((1, 2, 3)) * scale).sqrt()

    gradient = gradient_of(gradient_clipped(spoilt, 1e-3), torch.rand(2, 3, 4, 4), PROMPTS[:2])
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().any()


# ---------------------------------------------------------------------------------------------------------------- in the trainer


@around_any
def test_modules_are_frozen_and_moved(around):
    inner = Linear()
    reward = WeightedReward(around(inner))
    assert not inner.weight.requires_grad and not inner.dropout.training
    reward.to(torch.device("meta"))
    assert inner.weight.device.type == "meta"


def test_modules_deep_inside_are_frozen_and_moved():
    inner = Linear()
    reward = WeightedReward([weighted_sum([brightness, normalised(per_frame(smoothed(inner)), 0.0, 2.0)], [1.0, 1.0])])
    assert not inner.weight.requires_grad and not inner.dropout.training
    reward.to(torch.device("meta"))
    assert inner.weight.device.type == "meta"


def test_names_in_the_logs():
    ink = normalised(clamped(smoothed(Linear()), 0.0), 0.0, 1.0)
    rewards = [ink, per_frame(brightness), gradient_clipped(brightness, 1.0), weighted_sum([energy, ink], [1.0, 1.0])]
    assert WeightedReward(rewards).names == ["Linear", "brightness", "brightness_1", "energy_and_Linear"]


@around_any
def test_as_a_reward_of_the_trainer(around):
    reward = WeightedReward(around(Linear()))
    reward.require_arguments({"caption": ["x"]})
    result = reward_gradient(torch.rand(3, 3, 4, 4), lambda x: x, reward, PROMPTS, {"caption": ["x"] * 3})
    assert (result.gradient.flatten(1).norm(dim=1) > 0).all() and result.rewards.shape == (3,)


@around_any
def test_a_score_does_not_depend_on_its_batch(around):
    images, reward = torch.rand(3, 3, 8, 8), around(energy)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone)
    alone = torch.cat([gradient_of(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(gradient_of(reward, images), alone)


@around_any
def test_columns_go_to_the_function_that_asks_for_them(around):
    weighted, columns = WeightedReward(around(target)), {"target": [0.1, 0.2, 0.3], "other": [1, 2, 3]}
    assert "target" in weighted.require_arguments(columns)
    with pytest.raises(ValueError, match="^reward 'target' cannot be called .*missing a required argument: 'target'"):
        weighted.require_arguments({"other": [1, 2, 3]})
    images = torch.rand(3, 3, 4, 4)
    plain = around(lambda images, prompts: target(images, prompts, columns["target"]))
    (value,) = weighted(images, PROMPTS, **columns).values()
    torch.testing.assert_close(value, plain(images, PROMPTS))


@around_any
def test_nan_is_no_reward_for_that_image_alone(around):
    """A NaN value of the function, `None` for an image, and NaN pixels."""
    images = torch.rand(3, 3, 4, 4)
    plain = around(energy)(images, PROMPTS)

    def partial(images, prompts):
        return [None if prompt == "the sea" else value for value, prompt in zip(energy(images, prompts), prompts, strict=True)]

    spoilt = images.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    for values in (around(partial)(images, PROMPTS), around(energy)(spoilt, PROMPTS)):
        torch.testing.assert_close(values[::2], plain[::2])
    assert values[1].isnan()  # of NaN pixels there is no value whatever the rewards
    alone = around(partial)(images, PROMPTS)[1]
    if around is WRAPPERS["weighted_sum"]:  # the other term has a value
        torch.testing.assert_close(alone, images[1].mean())
    else:
        assert alone.isnan()
    result = reward_gradient(spoilt, lambda x: x, WeightedReward(around(partial)), PROMPTS, {})
    assert result.rewards[1].isnan() and result.gradient[::2].isfinite().all()


def test_several_around_each_other():
    """Smoothing a normalised reward is normalising a smoothed one, and a sum of both is twice one."""
    images = torch.rand(3, 3, 4, 4)
    first, second = normalised(smoothed(energy), 1.0, 2.0), smoothed(normalised(energy, 1.0, 2.0))
    total = weighted_sum([first, second], [1.0, 1.0])
    torch.testing.assert_close(total(images, PROMPTS), 2 * first(images, PROMPTS))
    torch.testing.assert_close(gradient_of(total, images), 2 * gradient_of(smoothed(energy), images) / 2)


def test_smoothing_twice_a_clipped_reward():
    """A mean of gradients, each of the bound's length and nearly of one direction: as long as that, up to the noise's angles."""
    nested = smoothed(smoothed(gradient_clipped(energy, 1e-3), num_copies=2), num_copies=3)
    norms = gradient_of(nested, torch.rand(3, 3, 4, 4)).flatten(1).norm(dim=1)
    assert (norms <= 1e-3).all() and (norms > 0.9e-3).all()


def test_a_term_without_gradient_is_found_in_a_sum():
    reward = weighted_sum([brightness, lambda images, prompts: energy(images.detach(), prompts)], [1.0, 1.0])
    with pytest.raises(ValueError, match="^reward '<lambda>' is not differentiable in the images; remove .*\\.$"):
        reward_gradient(torch.rand(1, 3, 4, 4), lambda x: x, WeightedReward(reward), [""], {})
    with torch.no_grad():  # as it is evaluated
        assert reward(torch.rand(1, 3, 4, 4).requires_grad_(), [""]).shape == (1,)


@around_any
def test_a_term_of_something_else_is_found_in_a_sum(around):
    other = torch.ones(1, requires_grad=True)
    reward = around(weighted_sum([brightness, lambda images, prompts: other.expand(len(images))], [1.0, 1.0]))
    with pytest.raises(ValueError, match="^reward '<lambda>' does not depend on the images; compute it from them"):
        reward_gradient(torch.rand(1, 3, 4, 4), lambda x: x, WeightedReward(reward), [""], {})
    with torch.no_grad():  # as it is evaluated
        assert reward(torch.rand(1, 3, 4, 4).requires_grad_(), [""]).shape == (1,)


# ---------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: weighted_sum([brightness], [1.0, 2.0]), "weights has 2 entries for 1 rewards; pass"),
        (lambda: weighted_sum([], []), "rewards is empty; pass"),
        (lambda: weighted_sum([brightness], [math.nan]), r"weights=\[nan\] are not all finite; pass"),
        (lambda: normalised(brightness, 0.0, 0.0), "mean=0.0, std=0.0 cannot normalise a reward; pass"),
        (lambda: normalised(brightness, math.nan, 1.0), "mean=nan, std=1.0 cannot normalise a reward; pass"),
        (lambda: normalised(brightness, 0.0, math.inf), "mean=0.0, std=inf cannot normalise a reward; pass"),
        (lambda: clamped(brightness, 1.0, 0.0), "low=1.0 is not below high=0.0; pass"),
        (lambda: clamped(brightness, 1.0, 1.0), "low=1.0 is not below high=1.0; pass"),
        (lambda: clamped(brightness, math.nan), "low=nan is not below high=None; pass"),
        (lambda: per_frame(brightness, 0), "num_frames=0 leaves no frame to score; pass"),
        (lambda: smoothed(brightness, 0.0), "std=0.0 is not a standard deviation; pass"),
        (lambda: smoothed(brightness, math.nan), "std=nan is not a standard deviation; pass"),
        (lambda: smoothed(brightness, num_copies=0), "num_copies=0 leaves no copy to score; pass"),
        (lambda: gradient_clipped(brightness, 0.0), "max_norm=0.0 is not a norm; pass"),
        (lambda: gradient_clipped(brightness, math.inf), "max_norm=inf is not a norm; pass"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        make()


@pytest.mark.parametrize("around", [*WRAPPERS.values(), per_frame], ids=[*WRAPPERS, "per_frame"])
@pytest.mark.parametrize("reward", [0.5, [brightness]])
def test_not_callable(around, reward):
    with pytest.raises(TypeError, match=r"^reward .* is not callable; pass f\(images=, prompts=, \*\*columns\)\.$"):
        around(reward)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.full((1, 3, 4, 4), 200, dtype=torch.uint8), TypeError, "images has dtype torch.uint8; pass floating"),
        (torch.full((1, 3, 4, 4), -1.0), ValueError, "images reach from -1 to -1; pass"),
        (torch.full((1, 2, 3, 4, 4), 255.0), ValueError, "images reach from 255 to 255; pass"),
        (torch.rand(1, 2, 40), ValueError, r"images has shape \(1, 2, 40\); pass"),
        (torch.rand(1, 4, 8, 8), ValueError, r"images has shape \(1, 4, 8, 8\); pass"),
        (torch.rand(0, 3, 4, 4), ValueError, r"images has shape \(0, 3, 4, 4\); pass"),
    ],
)
def test_smoothing_does_not_hide_bad_images(images, error, message):
    """Its copies are cut to [0, 1]: the reward itself would not notice."""
    with pytest.raises(error, match=f"^{message}"):
        smoothed(lambda images, prompts: images.flatten(1).mean(1), num_copies=2)(images, ["x"])


def test_smoothing_gives_no_reward_to_infinite_pixels():
    """Cut to the range they would be white, or black."""
    images = torch.rand(4, 3, 4, 4)
    images[1, 0, 0, 0], images[2, 0, 0, 0], images[3, 0, 0, 0] = torch.inf, -torch.inf, torch.nan
    values = smoothed(brightness, num_copies=2)(images, ["x"] * 4)
    assert values[0].isfinite() and values[1:].isnan().all()


@around_any
def test_what_is_no_tensor(around):
    with pytest.raises(TypeError, match="^images is a list; pass a tensor of shape"):
        around(brightness)([torch.rand(3, 4, 4)], ["x"])


def test_a_clipped_gradient_may_be_taken_again():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    value = 3.0 * gradient_clipped(lambda images, prompts: 100.0 * images.flatten(1).sum(1), 0.5)(images, ["x"] * 2)
    first, again = (torch.autograd.grad(value.sum(), images, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and first.flatten(1).norm(dim=1) == pytest.approx([1.5, 1.5])
    halved = torch.autograd.grad(0.5 * value.sum(), images)[0]
    torch.testing.assert_close(halved, 0.5 * first)


def test_a_clipped_gradient_has_no_second_derivative():
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    value = gradient_clipped(energy, 0.5)(images, ["x"])
    (gradient,) = torch.autograd.grad(value.sum(), images, create_graph=True)
    assert not gradient.requires_grad


def test_clipping_without_a_gradient_in_the_images():
    """Of an autograd function that gives None the sum's check can speak."""
    reward = gradient_clipped(lambda images, prompts: Unreached.apply(images), 1.0)
    with pytest.raises(ValueError, match="^reward '<lambda>' does not depend on the images; compute it from them"):
        reward_gradient(torch.rand(2, 3, 4, 4), lambda x: x, WeightedReward(reward), [""] * 2, {})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: weighted_sum(brightness, [1.0]), "rewards is a function; pass a list of reward functions"),
        (lambda: weighted_sum([brightness], None), "weights is a NoneType; pass a list of numbers"),
        (lambda: weighted_sum([brightness], ["a"]), r"weights\[0\] is 'a'; pass a number"),
        (lambda: normalised(brightness, 0.0, "a"), "std is 'a'; pass a number"),
        (lambda: clamped(brightness, "a", 1.0), "low is 'a'; pass a number"),
        (lambda: per_frame(brightness, 1.5), "num_frames is 1.5; pass a whole number"),
        (lambda: smoothed(brightness, "a"), "std is 'a'; pass a number"),
        (lambda: smoothed(brightness, num_copies=None), "num_copies is None; pass a whole number"),
        (lambda: gradient_clipped(brightness, None), "max_norm is None; pass a number"),
    ],
)
def test_arguments_of_another_type(make, message):
    with pytest.raises(TypeError, match=f"^{message}\\.$"):
        make()
