"""Metrics over several prompts against closed forms, explicit loops and repetition."""

import math

import pytest
import torch

from diffusers_adjoint.metrics import (
    Estimate,
    TiltReport,
    image_statistics,
    prompt_difference,
    prompt_mean,
    sample_mean,
    saturated_share,
    statistics_panel,
    tilt_estimate,
    tilt_gap,
    tilt_shift,
    vendi_score,
)
from diffusers_adjoint.metrics.tilt import MIN_EFFECTIVE_SAMPLES
from diffusers_adjoint.rewards.image_statistics import brightness, colourfulness, contrast, saturation, sharpness

NAN = math.nan


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------- prompt means


def test_mean_over_prompts_by_hand():
    estimate = prompt_mean(torch.tensor([[1, 3], [4, 6], [7, 9]]))  # means 2, 5, 8: spread 3
    assert estimate.mean == 5.0 and estimate.standard_error == pytest.approx(3 / math.sqrt(3), rel=1e-12)


def test_prompts_count_alike_however_many_samples_are_missing():
    values = torch.tensor([[1.0, NAN, NAN, NAN], [2.0, 4.0, 3.0, 3.0], [NAN, NAN, NAN, NAN]])
    # Means 1 and 3, not 13/5; their spread is √2, over √2. The third prompt has none.
    assert prompt_mean(values) == Estimate(2.0, pytest.approx(1.0, rel=1e-12))


def test_one_prompt_has_the_error_of_its_samples():
    x = noise(50)
    assert prompt_mean(x[None]) == sample_mean(x)
    with_a_lost_prompt = torch.stack([x, torch.full_like(x, NAN)])
    assert prompt_mean(with_a_lost_prompt) == sample_mean(x)


def test_one_value_a_prompt():
    x = noise(50)
    assert prompt_mean(x[:, None]) == sample_mean(x)


@pytest.mark.filterwarnings("error")  # torch warns of the spread of one number
@pytest.mark.parametrize("values, mean", [([[2.5]], 2.5), ([[NAN, 2.5], [NAN, NAN]], 2.5), ([[NAN], [NAN]], NAN)])
def test_error_of_a_single_number_is_unknown(values, mean):
    estimate = prompt_mean(torch.tensor(values))
    assert estimate.mean == pytest.approx(mean, nan_ok=True) and math.isnan(estimate.standard_error)


def test_error_over_prompts_is_calibrated():
    """Prompts with means of spread 2, samples of spread 1 around them: the error of 30 × 5 is √((4 + 1/5)/30)."""
    z = torch.tensor(
        [
            (estimate.mean - 1) / estimate.standard_error
            for seed in range(400)
            for estimate in [prompt_mean(1 + 2 * noise(30, 1, seed=seed) + noise(30, 5, seed=1000 + seed))]
        ]
    )
    # 400 t-like numbers with 29 degrees of freedom: mean within .2 (four errors), spread 1.04 ± .04.
    assert abs(z.mean()) < 0.2 and z.std() == pytest.approx(1.04, abs=0.15)


def test_difference_is_paired():
    before = 100 * noise(20, 1) + 10 * noise(20, 6, seed=1)  # prompts and seeds differ far more than the change
    change = 0.5 + 0.1 * noise(20, 6, seed=2)
    estimate = prompt_difference(before, before + change)
    expected = sample_mean(change.mean(1))
    # 1e-11: adding 100 to numbers of size .1 costs three digits of float64's 16.
    assert estimate.mean == pytest.approx(expected.mean, abs=1e-11)
    assert estimate.standard_error == pytest.approx(expected.standard_error, abs=1e-11)


