"""What one reward function does to its arguments, fails at, or has no value for, and what the others notice of it: nothing."""

import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import brightness
from tiny_trainer import PROMPTS, difference, make_trainer, weights
from torch.utils.data import Dataset as TorchDataset

from diffusers_adjoint.metrics import mean_score
from diffusers_adjoint.rewards import WeightedReward, per_frame, reward_gradient, smoothed, weighted_sum


def energy(images, prompts):
    return images.square().sum((1, 2, 3))


def pictures(count=3, seed=0):
    return torch.rand(count, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_it_is(x):
    return x


# ----------------------------------------------------------------------------------------------------------- arguments of its own


def in_bytes(images, prompts):
    """255 · mean, by an in-place operation."""
    return images.mul_(255).mean((1, 2, 3))


def half_of_a_view(images, prompts):
    """mean − mean of a half, by an in-place operation on a part."""
    images[:, :, 2:].zero_()
    return images.mean((1, 2, 3))


def test_writing_into_the_images_works_and_stays_with_the_function():
    x = pictures()
    reward = WeightedReward([in_bytes, brightness, half_of_a_view, energy], [1.0, 2.0, 3.0, 4.0])
    result = reward_gradient(x, as_it_is, reward, PROMPTS[:3], {})
    half = torch.zeros_like(x)
    half[:, :, :2] = 1
    torch.testing.assert_close(result.values["in_bytes"], 255 * x.mean((1, 2, 3)))
    torch.testing.assert_close(result.values["brightness"], x.mean((1, 2, 3)))
    torch.testing.assert_close(result.values["half_of_a_view"], (x * half).mean((1, 2, 3)))
    torch.testing.assert_close(result.values["energy"], x.square().sum((1, 2, 3)))
    torch.testing.assert_close(result.gradient, (255 + 2 + 3 * half) / 48 + 8 * x)
    assert torch.equal(result.images, x)  # they are drawn


@pytest.mark.parametrize("function", [in_bytes, lambda images, prompts: images.data.mul_(255).mean((1, 2, 3))])
def test_writing_into_the_images_of_an_evaluation(function):
    x = pictures()
    shown = x.clone()
    with torch.no_grad():
        values = WeightedReward([function, brightness])(shown, PROMPTS[:3])
        mean_score(function, shown[None], PROMPTS[:1])
    torch.testing.assert_close(values["brightness"], x.mean((1, 2, 3)))
    assert torch.equal(shown, x)


def test_writing_that_autograd_does_not_see_is_told(caplog):
    """Its gradient lacks the factor 255, and only this shows it."""

    def hidden(images, prompts):
        images.data.mul_(255)
        return images.mean((1, 2, 3))

    x = pictures()
    for _ in range(2):
        result = reward_gradient(x, as_it_is, WeightedReward([hidden, brightness, in_bytes]), PROMPTS[:3], {})
    torch.testing.assert_close(result.values["brightness"], x.mean((1, 2, 3)))
    said = [record.message for record in caplog.records if "autograd" in record.message]
    assert len(said) == 1 and said[0].startswith("reward 'hidden' writes into its images") and said[0].endswith("255 * images.")


def test_prompts_and_columns_are_the_functions_own():
    class Counts(dict):
        pass

    def greedy(images, prompts, **columns):
        prompts.clear()
        columns["names"].append("more")
        columns["boxes"][0][0] = 9.0
        columns["counts"][0]["cats"].append(9)
        columns["pair"][0][1].append(9)
        columns["array"][0][:] = 9
        columns["tensor"][0].fill_(9)
        columns["picture"][0].putpixel((0, 0), 9)
        columns["tags"][0].add(9)
        assert type(columns["counts"][0]) is Counts
        del columns["text"]
        return brightness(images, prompts)

    def columns():
        return {
            "names": ["a"],
            "boxes": [[1.0, 2.0]],
            "counts": [Counts(cats=[1])],
            "pair": [(1, [2])],
            "array": [np.zeros(2)],
            "tensor": [torch.zeros(2)],
            "picture": [Image.new("L", (1, 1))],
            "tags": [{1}],
            "text": ["x"],
        }

    seen, given, prompts = {}, columns(), ["a cat"]

    def next_one(images, prompts, **columns):
        seen.update(columns, prompts=prompts)
        return brightness(images, prompts)

    WeightedReward([greedy, next_one])(pictures(1), prompts, **given)
    expected = columns()
    for found in (seen, given | {"prompts": prompts}):
        assert found["array"][0].tolist() == [0, 0] and found["tensor"][0].tolist() == [0, 0]
        assert found["picture"][0].getpixel((0, 0)) == 0 and found["prompts"] == ["a cat"]
        for name in ("names", "boxes", "counts", "pair", "tags", "text"):
            assert found[name] == expected[name]


def test_objects_of_other_classes_are_handed_on():
    """Their class may know no copy, and a copy may be large."""
    thing, seen = object(), []

    def keeps(images, prompts, thing):
        seen.extend(thing)
        return brightness(images, prompts)

    WeightedReward(keeps)(pictures(1), ["x"], thing=[thing])
    assert seen == [thing]


def test_a_run_and_its_pictures_do_not_depend_on_what_a_looked_at_reward_writes(tmp_path):
    def paints_over(images, prompts):
        images.data.zero_()
        prompts[:] = ["gone"] * len(prompts)
        return images.mean((1, 2, 3))

    found = []
    for name, second in (("writes", paints_over), ("reads", lambda images, prompts: images.mean((1, 2, 3)))):
        changes = {"reward_weights": [1.0, 0.0], "num_images_to_log": 8, "max_steps": 1}
        trainer = make_trainer(tmp_path / name, reward=[brightness, second], eval_dataset=Tasks(PROMPTS[:2]), **changes)
        trainer.train()
        metrics = trainer.evaluate()
        grids = {file.name: file.read_bytes() for file in sorted((tmp_path / name / "samples").iterdir())}
        found.append((weights(trainer), metrics["eval_reward"], metrics["eval_saturated"], grids))
    assert difference(found[0][0], found[1][0]) == 0.0
    assert found[0][1:] == found[1][1:] and len(found[0][3]) == 2


# ------------------------------------------------------------------------------------------------------------------- errors in it


def raising(error):
    def mine(images, prompts):
        raise error

    return mine


class Unhappy(Exception):
    pass


class Coded(Exception):
    """Its text is not what it is made of."""

    def __str__(self):
        return f"code {self.args[0]}"


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (ValueError("two\nlines."), ValueError, "two lines."),
        (Unhappy("no luck"), Unhappy, "no luck."),
        (KeyError("colour"), RuntimeError, "KeyError 'colour'."),
        (AssertionError(), RuntimeError, "AssertionError."),
        (Coded("3"), RuntimeError, "Coded code 3."),
        (StopIteration(), RuntimeError, "StopIteration."),
        (StopIteration("no more."), RuntimeError, "StopIteration no more."),
    ],
)
@pytest.mark.parametrize("around", [as_it_is, lambda mine: weighted_sum([brightness, mine], [1.0, 1.0]), smoothed])
def test_an_error_names_its_reward(error, kind, said, around):
    error = type(error)(*error.args)  # parameters are shared
    with pytest.raises(kind) as caught:
        WeightedReward([brightness, around(raising(error))])(pictures(), PROMPTS[:3])
    assert type(caught.value) is kind and str(caught.value) == f"reward 'mine' failed: {said}"
    assert caught.value is error or caught.value.__cause__ is error
    assert traceback.extract_tb(error.__traceback__)[-1].filename == __file__  # where it was raised


