"""Rewards without a gradient: what they may return, PIL images, threads, and where these are refused."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_trainer import PROMPTS, config, logged, make_trainer

from diffusers_adjoint.evaluate import EvaluationArguments
from diffusers_adjoint.rewards import WeightedReward, weighted_sum
from diffusers_adjoint.rewards.black_box import as_pil

RAM = {"loss_type": "ram", "num_generations": 2, "max_steps": 1}


def pictures(count=5):
    return torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def bright(images):
    return (images.mean((1, 2, 3)) * 100).round()


ANSWERS = {
    "tensor": lambda images, prompts: bright(images),
    "whole numbers": lambda images, prompts: bright(images).long(),
    "numbers": lambda images, prompts: bright(images).tolist(),
    "whole numbers of Python": lambda images, prompts: tuple(int(value) for value in bright(images)),
    "array": lambda images, prompts: bright(images).double().numpy(),
    "NumPy's numbers": lambda images, prompts: list(bright(images).numpy()),
    "scalar tensors": lambda images, prompts: list(bright(images)),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_any_number_will_do_where_nothing_is_differentiated(answer):
    images = pictures()
    values = WeightedReward(ANSWERS[answer])(images, PROMPTS[:1] * 5)
    (found,) = values.values()
    assert found.dtype in (torch.float32, torch.float64) and torch.equal(found.float(), bright(images))


def test_whether_and_none_are_numbers_too():
    def says(images, prompts):
        return [True, None, np.bool_(False), 2, torch.tensor(3.0)]

    found = WeightedReward(says)(pictures(), PROMPTS[:1] * 5)["says"]
    assert found.isnan().tolist() == [False, True, False, False, False] and found.nansum() == 6


@pytest.mark.parametrize("answer", ["good", ["good"] * 5, {"score": 1}, np.array(["good"] * 5)])
def test_what_is_no_number_is_named(answer):
    with pytest.raises(TypeError, match="reward 'says' returned a .*; return a tensor of shape"):
        WeightedReward(_named(lambda images, prompts: answer))(pictures(), PROMPTS[:1] * 5)


def _named(function):
    function.__name__ = "says"
    return function


def test_too_few_numbers_are_named():
    with pytest.raises(ValueError, match=r"reward 'says' returned shape \(2,\); return one value per image, shape \(5,\)"):
        WeightedReward(_named(lambda images, prompts: [1.0, 2.0]))(pictures(), PROMPTS[:1] * 5)


def test_numbers_have_no_gradient_where_one_is_asked_for():
    with pytest.raises(TypeError, match="returned a list; return a tensor"):
        WeightedReward(_named(lambda images, prompts: [1.0] * 5))(pictures().requires_grad_(), PROMPTS[:1] * 5)


# ------------------------------------------------------------------------------------------------------------------ PIL images


def test_rewards_see_pil_images_of_8_bits():
    seen = []

    def size(images, prompts, boxes):
        seen.extend(images)
        images.clear()  # the list is the function's own
        return [image.width for image in seen]

    images = pictures()
    images[0, 0, 0, 0], images[0, 1, 0, 0] = 1.7, -0.3  # decoders overshoot
    found = WeightedReward(size, images_as="pil")(images, PROMPTS[:1] * 5, boxes=[1] * 5)["size"]
    assert found.tolist() == [6.0] * 5 and all(isinstance(image, Image.Image) and image.mode == "RGB" for image in seen)
    expected = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(np.asarray(image), array) for image, array in zip(seen, expected, strict=True))


def test_videos_are_lists_of_frames_and_sound_is_no_picture():
    (frames, _) = as_pil(torch.rand(2, 3, 3, 4, 6))
    assert [frame.size for frame in frames] == [(6, 4)] * 3
    with pytest.raises(
        ValueError, match=r"reward 'says' failed: samples of shape \(2, 100\) are not images; leave images_as out"
    ):
        WeightedReward(_named(lambda images, prompts: [0, 0]), images_as="pil")(torch.rand(2, 100), ["", ""])


# --------------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_threads_ask_parts_of_the_batch_at_once_and_keep_the_order(workers):
    """All of them wait for each other: with fewer threads at a time this would not end."""
    calls = min(workers, 5)
    together, seen = threading.Barrier(calls, timeout=20), []

    def slow(images, prompts, names):
        together.wait()
        assert not torch.is_grad_enabled()
        seen.append(list(zip(prompts, names, strict=True)))
        return [float(name) for name in names]

    with torch.no_grad():
        values = WeightedReward(slow, workers=workers)(pictures(), list("abcde"), names=[3, 1, 4, 1, 5])
    assert values["slow"].tolist() == [3, 1, 4, 1, 5]
    assert sorted(sum(seen, [])) == list(zip("abcde", [3, 1, 4, 1, 5], strict=True)) and len(seen) == calls


@pytest.mark.parametrize("error", [ConnectionError("no answer"), StopIteration(), KeyError("score")])
def test_an_error_in_a_thread_names_the_reward(error):
    def asks(images, prompts):
        raise error

    with pytest.raises(Exception, match="reward 'asks' failed: .*"):
        WeightedReward([asks], workers=3)(pictures(), PROMPTS[:1] * 5)


def test_one_that_is_differentiated_is_called_once():
    calls = []

    def counted(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    WeightedReward(counted, workers=3)(pictures().requires_grad_(), PROMPTS[:1] * 5)
    assert calls == [5]


# ----------------------------------------------------------------------------------------------------------------- in a trainer


def test_a_trainer_shows_pil_images_in_threads(tmp_path):
    seen = []

    def counts(images, prompts):
        seen.append((len(images) == len(prompts), threading.current_thread() is threading.main_thread(), type(images[0])))
        return [sum(image.convert("L").histogram()[128:]) for image in images]

    options = {"images_as": "pil", "reward_workers": 2, "eval_dataset": [{"prompt": "a cat"}], "reward_scale": 0.01}
    trainer = make_trainer(tmp_path, reward=counts, **RAM | options)
    trainer.train()
    assert logged(trainer, "loss")[0] > 0 and set(seen) == {(True, False, Image.Image)}
    assert trainer.evaluate()["eval_reward"] >= 0
    with pytest.raises(TypeError, match="reward 'brightness' failed"):
        trainer.reward = WeightedReward(weighted_sum([_brightness], [1.0]), images_as="pil")
        trainer.train()


def _brightness(images, prompts):
    return images.mean((1, 2, 3))


_brightness.__name__ = "brightness"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_as": "pil"}, "images_as='pil' removes the reward's gradient, which loss_type='adjoint_matching' needs"),
        ({"reward_workers": 4}, "reward_workers=4 removes the reward's gradient.*leave it out, or pass loss_type='ram'"),
        ({"images_as": "numpy", **RAM}, "images_as='numpy' is unknown; pass one of 'tensor', 'pil'"),
        ({"reward_workers": 0, **RAM}, "reward_workers=0 would call no reward; pass 1 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_back_propagation_has_no_use_for_them(tmp_path):
    with pytest.raises(ValueError, match="images_as='pil' removes the reward's gradient"):
        make_trainer(tmp_path, method="discrete_adjoint", images_as="pil")


def test_the_command_evaluate_has_them():
    given = {"model_name_or_path": "m", "dataset_name": "p", "reward_funcs": ["r"]}
    assert EvaluationArguments(**given, images_as="pil", reward_workers=4).reward_workers == 4
    with pytest.raises(ValueError, match="reward_workers=0 is too small; pass 1"):
        EvaluationArguments(**given, reward_workers=0)
    with pytest.raises(ValueError, match="images_as='jpg' is unknown; pass one of 'tensor', 'pil'"):
        EvaluationArguments(**given, images_as="jpg")