def test_difference_drops_a_pair_of_which_one_is_missing():
    before = torch.tensor([[1.0, NAN, 5.0], [0.0, 0.0, 0.0]])
    after = torch.tensor([[2.0, 90.0, NAN], [3.0, 3.0, 3.0]])
    assert prompt_difference(before, after) == Estimate(2.0, pytest.approx(1.0, rel=1e-12))  # 1 and 3


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.zeros(3), r"values has shape \(3,\)"),
        (torch.zeros(0, 3), r"values has shape \(0, 3\)"),
        (torch.tensor([[0.0, 1.0], [NAN, -torch.inf]]), r"values\[1, 1\] is -inf"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        prompt_mean(values)


def test_bad_pairs():
    with pytest.raises(ValueError, match=r"before has shape \(2, 3\) but after \(2, 4\)"):
        prompt_difference(torch.zeros(2, 3), torch.zeros(2, 4))
    infinite = torch.full((2, 3), torch.inf)
    with pytest.raises(ValueError, match=r"before\[0, 0\] is inf"):  # not hidden by ∞ − ∞
        prompt_difference(infinite, infinite)


# -------------------------------------------------------------------------------------------------------------------- Vendi score


@pytest.mark.parametrize("images", [2, 5, 12])
def test_vendi_of_identical_and_of_orthogonal_images(images):
    lengths = torch.arange(1.0, images + 1)[:, None]  # the length of a feature does not count
    same, orthogonal = lengths * torch.tensor([[0.6, -0.8] + [0.0] * 10]), lengths * torch.eye(images, 12)
    # Rounding: float64 eigenvalues of 1e-17 add 4e-16 each; the 1e-9 leaves room for float32 features of direction .6, −.8.
    assert vendi_score(same.expand(3, -1, -1)).mean == pytest.approx(1.0, abs=1e-9)
    assert vendi_score(orthogonal.expand(3, -1, -1)).mean == pytest.approx(images, abs=1e-9)


def test_vendi_of_groups():
    """Groups of shares π, orthogonal to each other: exp(−Σ π log π)."""
    halves = torch.eye(4)[[0, 0, 0, 1, 1, 1]]
    unequal = torch.eye(4)[[0, 0, 0, 0, 0, 1]]
    scores = [vendi_score(groups[None]).mean for groups in (halves, unequal)]
    assert scores == pytest.approx([2.0, math.exp(math.log(6) - 5 / 6 * math.log(5))], rel=1e-12)
    both = vendi_score(torch.stack([halves, unequal]))
    assert both.mean == pytest.approx(sum(scores) / 2, rel=1e-12)
    assert both.standard_error == pytest.approx(abs(scores[0] - scores[1]) / 2, rel=1e-12)


def test_vendi_of_two_images_at_an_angle():
    """K/2 has the eigenvalues (1 ± cos)/2."""
    cos = 0.3
    f = torch.tensor([[[1.0, 0.0], [cos, math.sqrt(1 - cos**2)]]], dtype=torch.float64)
    shares = torch.tensor([(1 + cos) / 2, (1 - cos) / 2], dtype=torch.float64)
    score = vendi_score(f)
    assert score.mean == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-12)
    assert math.isnan(score.standard_error)


def test_vendi_of_one_prompt_is_jackknifed():
    f = noise(1, 7, 4)
    left_out = [vendi_score(torch.cat([f[:, :i], f[:, i + 1 :]], 1)).mean for i in range(7)]
    centred = torch.tensor(left_out, dtype=torch.float64) - sum(left_out) / 7
    assert vendi_score(f).standard_error == pytest.approx(math.sqrt(6 / 7 * centred.square().sum().item()), rel=1e-9)


def test_vendi_of_many_different_images_is_certain():
    """Whatever number the jackknife leaves out of: they all count the same."""
    for images in (30, 31, 45, 100):
        assert vendi_score(torch.eye(images)[None]).standard_error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("images", [30, 75])  # all left out in turn, or every third
def test_jackknife_of_vendi_is_calibrated(images):
    """Around the mean score of as many images (it is biased in N, and says so): the errors are the spread of repetitions."""
    scores = [vendi_score(0.5 + noise(1, images, 5, seed=seed)) for seed in range(100)]
    means, errors = (torch.tensor([getattr(s, name) for s in scores]) for name in ("mean", "standard_error"))
    assert errors.square().mean().sqrt() == pytest.approx(means.std().item(), rel=0.3)  # a spread of 100 is known to 7 %


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.ones(3, 4), "at least two images"),
        (torch.ones(2, 1, 4), "at least two images"),
        (torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), "no direction"),
        (torch.full((1, 2, 2), NAN), "finite features"),
    ],
)
def test_vendi_needs_directions(features, message):
    with pytest.raises(ValueError, match=message):
        vendi_score(features)


# -------------------------------------------------------------------------------------------------------------- image statistics


def test_statistics_are_those_of_the_rewards():
    images = torch.rand(4, 3, 6, 7).mul(1.2).clamp(max=1)
    values = image_statistics(images)
    expected = {f.__name__: f(images) for f in (brightness, saturation, contrast, colourfulness, sharpness)}
    assert values.keys() == {*expected, "saturated pixels"}
    for name, value in (expected | {"saturated pixels": saturated_share(images)}).items():
        torch.testing.assert_close(values[name], value)
    assert values["saturated pixels"].min() > 0


