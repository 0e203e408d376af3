"""Rewards as the trainer calls them: what they never see, what they get, and what they may return."""

import math

import pytest
import torch
from tiny_rewards import Unreached, brightness
from torch import nn

from diffusers_adjoint.rewards import WeightedReward, reward_gradient

PROMPTS = ["a cat", "the sea", "a red house"]


class Module(nn.Module):
    """A module whose `forward` takes no columns, or one by name."""

    def __init__(self, wants_target=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.forward = self.with_target if wants_target else self.plain

    def plain(self, images, prompts):
        return images.mean((2, 3)) @ self.weight

    def with_target(self, images, prompts, target):
        return self.plain(images, prompts) - images.new_tensor(target)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 2, 3, 4, 4)])
def test_nonfinite_pixels_never_reach_a_reward(bad, shape):
    """One bad value spoils its own image only: value NaN, gradient 0 and not NaN, which is counted and left out."""
    seen = []

    def reward(images, prompts):
        seen.append(images)
        return images.flatten(1).mean(1)

    images = torch.rand(shape)
    images[1].view(-1)[5] = bad
    result = reward_gradient(images, lambda x: x, WeightedReward([reward, reward], [1.0, 2.0]), PROMPTS, {})
    assert len(seen) == 2 and all(shown.isfinite().all() for shown in seen)
    assert result.rewards[1].isnan() and all(values[1].isnan() for values in result.values.values())
    torch.testing.assert_close(result.rewards[::2], 3 * images[::2].flatten(1).mean(1))
    expected = torch.full_like(images, 3 / images[0].numel())
    expected[1] = 0
    torch.testing.assert_close(result.gradient, expected)


def test_no_image_is_finite():
    reward = WeightedReward(brightness)
    result = reward_gradient(torch.full((2, 3, 4, 4), torch.nan), lambda x: x, reward, PROMPTS[:2], {})
    assert result.rewards.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_images_are_seen_as_they_are(dtype):
    seen, images = [], torch.rand(2, 3, 4, 4, dtype=dtype)

    def reward(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    WeightedReward(reward)(images, PROMPTS[:2])
    assert seen[0].dtype == dtype and torch.equal(seen[0], images)


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (
            lambda images, prompts: torch.empty(3, device="meta"),
            ValueError,
            "returned a tensor on meta for images on cpu; return",
        ),
        (lambda images, prompts: images.mean((2, 3)), ValueError, r"returned shape \(3, 3\); return .* shape \(3,\)"),
        (lambda images, prompts: images.mean((1, 2, 3))[:, None], ValueError, r"returned shape \(3, 1\); return"),
        (lambda images, prompts: images.mean((1, 2, 3))[:2], ValueError, r"returned shape \(2,\); return"),
        (lambda images, prompts: [images.mean(), images.mean()], ValueError, r"returned shape \(2,\); return"),
        (lambda images, prompts: [images.mean((1, 2))] * 3, TypeError, "returned a list; return"),
        (lambda images, prompts: [0.5, float("nan"), None], TypeError, "returned a list; return"),
        (lambda images, prompts: 0.5, TypeError, "returned a float; return"),
        (lambda images, prompts: images.mean((1, 2, 3)).detach(), ValueError, "is not differentiable in the images; remove"),
        (
            lambda images, prompts: (images > 0.5).float().mean((1, 2, 3)),
            ValueError,
            "is not differentiable in the images; remove",
        ),
    ],
)
def test_what_a_reward_must_not_return(reward, error, message):
    reward.__name__ = "mine"
    with pytest.raises(error, match=f"^reward 'mine' {message}.*\\.$"):
        reward_gradient(torch.rand(3, 3, 4, 4), lambda x: x, WeightedReward(reward), PROMPTS, {})


