"""Metrics against closed forms, explicit loops and repetition."""

import math

import pytest
import torch

from diffusers_adjoint.metrics import (
    Estimate,
    TiltReport,
    pairwise_diversity,
    sample_mean,
    saturated_share,
    tilt_estimate,
    tilt_gap,
    tilt_shift,
)
from diffusers_adjoint.metrics.tilt import MIN_EFFECTIVE_SAMPLES

# Base N(m, s²) with reward c·x: log Z = cm + ½c²s², tilted mean m + cs², KL(p*‖p) = ½c²s², E[w²]/E[w]² = e^{c²s²}.
MEAN, STD, SLOPE = 0.4, 0.8, 1.1
LOG_Z = SLOPE * MEAN + 0.5 * (SLOPE * STD) ** 2
TILTED_MEAN = MEAN + SLOPE * STD**2
KL = 0.5 * (SLOPE * STD) ** 2


def base_samples(count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + STD * noise


def test_tilt_of_a_gaussian() -> None:
    x = base_samples(100_000)
    estimate = tilt_estimate(SLOPE * x, x)
    # Four standard errors: one correct implementation in 16,000 would fail, and the seed is fixed.
    assert abs(estimate.mean - TILTED_MEAN) < 4 * estimate.standard_error
    assert abs(estimate.log_normalizer - LOG_Z) < 4 * estimate.log_normalizer_standard_error
    # The errors themselves, so that the two lines above are not won by large ones: √(1 + c²s²) e^{c²s²/2} s/√N for the mean
    # (10 %: fourth moments under heavy weights), √((e^{c²s²} − 1)/N) for log Z.
    variance = (SLOPE * STD) ** 2
    expected = STD * math.sqrt((1 + variance) * math.exp(variance) / len(x))
    assert estimate.standard_error == pytest.approx(expected, rel=0.1)
    assert estimate.log_normalizer_standard_error == pytest.approx(math.sqrt(math.expm1(variance) / len(x)), rel=0.1)
    # 2 %: N e^{−c²s²} = 46,000 effective samples, and second moments of the weights converge more slowly than means.
    assert estimate.effective_sample_size == pytest.approx(math.exp(-variance), rel=0.02)
    assert estimate.kl_target == pytest.approx(KL, rel=0.02)
    assert estimate.estimable


def test_standard_errors_are_calibrated() -> None:
    repetitions = 400
    z_mean, z_log = torch.empty(repetitions), torch.empty(repetitions)
    for seed in range(repetitions):
        x = base_samples(4000, seed)
        estimate = tilt_estimate(SLOPE * x, x)
        z_mean[seed] = (estimate.mean - TILTED_MEAN) / estimate.standard_error
        z_log[seed] = (estimate.log_normalizer - LOG_Z) / estimate.log_normalizer_standard_error
    for z in (z_mean, z_log):
        # The mean of 400 standard normals is within .2 (four of its errors); their spread is 1 ± .035, and skewed weights
        # with N = 4000 add a few per cent.
        assert abs(z.mean()) < 0.2
        assert z.std() == pytest.approx(1.0, abs=0.15)


def test_effective_sample_size_of_a_few_equal_weights() -> None:
    log_weights = torch.full((1000,), -800.0)
    log_weights[:250] = 0.0  # the others weigh e^{−800}, which is 0 in float64: 250 samples of 1000 count
    statistic = torch.arange(1000.0)
    estimate = tilt_estimate(log_weights, statistic)
    assert estimate.effective_sample_size == pytest.approx(0.25, abs=1e-12)  # exact arithmetic on equal weights
    assert estimate.mean == pytest.approx(statistic[:250].double().mean().item(), rel=1e-12)
    assert estimate.log_normalizer == pytest.approx(math.log(0.25), rel=1e-12)
    assert estimate.kl_target == pytest.approx(math.log(4), rel=1e-12)


def test_zero_reward_leaves_the_base() -> None:
    x = base_samples(500)
    estimate, plain = tilt_estimate(torch.zeros(500), x), sample_mean(x)
    assert estimate.mean == pytest.approx(plain.mean, rel=1e-12)  # rounding of float64 sums
    # The delta method divides by N, the sample variance by N − 1: a factor √(499/500).
    assert estimate.standard_error == pytest.approx(plain.standard_error * math.sqrt(499 / 500), rel=1e-12)
    assert estimate.effective_sample_size == pytest.approx(1.0, abs=1e-12)
    assert estimate.log_normalizer == pytest.approx(0.0, abs=1e-12)
    assert estimate.log_normalizer_standard_error == pytest.approx(0.0, abs=1e-7)  # the root of a rounding error


@pytest.mark.parametrize("shift", [-2000.0, 700.0, 5000.0])  # e^{±shift} under- and overflows float64
def test_constant_reward_changes_log_z_only(shift: float) -> None:
    x = base_samples(2000)
    plain, shifted = tilt_estimate(SLOPE * x, x), tilt_estimate(SLOPE * x + shift, x)
    # 1e-9: adding 5000 to a number near 1 costs 4 digits of float64's 16.
    assert shifted.log_normalizer - shift == pytest.approx(plain.log_normalizer, abs=1e-9)
    for name in ("mean", "standard_error", "effective_sample_size", "log_normalizer_standard_error", "kl_target"):
        assert getattr(shifted, name) == pytest.approx(getattr(plain, name), rel=1e-9)


def test_float32_weights_are_summed_in_float64() -> None:
    x = base_samples(4000)
    weights32 = (SLOPE * x).float()
    exact = tilt_estimate(weights32.double(), x)
    assert tilt_estimate(weights32, x) == exact


def test_degenerate_weights_are_not_estimable() -> None:
    x = base_samples(4000)
    log_weights = 30 * x  # e^{c²s²} = e^{576}: one sample carries everything
    assert not tilt_estimate(log_weights, x).estimable
    assert str(tilt_estimate(log_weights, x)) == "not estimable"
    shift = tilt_shift("x", "ODE", x, x + 1, log_weights)
    gap = tilt_gap(log_weights, 30 * (x + 1), torch.ones(50))
    assert shift.fraction is None and gap.gap is None and gap.kl_target is None
    text = TiltReport([shift], gap).format()
    assert text.count("not estimable") == 5  # target, share of shift, log Z, KL of the exact tilt, gap
    assert "nan" not in text


def test_estimable_starts_at_the_documented_number() -> None:
    # One either side, because 1/Σ p² of exactly as many equal weights is rounded.
    for effective, expected in ((MIN_EFFECTIVE_SAMPLES + 1, True), (MIN_EFFECTIVE_SAMPLES - 1, False)):
        log_weights = torch.full((1000,), -800.0)
        log_weights[:effective] = 0.0
        assert tilt_estimate(log_weights, torch.zeros(1000)).estimable is expected


@pytest.mark.parametrize(
    ("log_weights", "statistic", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"log_weights has shape \(4, 1\)"),
        (torch.zeros(4), torch.zeros(()), r"statistic has shape \(\)"),
        (torch.zeros(1), torch.zeros(1), r"log_weights has shape \(1,\)"),
        (torch.zeros(4), torch.zeros(5), "4 log_weights but 5 statistics"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), r"log_weights\[1\] is nan"),
        (torch.zeros(2), torch.tensor([-torch.inf, 0.0]), r"statistic\[0\] is -inf"),
    ],
)
def test_bad_weights_and_statistics(log_weights: torch.Tensor, statistic: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tilt_estimate(log_weights, statistic)


def test_bad_samples_of_the_tuned_model() -> None:
    x = base_samples(1000)
    with pytest.raises(ValueError, match=r"values has shape \(2, 3\)"):
        tilt_shift("x", "ODE", x, torch.zeros(2, 3), SLOPE * x)
    with pytest.raises(ValueError, match=r"values\[0\] is nan"):
        tilt_gap(SLOPE * x, SLOPE * x, torch.tensor([torch.nan, 0.0]))


@pytest.mark.parametrize("reached", [0.0, 0.6, 1.0, 2.0])
def test_shift_fraction_is_calibrated(reached: float) -> None:
    """Tuned samples that went a known share of the way; before and target share their samples, and the error knows it."""
    repetitions = 300
    z = torch.empty(repetitions)
    for seed in range(repetitions):
        x = base_samples(4000, seed)
        tuned = base_samples(3000, 10_000 + seed) + reached * SLOPE * STD**2
        fraction = tilt_shift("x", "ODE", x, tuned, SLOPE * x).fraction
        assert fraction is not None
        z[seed] = (fraction.mean - reached) / fraction.standard_error
    # Of 300 standard normals: mean within four errors (.23), spread 1 ± .04, plus a few per cent for a ratio of estimates.
    assert abs(z.mean()) < 0.23
    assert z.std() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("reached", [0.0, 0.6, 1.0])
def test_errors_of_pairs_are_calibrated(reached: float) -> None:
    """A quarter of the base samples of two prompts have partners that went a known share of the way: after, rise and share."""
    repetitions, target, offsets = 300, SLOPE * STD**2, torch.tensor([[0.0], [5.0]])
    z = torch.empty(repetitions, 3)
    for seed in range(repetitions):
        x = base_samples(4000, seed).view(2, 2000)
        # The partners keep .7 of the base's deviation, so that a sample moves the rise and the target together.
        tuned = 0.7 * x[:, :500] + 0.3 * base_samples(1000, 10_000 + seed).view(2, 500) + reached * target
        shift = tilt_shift("x", "ODE", x + offsets, tuned + offsets, SLOPE * x, paired=True)
        found = ((shift.after, MEAN + 2.5 + reached * target), (shift.rise, reached * target), (shift.fraction, reached))
        z[seed] = torch.tensor([(estimate.mean - right) / estimate.standard_error for estimate, right in found])
    # Of 300 standard normals: mean within four errors (.23), spread 1 ± .04, plus a few per cent for a ratio of estimates.
    assert z.mean(0).abs().max() < 0.23, z.mean(0)
    assert z.std(0).tolist() == pytest.approx([1.0] * 3, abs=0.15)


def test_the_share_has_no_error_where_the_rise_has_the_error_of_the_target() -> None:
    """Pairs whose differences are .6 of each sample's influence on target − before, so that the two estimates err together."""
    x = base_samples(4000)
    p = (SLOPE * x).softmax(0)
    target, before = (p * x).sum(), x.mean()
    influence = p * (x - target) - (x - before) / len(x)
    tuned = x + 0.6 * (len(x) * influence + target - before)
    shift = tilt_shift("x", "ODE", x, tuned, SLOPE * x, paired=True)
    assert shift.fraction is not None and shift.fraction.mean == pytest.approx(0.6)
    assert shift.rise.standard_error > 0.01 and shift.fraction.standard_error < 1e-4  # N and N − 1: one part in 4000


def test_a_model_that_did_not_change_has_no_rise_and_no_error() -> None:
    x = base_samples(4000)
    shift = tilt_shift("x", "ODE", x, x[:300], SLOPE * x, paired=True)
    assert shift.fraction is not None and shift.after == shift.before
    assert (shift.rise, shift.fraction) == (Estimate(0.0, 0.0), Estimate(0.0, 0.0))


def test_more_pairs_than_base_samples_are_refused() -> None:
    x = base_samples(400)
    with pytest.raises(ValueError, match="there are 400 tuned samples for 300 of the base"):
        tilt_shift("x", "ODE", x[:300], x, SLOPE * x[:300], paired=True)


def test_a_statistic_that_the_tilt_leaves_alone_has_no_share() -> None:
    x, independent = base_samples(4000), base_samples(4000, seed=1)
    assert tilt_shift("noise", "ODE", independent, independent + 1, SLOPE * x).fraction is None
    constant = torch.full((4000,), 0.1)
    assert tilt_shift("constant", "ODE", constant, constant, SLOPE * x).fraction is None


@pytest.mark.parametrize(("slope", "gap"), [(SLOPE, 0.0), (0.0, KL), (2 * SLOPE, KL)])
def test_gap_is_the_kl_to_the_tilt(slope: float, gap: float) -> None:
    """A model N(m + bs², s²) spends ½b²s² and is ½(b − c)²s² nats from the tilt of slope c: the gap finds that number."""
    x = base_samples(50_000)
    tuned = base_samples(50_000, seed=1) + slope * STD**2
    spent = 0.5 * (slope * STD) ** 2
    path_kl = spent * (1 + 0.2 * torch.tensor([-1.0, 1.0]).repeat(50))  # paths differ; their mean does not
    result = tilt_gap(SLOPE * x, SLOPE * tuned, path_kl)
    assert result.gap is not None and result.kl_target is not None
    assert abs(result.gap.mean - gap) < 4 * result.gap.standard_error  # four standard errors, fixed seeds
    # log Z's variance and the reward's, (e^{c²s²} − 1 + c²s²)/N, and the path KL's; 10 % for the weights' fourth moments.
    variance = (SLOPE * STD) ** 2
    expected = math.sqrt((math.expm1(variance) + variance) / 50_000 + (0.2 * spent) ** 2 / 99)
    assert result.gap.standard_error == pytest.approx(expected, rel=0.1)
    assert result.kl_spent.mean == pytest.approx(spent, rel=1e-6)  # float32 path KLs
    assert result.kl_target.mean == pytest.approx(KL, rel=0.03)  # 23,000 effective samples


def test_report_is_a_markdown_table() -> None:
    x = base_samples(4000)
    tuned = base_samples(4000, seed=1) + SLOPE * STD**2
    shifts = [tilt_shift("ink", sampler, x, tuned, SLOPE * x) for sampler in ("ODE", "memoryless")]
    gap = tilt_gap(SLOPE * x, SLOPE * tuned, torch.full((100,), KL))
    report = TiltReport(shifts, gap, {"diversity": (Estimate(2.0, 0.1), Estimate(1.5, 0.1))})
    first, second, third = report.format().split("\n\n")
    for table, rows, columns in ((first, 2, 7), (second, 6, 2), (third, 1, 3)):
        lines = table.splitlines()
        assert len(lines) == rows + 2
        assert {line.count("|") for line in lines} == {columns + 1}
        assert len({len(line) for line in lines}) == 1  # aligned in a terminal
    assert str(shifts[0].after) in first and str(shifts[0].target) in first and str(shifts[0].fraction) in first
    assert str(gap.gap) in second and str(gap.kl_target) in second
    assert [line.split("|")[1].strip() for line in second.splitlines()[2:6]] == [
        *("log Z, ODE", "KL of the exact tilt, ODE", "log Z, memoryless", "KL of the exact tilt, memoryless"),
    ]
    assert "2.00 ± 0.10" in third and "1.50 ± 0.10" in third
    assert len(TiltReport(shifts, gap).format().split("\n\n")) == 2  # nothing else measured: no empty table


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.34761, 0.00123), "0.3476 ± 0.0012"),
        (Estimate(-1234.5, 67.0), "-1234 ± 67"),
        (Estimate(2.0, 0.0), "2"),
        (Estimate(2.5, math.nan), "2.5"),
    ],
)
def test_estimates_print_the_digits_they_know(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


def looped_diversity(features: torch.Tensor) -> list[float]:
    """The definition, pair by pair."""
    values = []
    for prompt in features:
        pairs = [(i, j) for i in range(len(prompt)) for j in range(i)]
        values.append(sum((prompt[i] - prompt[j]).square().sum().item() for i, j in pairs) / len(pairs))
    return values


def test_diversity_is_the_mean_over_pairs_and_prompts() -> None:
    features = torch.randn(5, 7, 3, dtype=torch.float64) + 100  # an offset, where a naive Σf² − (Σf)² would lose digits
    per_prompt = torch.tensor(looped_diversity(features), dtype=torch.float64)
    diversity = pairwise_diversity(features)
    # 1e-12: float64 with distances from the centre, so the offset costs nothing.
    assert diversity.mean == pytest.approx(per_prompt.mean().item(), rel=1e-12)
    assert diversity.standard_error == pytest.approx(per_prompt.std().item() / math.sqrt(5), rel=1e-12)


def test_diversity_of_one_prompt_is_jackknifed() -> None:
    features = torch.randn(1, 6, 4, dtype=torch.float64)
    left_out = [looped_diversity(torch.cat([features[:, :i], features[:, i + 1 :]], 1))[0] for i in range(6)]
    centred = torch.tensor(left_out, dtype=torch.float64) - sum(left_out) / 6
    diversity = pairwise_diversity(features)
    assert diversity.mean == pytest.approx(looped_diversity(features)[0], rel=1e-12)  # float64 rounding
    assert diversity.standard_error == pytest.approx(math.sqrt(5 / 6 * centred.square().sum().item()), rel=1e-12)


def test_jackknife_error_is_calibrated() -> None:
    # For f ~ N(0, I) in D dimensions the diversity is 2D; 300 repetitions as above, 40 images each.
    z = torch.empty(300)
    for seed in range(300):
        features = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        diversity = pairwise_diversity(features)
        z[seed] = (diversity.mean - 16) / diversity.standard_error
    assert abs(z.mean()) < 0.4  # .06 of noise; a low value comes with a low error, which biases z by about −.15
    assert z.std() == pytest.approx(1.0, abs=0.2)  # N = 40: a t-like spread, a few per cent above 1


def test_diversity_of_two_images_has_no_error() -> None:
    diversity = pairwise_diversity(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]))
    assert diversity.mean == 25.0 and math.isnan(diversity.standard_error)


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 4), (0, 3, 4)])
def test_diversity_needs_two_images_a_prompt(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two images a prompt"):
        pairwise_diversity(torch.zeros(shape))


def test_diversity_refuses_nan() -> None:
    with pytest.raises(ValueError, match="finite features"):
        pairwise_diversity(torch.full((2, 3, 4), torch.nan))


def test_saturated_share_counts_exact_ends() -> None:
    images = torch.full((2, 3, 2, 2), 0.5)
    images[0, 0] = 0.0  # 4 values of 12
    images[1, :, 0, 0] = 1.0  # 3 values of 12
    images[1, 0, 1, 1] = torch.finfo(torch.float32).eps  # nearly black is not clipped
    assert saturated_share(images).tolist() == pytest.approx([4 / 12, 3 / 12], rel=1e-6)  # float32 means


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 2, 2), r"shape \(3, 2, 2\)"),
        (torch.full((1, 3, 2, 2), 1.5), "from 1.5 to 1.5"),
        (torch.full((1, 3, 2, 2), torch.nan), "from nan to nan"),
    ],
)
def test_saturated_share_needs_images(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saturated_share(images)