def test_statistics_of_a_video_are_means_over_its_frames():
    videos = torch.rand(2, 5, 3, 6, 7)
    for name, value in image_statistics(videos).items():
        torch.testing.assert_close(value, torch.stack([image_statistics(video)[name].mean() for video in videos]))


@pytest.mark.parametrize("bad", [NAN, torch.inf])
def test_an_overflown_image_has_no_statistics(bad):
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    spoilt = images.detach().clone()
    spoilt[1, 2, 3, 3] = bad
    for name, value in image_statistics(spoilt).items():
        assert value[1].isnan() and torch.equal(value[[0, 2]], image_statistics(images)[name][[0, 2]])
        assert not image_statistics(images)[name].requires_grad
    assert image_statistics(torch.stack([spoilt, images.detach()]))["brightness"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(3, 4, 4), ValueError, r"shape \(3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"shape \(1, 1, 4, 4\)"),
        (torch.full((1, 3, 4, 4), 1.5), ValueError, "from 1.5 to 1.5"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "dtype torch.uint8"),
    ],
)
def test_statistics_need_images(images, error, message):
    with pytest.raises(error, match=message):
        image_statistics(images)


def test_panel_marks_what_moved():
    before = {"brightness": noise(40, 4), "contrast": noise(40, 4, seed=1)}
    change = 0.1 * noise(40, 4, seed=2)
    after = {"brightness": before["brightness"] + change + 0.1, "contrast": before["contrast"] + change - change.mean()}
    panel = statistics_panel(before, after)
    moved, still = panel.changes
    assert moved.difference.differs_from_zero and not still.difference.differs_from_zero
    assert moved.before == prompt_mean(before["brightness"]) and moved.after == prompt_mean(after["brightness"])
    assert moved.difference == prompt_difference(before["brightness"], after["brightness"])
    header, _, first, second = panel.format().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["statistic", "base", "fine-tuned"]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells == ["brightness", str(moved.before), str(moved.after), str(moved.difference), "yes"]
    assert "yes" not in second


def test_a_mark_needs_three_standard_errors_and_an_error():
    for size, expected in ((2.9, False), (3.1, True), (-3.1, True)):
        values = noise(10, 1)
        values = (values - values.mean()) / values.std() * math.sqrt(10) + size  # error 1, mean `size`
        assert statistics_panel({"x": torch.zeros(10, 1)}, {"x": values}).changes[0].difference.differs_from_zero is expected
    assert not statistics_panel({"x": torch.zeros(1, 1)}, {"x": torch.ones(1, 1)}).changes[0].difference.differs_from_zero


def test_panel_needs_the_same_statistics():
    with pytest.raises(ValueError, match=r"\['a'\] but after \['b'\]"):
        statistics_panel({"a": torch.zeros(2, 2)}, {"b": torch.zeros(2, 2)})


# ---------------------------------------------------------------------------------------------------------------- tilt by prompt

# Base N(m_c, s²) with reward a·x: log Z = a m + a²s²/2, tilted mean m + a s², KL = a²s²/2, for each prompt c.
MEANS, STD, SLOPE = torch.tensor([[-1.5], [0.0], [0.3], [2.0]], dtype=torch.float64), 0.8, 1.1
KL = 0.5 * (SLOPE * STD) ** 2
LOG_Z = SLOPE * MEANS.mean().item() + KL
TILTED_MEAN = MEANS.mean().item() + SLOPE * STD**2


def base_samples(count, seed=0):
    return MEANS + STD * noise(len(MEANS), count, seed=seed)


def test_tilt_by_prompt_is_calibrated():
    z_mean, z_log, z_kl = torch.empty(300), torch.empty(300), torch.empty(300)
    for seed in range(300):
        x = base_samples(1500, seed)
        estimate = tilt_estimate(SLOPE * x, x)
        z_mean[seed] = (estimate.mean - TILTED_MEAN) / estimate.standard_error
        z_log[seed] = (estimate.log_normalizer - LOG_Z) / estimate.log_normalizer_standard_error
        z_kl[seed] = (estimate.kl_target - KL) / estimate.kl_target_standard_error
    for z in (z_mean, z_log, z_kl):
        # Of 300 standard normals: mean within four errors (.23), spread 1 ± .04, a few per cent more for skewed weights.
        assert abs(z.mean()) < 0.23 and z.std() == pytest.approx(1.0, abs=0.15)