def test_a_sentence_of_this_package_names_its_reward_too():
    with pytest.raises(ValueError, match=r"^reward 'mine' failed: images has shape \(3, 3, 4, 4\); pass videos .*\.$"):
        WeightedReward(per_frame(raising(KeyError())))(pictures(), PROMPTS[:3])


def test_an_error_of_the_backward_pass_names_its_reward():
    def reuses(images, prompts):
        squares = images.square()
        images.add_(1)  # the square needs what was there
        return squares.mean((1, 2, 3))

    with pytest.raises(RuntimeError, match="^reward 'reuses' failed: one of the variables .*modified by an inplace"):
        reward_gradient(pictures(), as_it_is, WeightedReward([brightness, reuses, energy]), PROMPTS[:3], {})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation on device 0 would\nexceed allowed memory."),  # only the type tells
        RuntimeError("HIP out of memory. Tried to\nallocate 2.00 GiB."),  # only the text, which `auto_find_batch_size` reads
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        KeyboardInterrupt(),
    ],
)
def test_what_others_wait_for_goes_through(error):
    arguments = error.args
    with pytest.raises(type(error)) as caught:
        WeightedReward([brightness, weighted_sum([raising(error)], [1.0])])(pictures(), PROMPTS[:3])
    assert caught.value is error and error.args == arguments