PARAMETER = torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize(
    "reward",
    [
        lambda images, prompts: PARAMETER * 2,
        lambda images, prompts: brightness(images.detach(), prompts) * PARAMETER,
        lambda images, prompts: [PARAMETER[0], None, math.nan],
        lambda images, prompts: Unreached.apply(images),
        lambda images, prompts: Unreached.apply(images) * torch.tensor([1.0, math.nan, 1.0]),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_reward_of_something_else_is_named_beside_another(reward, order):
    """Its weights give it a graph, and the other function the sum a gradient."""
    reward.__name__ = "mine"
    functions = WeightedReward([brightness, reward][::order])
    message = r"^reward 'mine' does not depend on the images; compute it from them, or return None for images it is not for\.$"
    with pytest.raises(ValueError, match=message):
        reward_gradient(torch.rand(3, 3, 4, 4), lambda x: x, functions, PROMPTS, {})
    with torch.no_grad():  # as it is evaluated
        assert set(functions(torch.rand(3, 3, 4, 4), PROMPTS)) == {"brightness", "mine"}
    looked_at = WeightedReward([brightness, reward], [1.0, 0.0])
    result = reward_gradient(torch.rand(3, 3, 4, 4), lambda x: x, looked_at, PROMPTS, {})
    torch.testing.assert_close(result.gradient, torch.full((3, 3, 4, 4), 1 / 48))


@pytest.mark.parametrize(
    "reward",
    [
        lambda images, prompts: None,
        lambda images, prompts: [math.nan] * 3,
        lambda images, prompts: PARAMETER * math.nan,
        lambda images, prompts: Unreached.apply(images) * math.nan,
    ],
)
def test_a_reward_that_has_no_value_for_the_batch_need_not_depend_on_it(reward):
    result = reward_gradient(torch.rand(3, 3, 4, 4), lambda x: x, WeightedReward([reward, brightness]), PROMPTS, {})
    torch.testing.assert_close(result.gradient, torch.full((3, 3, 4, 4), 1 / 48))


@pytest.mark.parametrize(
    "decode",
    [
        lambda x: x.detach(),
        torch.no_grad()(lambda x: 2 * x),
        torch.inference_mode()(lambda x: 2 * x),
        lambda x: x.detach() + PARAMETER.view(3, 1, 1, 1),  # a graph, but of its own weights
    ],
)
def test_a_decoder_without_gradient_is_not_taken_for_a_reward(decode):
    message = r"^the decoded images have no gradient in the end points; remove torch\.no_grad\(\).* from the decoder\.$"
    with pytest.raises(ValueError, match=message):
        reward_gradient(torch.rand(3, 3, 4, 4), decode, WeightedReward(brightness), PROMPTS, {})


@pytest.mark.parametrize("wants_target, expected", [(False, 1.5), (True, 1.0)])
def test_a_modules_forward_gets_the_columns_that_it_names(wants_target, expected):
    reward, columns = WeightedReward(Module(wants_target)), {"target": [0.5, 0.5], "caption": ["x", "y"]}
    asked = reward.require_arguments(columns)
    assert ("target" in asked) == wants_target and "caption" not in asked
    result = reward_gradient(torch.full((2, 3, 4, 4), 0.5), lambda x: x, reward, PROMPTS[:2], columns)
    assert result.rewards.tolist() == [expected] * 2
    assert (result.gradient == 1 / 16).all()


def test_a_missing_column_is_told_before_training():
    told = "^reward 'Module' cannot be called .*'caption'.* 'target'.*; give the function these arguments, .*\\.$"
    with pytest.raises(ValueError, match=told):
        WeightedReward(Module(wants_target=True)).require_arguments({"caption": ["x"]})


def test_a_function_with_columns_gets_all():
    seen = []

    def greedy(images, prompts, **columns):
        seen.append(columns)
        return images.mean((1, 2, 3))

    columns = {"target": [1, 2], "caption": ["x", "y"]}
    WeightedReward(greedy)(torch.rand(2, 3, 4, 4), PROMPTS[:2], **columns)
    assert seen == [columns]


def test_modules_are_frozen_and_moved():
    module = Module().train()
    reward = WeightedReward([module, brightness])
    assert not module.weight.requires_grad and not module.training
    assert reward.to(torch.device("meta")) is reward and module.weight.device.type == "meta"


@pytest.mark.parametrize(
    "dtype, expected", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_values_are_float32_or_better(dtype, expected):
    values = WeightedReward(lambda images, prompts: images.mean((1, 2, 3)).to(dtype))(torch.rand(2, 3, 4, 4), PROMPTS[:2])
    assert [value.dtype for value in values.values()] == [expected]


def test_gradients_in_the_pixels_are_not_rounded_to_the_decoders_16_bits():
    """1e-9 is below what float16 can hold: the pixels' gradient is kept in float32 and brought through by powers of two."""
    state = torch.rand(2, 3, 4, 4)
    tiny = WeightedReward(lambda images, prompts: 1e-9 * images.flatten(1).sum(1))
    result = reward_gradient(state, lambda x: x.half(), tiny, PROMPTS[:2], {})
    torch.testing.assert_close(result.gradient, torch.full_like(state, 1e-9), rtol=1e-3, atol=0)  # of float16


def test_gradient_of_a_sum_through_the_decoder():
    """r = 2·mean(d) − 3·mean(d²) of d = 0.5 x + 0.25: ∇ = (1 − 3d)/N."""
    state = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    reward = WeightedReward([brightness, lambda images, prompts: images.square().mean((1, 2, 3))], [2.0, -3.0])
    result = reward_gradient(state, lambda x: 0.5 * x + 0.25, reward, PROMPTS[:2], {})
    decoded = 0.5 * state + 0.25
    torch.testing.assert_close(result.images, decoded)
    torch.testing.assert_close(result.gradient, (1 - 3 * decoded) / 48)
    torch.testing.assert_close(result.rewards, 2 * decoded.mean((1, 2, 3)) - 3 * (decoded**2).mean((1, 2, 3)))
    assert not any(t.requires_grad for t in (result.rewards, result.images, *result.values.values()))


def test_a_reward_of_weight_zero_is_only_looked_at():
    """It needs no gradient; if all weights are 0 there is nothing to aim at, and all must have one."""

    def looked_at(images, prompts):
        return images.detach().mean((1, 2, 3))

    def aimed_at(images, prompts):
        return images.square().mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4)
    result = reward_gradient(images, lambda x: x, WeightedReward([aimed_at, looked_at], [1.0, 0.0]), [""] * 2, {})
    torch.testing.assert_close(result.gradient, images / 24)  # 2x/48
    torch.testing.assert_close(result.values["looked_at"], images.mean((1, 2, 3)))
    for weights in ([0.0, 0.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="^reward 'looked_at' is not differentiable in the images"):
            reward_gradient(images, lambda x: x, WeightedReward([aimed_at, looked_at], weights), [""] * 2, {})