def test_numbers_of_the_tilt_are_means_over_prompts():
    x = base_samples(3000)
    x[1] *= 1.3  # prompts of different spread, so that their weights differ as well
    log_weights, statistic = SLOPE * x, x.sin()
    together = tilt_estimate(log_weights, statistic)
    alone = [tilt_estimate(w, s) for w, s in zip(log_weights, statistic, strict=True)]
    for name in ("mean", "log_normalizer", "kl_target"):
        assert getattr(together, name) == pytest.approx(sum(getattr(e, name) for e in alone) / 4, rel=1e-12)
    for name in ("standard_error", "log_normalizer_standard_error"):
        assert getattr(together, name) == pytest.approx(math.hypot(*(getattr(e, name) for e in alone)) / 4, rel=1e-12)
    assert together.effective_sample_size == min(e.effective_sample_size for e in alone)
    assert together.num_samples == 3000


def test_pooled_weights_would_be_biased():
    """One weight over all samples counts a prompt by its e^{a m}: prompts of high reward, not the tilt of each."""
    x = base_samples(20_000)
    by_prompt, pooled = tilt_estimate(SLOPE * x, x), tilt_estimate(SLOPE * x.flatten(), x.flatten())
    shares = (SLOPE * MEANS).softmax(0)
    biased = (shares * MEANS).sum().item() + SLOPE * STD**2
    # Four standard errors, fixed seeds.
    assert abs(by_prompt.mean - TILTED_MEAN) < 4 * by_prompt.standard_error
    assert abs(pooled.mean - biased) < 4 * pooled.standard_error
    assert biased - TILTED_MEAN > 20 * pooled.standard_error


def test_one_prompt_is_the_plain_tilt():
    x, tuned = base_samples(2000)[0], base_samples(1000, 1)[0] + 0.4
    kl = noise(20).square()
    plain_shift, shift = (tilt_shift("x", "ODE", f(x), f(tuned), f(SLOPE * x)) for f in (lambda v: v, lambda v: v[None]))
    plain_gap, gap = (tilt_gap(f(SLOPE * x), f(SLOPE * tuned), f(kl)) for f in (lambda v: v, lambda v: v[None]))
    for name in ("before", "after", "fraction", "target"):
        assert_close(getattr(plain_shift, name), getattr(shift, name))
    for name in ("scaled_reward", "kl_spent", "kl_target", "gap"):
        assert_close(getattr(plain_gap, name), getattr(gap, name))


def assert_close(plain, other):
    assert vars(other) == {name: pytest.approx(value, rel=1e-12) for name, value in vars(plain).items()}


@pytest.mark.parametrize("reached", [0.0, 0.6, 2.0])
def test_share_of_the_shift_is_calibrated(reached):
    """Tuned samples that went a known share of the way; prompts far apart are no error, as both models have the same."""
    z = torch.empty(300)
    for seed in range(300):
        x = base_samples(1200, seed)
        tuned = base_samples(900, 10_000 + seed) + reached * SLOPE * STD**2
        fraction = tilt_shift("x", "ODE", x, tuned, SLOPE * x).fraction
        z[seed] = (fraction.mean - reached) / fraction.standard_error
    # As above, and a few per cent more for a ratio of estimates.
    assert abs(z.mean()) < 0.23 and z.std() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("slope, gap", [(SLOPE, 0.0), (0.0, KL), (2 * SLOPE, KL)])
def test_gap_by_prompt_is_the_kl_to_the_tilt(slope, gap):
    """A model N(m + bs², s²) is ½(b − a)²s² nats from the tilt, whatever m."""
    x, tuned = base_samples(12_000), base_samples(12_000, 1) + slope * STD**2
    spent = 0.5 * (slope * STD) ** 2
    path_kl = torch.full((4, 1), spent, dtype=torch.float64)  # one path a prompt
    result = tilt_gap(SLOPE * x, SLOPE * tuned, path_kl)
    assert abs(result.gap.mean - gap) < 4 * result.gap.standard_error  # four standard errors, fixed seeds
    variance = (SLOPE * STD) ** 2
    expected = math.sqrt((math.expm1(variance) + variance) / 48_000)  # of log Z and of the reward, as of one prompt of 48,000
    assert result.gap.standard_error == pytest.approx(expected, rel=0.1)  # fourth moments of the weights
    assert result.kl_target.mean == pytest.approx(KL, rel=0.03)  # 22,000 effective samples
    assert result.kl_spent == Estimate(pytest.approx(spent), pytest.approx(0.0, abs=1e-12))