@pytest.mark.parametrize(
    "error", [RuntimeError("the memory of prompts ran out of memory"), ValueError("ran out of memory. Sorry")]
)
def test_an_error_that_merely_mentions_memory_names_its_reward(error):
    said = str(error)
    with pytest.raises(type(error)) as caught:
        WeightedReward(raising(error))(pictures(), PROMPTS[:3])
    assert caught.value is error and str(error) == f"reward 'mine' failed: {said}."


@pytest.mark.parametrize("around", [as_it_is, lambda second: weighted_sum([second, brightness], [1.0, 0.0])])
def test_functions_may_share_what_they_compute(around):
    """The second one takes the features of the first one: their gradients go through one graph."""
    features = []

    def first(images, prompts):
        features.append(images.exp())
        return features[-1].mean((1, 2, 3))

    def second(images, prompts):
        return features[-1].sum((1, 2, 3))

    x = pictures()
    result = reward_gradient(x, as_it_is, WeightedReward([first, around(second)], [48.0, 2.0]), PROMPTS[:3], {})
    torch.testing.assert_close(result.gradient, 3 * x.exp())


# ------------------------------------------------------------------------------------------------ no value for some of the images


def root_for_cats(images, prompts):
    """√(mean − 2 · [is no cat]): NaN without a cat, and so would its gradient be."""
    shift = torch.tensor([0.0 if "cat" in prompt else 2.0 for prompt in prompts], dtype=images.dtype)
    return (images.mean((1, 2, 3)) - shift).sqrt()


def none_for_cats(images, prompts):
    return [None if "cat" in prompt else value for value, prompt in zip(energy(images, prompts), prompts, strict=True)]


def for_nobody(images, prompts):
    return None


def nan_for_cats(images, prompts):
    return [float("nan") if value is None else value for value in none_for_cats(images, prompts)]


def numpys_nan_for_cats(images, prompts):
    return [np.float32("nan") if value is None else value for value in none_for_cats(images, prompts)]


@pytest.mark.parametrize("function", [nan_for_cats, numpys_nan_for_cats])
def test_nan_of_python_in_a_list_is_as_good_as_none(function):
    found, expected = (reward_gradient(pictures(), as_it_is, WeightedReward(f), THREE, {}) for f in (function, none_for_cats))
    assert found.rewards.isnan().tolist() == [True, False, True]
    assert torch.equal(found.gradient, expected.gradient) and found.rewards[1] == expected.rewards[1]


THREE = ["a cat", "a dog", "a cat and a dog"]


