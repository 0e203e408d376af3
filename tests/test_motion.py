"""The motion of a video and a floor for it: against the plain formula and finite differences."""

import pytest
import torch
from tiny_rewards import brightness
from torch.autograd import gradcheck

from diffusers_adjoint.rewards import MotionFloor, WeightedReward, motion, reward_gradient

PROMPTS = ["a cat", "the sea"]


def videos(frames=4):
    return torch.rand(2, frames, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain_motion(video, pairs):
    squares = [((video[b] - video[a]) ** 2).mean().item() for a, b in pairs]
    return (sum(squares) / len(squares)) ** 0.5


def test_motion():
    expected = [plain_motion(video, [(0, 1), (1, 2), (2, 3)]) for video in videos()]
    assert motion(videos()).tolist() == pytest.approx(expected, rel=1e-12)
    assert motion(videos().bfloat16()).dtype == torch.float32
    assert motion(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)).tolist() == [1.0]


def test_frames_with_a_gap_between_them_are_no_neighbours():
    expected = [plain_motion(video, [(0, 1), (2, 3)]) for video in videos()]
    numbers = [[4, 5, 11, 12]] * 2
    assert motion(videos(), frame_numbers=numbers).tolist() == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda x: motion(x, frame_numbers=numbers), videos().requires_grad_())
    with pytest.raises(
        ValueError, match=r"^the 4 frames of a video contain no two neighbouring ones, .*; pass longer videos, or another "
    ):
        motion(videos(), frame_numbers=[[0, 2, 4, 6]] * 2)


def test_floor():
    """One video below, one above: the first is pulled, in the direction of its own differences, the second is not."""
    fast = videos()
    slow = 0.5 + 0.01 * fast
    shown = torch.stack([slow[0], fast[1]])
    floor = 2 * motion(slow)[0].item()
    reward = MotionFloor(floor)
    assert reward(shown, PROMPTS).tolist() == pytest.approx([-0.5, 0.0], rel=1e-12)
    found = reward_gradient(shown, lambda x: x, WeightedReward(reward), PROMPTS, {}).gradient
    assert not found[1].any()
    moved = shown + 1e-3 * found / found.norm()
    assert motion(moved)[0] > motion(shown)[0]
    assert gradcheck(lambda x: reward(x, PROMPTS), shown.requires_grad_())


def test_a_video_that_stands_still_has_no_gradient_and_no_nan():
    still = torch.full((1, 3, 3, 2, 2), 0.5, requires_grad=True)
    value = MotionFloor(0.1)(still)
    assert value.tolist() == [-1.0]
    assert torch.autograd.grad(value.sum(), still)[0].tolist() == torch.zeros(1, 3, 3, 2, 2).tolist()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: motion(torch.rand(2, 3, 4, 4)),
            ValueError,
            r"^images has shape \(2, 3, 4, 4\); pass videos \(B, F, 3, H, W\)\.$",
        ),
        (lambda: motion(torch.rand(2, 1, 3, 4, 4)), ValueError, "^the 1 frames of a video contain no two neighbouring ones, "),
        (lambda: motion(2 * torch.ones(2, 2, 3, 4, 4)), ValueError, "^images reach from 2 to 2; pass "),
        (lambda: motion([1]), TypeError, "^images is a list; pass a tensor"),
        (lambda: MotionFloor(0.0), ValueError, r"^floor=0.0 is not a motion; pass a number > 0, .*\.$"),
        (lambda: MotionFloor(float("nan")), ValueError, "^floor=nan is not a motion; "),
        (lambda: MotionFloor("high"), TypeError, "^floor is 'high'; pass a number.$"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_it_asks_for_all_frames():
    assert WeightedReward(MotionFloor(0.1)).asked_frames(4) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"^reward 'brightness' does not tell which frames it uses, .*; wrap it in per_frame, "):
        WeightedReward([MotionFloor(0.1), brightness]).asked_frames(4)