def test_error_of_path_kl_is_the_spread_over_prompts():
    x, path_kl = base_samples(1000), torch.tensor([[1.0, 3.0], [4.0, 6.0], [7.0, 9.0], [4.0, 6.0]])
    gap = tilt_gap(SLOPE * x, SLOPE * x, path_kl)
    assert gap.kl_spent == prompt_mean(path_kl)


def test_one_prompt_with_uneven_weights_makes_all_not_estimable():
    x = base_samples(1000)
    log_weights = SLOPE * x
    log_weights[2] *= 20
    estimate = tilt_estimate(log_weights, x)
    assert tilt_estimate(SLOPE * x, x).estimable and not estimable_text(estimate)
    shift, gap = tilt_shift("x", "ODE", x, x + 1, log_weights), tilt_gap(log_weights, SLOPE * x, torch.ones(4, 1))
    assert shift.fraction is None and gap.gap is None and gap.kl_target is None
    text = TiltReport([shift], gap).format()
    assert text.count("not estimable") == 5 and "nan" not in text  # target, share, log Z, KL of the exact tilt, gap


def estimable_text(estimate):
    assert (str(estimate) == "not estimable") is not estimate.estimable
    return estimate.estimable


def test_every_prompt_needs_the_documented_number():
    enough, too_few = MIN_EFFECTIVE_SAMPLES + 1, MIN_EFFECTIVE_SAMPLES - 1
    for effective, expected in (([enough, enough], True), ([1000, too_few], False)):
        log_weights = torch.full((2, 1000), -800.0)
        for row, count in zip(log_weights, effective, strict=True):
            row[:count] = 0.0
        assert tilt_estimate(log_weights, torch.zeros(2, 1000)).estimable is expected


def test_report_without_a_gap():
    x = base_samples(1000)
    shift = tilt_shift("ink", "ODE", x, x + 0.5, SLOPE * x)
    others = {"diversity": (Estimate(2.0, 0.1), Estimate(1.5, 0.1))}
    with_gap = TiltReport([shift], tilt_gap(SLOPE * x, SLOPE * x, torch.ones(4, 1)), others).format().split("\n\n")
    without = TiltReport([shift], None, others).format().split("\n\n")
    assert [without[0], without[2]] == [with_gap[0], with_gap[2]]
    assert "KL spent" in with_gap[1] and "KL spent" not in without[1] and "log Z, ODE" in without[1]
    assert TiltReport([shift], None).format().split("\n\n") == without[:2]


def test_bad_tables_of_the_tilt():
    x = base_samples(200)
    with pytest.raises(ValueError, match="4 × 200 log_weights but 4 × 199 statistics"):
        tilt_estimate(x, x[:, 1:])
    with pytest.raises(ValueError, match="4 × 200 log_weights but 8 × 100 statistics"):
        tilt_estimate(x, x.reshape(8, 100))
    with pytest.raises(ValueError, match=r"statistic has shape \(4, 1\)"):
        tilt_estimate(x[:, :1].expand(4, 2), x[:, :1])
    with pytest.raises(ValueError, match=r"log_weights has shape \(2, 4, 200\)"):
        tilt_estimate(torch.stack([x, x]), x)
    with pytest.raises(ValueError, match=r"values has shape \(3, 200\) but the base has 4 prompt"):
        tilt_shift("x", "ODE", x, x[1:], x)
    with pytest.raises(ValueError, match=r"values has shape \(200,\) but the base has 4 prompt"):
        tilt_gap(x, x[0], torch.ones(4, 1))
    for path_kl in (torch.ones(4), torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"path_kl has shape .* but the base has 4 prompt"):
            tilt_gap(x, x, path_kl)
    spoilt = x.clone()
    spoilt[2, 7] = NAN
    with pytest.raises(ValueError, match=r"log_weights\[2, 7\] is nan"):
        tilt_estimate(spoilt, x)
    with pytest.raises(ValueError, match=r"path_kl\[1, 0\] is nan"):
        tilt_gap(x, x, torch.tensor([[1.0], [NAN], [1.0], [1.0]]))