@pytest.mark.parametrize("as_one", [False, True])
def test_the_sum_runs_over_the_rewards_that_have_a_value(as_one):
    x = pictures()
    functions, scales = [root_for_cats, none_for_cats, for_nobody], [2.0, -3.0, 5.0]
    reward = WeightedReward(weighted_sum(functions, scales)) if as_one else WeightedReward(functions, scales)
    result = reward_gradient(x, as_it_is, reward, THREE, {})
    leaf = x.clone().requires_grad_()
    expected = torch.stack([2 * leaf[0].mean().sqrt(), -3 * leaf[1].square().sum(), 2 * leaf[2].mean().sqrt()])
    torch.testing.assert_close(result.rewards, expected.detach())
    torch.testing.assert_close(result.gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    if not as_one:
        assert {name: value.isnan().tolist() for name, value in result.values.items()} == {
            "root_for_cats": [False, True, False],
            "none_for_cats": [True, False, True],
            "for_nobody": [True, True, True],
        }


def test_the_gradient_of_a_smoothed_reward_is_not_spoilt_by_images_without_a_value():
    """Checkpointed copies: the mean over them, the slow way."""
    x = pictures()
    both = smoothed(weighted_sum([root_for_cats, none_for_cats], [1.0, 1.0]), std=1e-9, num_copies=2)
    result = reward_gradient(x, as_it_is, WeightedReward([both, brightness]), THREE, {})
    plain = reward_gradient(x, as_it_is, WeightedReward([root_for_cats, none_for_cats, brightness]), THREE, {})
    torch.testing.assert_close(result.gradient, plain.gradient, rtol=1e-6, atol=1e-9)  # the noise is 1e-9


def test_an_image_that_no_reward_is_for_has_none():
    x = pictures()
    result = reward_gradient(x, as_it_is, WeightedReward([none_for_cats, for_nobody]), THREE, {})
    assert result.rewards.isnan().tolist() == [True, False, True]
    assert not result.gradient[::2].any()


def test_a_gradient_through_other_images_is_kept():
    """The score of an image without a value may still depend on it: here each image is compared with the batch's mean."""

    def against_the_mean(images, prompts):
        difference = images.mean((1, 2, 3)) - images.mean()
        return torch.where(torch.tensor(["cat" in prompt for prompt in prompts]), difference.square(), torch.nan)

    x = pictures()
    result = reward_gradient(x, as_it_is, WeightedReward(against_the_mean), THREE, {})
    leaf = x.clone().requires_grad_()
    expected = (leaf.mean((1, 2, 3)) - leaf.mean()).square()[::2].sum()
    torch.testing.assert_close(result.gradient, torch.autograd.grad(expected, leaf)[0])


def test_what_fails_is_not_what_is_missing():
    """Infinite values and pixels leave an image out, whatever other rewards say."""

    def infinite(images, prompts):
        return 1 / (images.mean((1, 2, 3)) * torch.tensor([1.0, 0.0, 1.0]))

    spoilt = pictures()
    spoilt[2, 0, 0, 0] = torch.inf
    result = reward_gradient(spoilt, as_it_is, WeightedReward([infinite, brightness]), THREE, {})
    assert result.rewards.isfinite().tolist() == [True, False, False]


def test_a_missing_return_is_told(caplog):
    def forgetful(images, prompts):
        images.mean((1, 2, 3))

    values = WeightedReward([forgetful, brightness])(pictures(), THREE)
    assert values["forgetful"].isnan().all()
    assert [r.message for r in caplog.records if r.message.startswith("reward 'forgetful' returned None")]


class Tasks(TorchDataset):
    """Rows of two tasks in a fixed order."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return {"prompt": self.prompts[index]}


def only_for(word, function=brightness):
    def reward(images, prompts, **columns):
        values = function(images, prompts)
        return [value if word in prompt else None for value, prompt in zip(values, prompts, strict=True)]

    reward.__name__ = word
    return reward


def test_rewards_of_two_tasks_train_every_image_and_are_counted(tmp_path):
    """The same weights as one function that knows both tasks; nothing is left out, and `on_nonfinite="raise"` has no reason."""

    def knows_both(images, prompts, **columns):
        signs = torch.tensor([1.0 if "cat" in prompt else -2.0 for prompt in prompts])
        return signs * images.mean((1, 2, 3))

    rows, steps = Tasks(["a cat", "a dog"]), {"max_steps": 2, "on_nonfinite": "raise"}
    functions = [only_for("cat"), only_for("dog")]
    trainer = make_trainer(tmp_path, reward=functions, rows=rows, reward_weights=[1.0, -2.0], eval_dataset=rows, **steps)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "skipped" in line]
    assert [(line["skipped"], line["rewards/cat/missing"], line["rewards/dog/missing"]) for line in lines] == [(0, 1, 1)] * 2
    assert lines[0]["reward"] == pytest.approx((lines[0]["rewards/cat/mean"] - 2 * lines[0]["rewards/dog/mean"]) / 2)
    same = make_trainer(tmp_path, reward=knows_both, rows=rows, **steps)
    same.train()
    assert difference(weights(trainer), weights(same)) == 0.0
    metrics = trainer.evaluate()
    assert (metrics["eval_rewards/cat/missing"], metrics["eval_rewards/dog/missing"]) == (2, 2)  # two images a row
    assert metrics["eval_reward"] == pytest.approx((metrics["eval_rewards/cat/mean"] - 2 * metrics["eval_rewards/dog/mean"]) / 2)


def test_only_an_image_without_any_reward_is_left_out(tmp_path):
    functions = [only_for("cat"), only_for("red", energy)]
    trainer = make_trainer(
        tmp_path, reward=functions, rows=["a cat", "a red cat", "a dog"], per_device_train_batch_size=3, max_steps=1
    )
    trainer.train()
    line = next(line for line in trainer.state.log_history if "skipped" in line)
    assert (line["skipped"], line["rewards/cat/missing"], line["rewards/red/missing"]) == (1, 1, 2)
