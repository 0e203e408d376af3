"""What `benchmarks/discretisation.py` claims, on the part of its tables that takes seconds; and its instruments."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from diffusers_adjoint.schedulers.integrators import DEFAULT_INTEGRATOR, INTEGRATORS

SOURCE = Path(__file__).parents[1] / "benchmarks" / "discretisation.py"
spec = importlib.util.spec_from_file_location("discretisation", SOURCE)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def tilt_error(integrator, pairing, grid="uniform", shift=1.0, steps=20):
    return bench.tilt_error(bench.make_scheduler(integrator, grid, shift, steps), pairing)


# Recorded by an independent implementation with 2·10⁵ random samples (± .005) and an ODE solver of its own, hence ± .01, and
# half a unit of the last digit.
COLUMNS = [(1.0, 10), (1.0, 20), (1.0, 40), (3.0, 20), (3.0, 40)]  # (shift, K)
RECORDED = {
    ("euler", "paper"): (0.399, 0.249, 0.147, 0.246, 0.139),
    ("euler", "next"): (0.152, 0.076, 0.035, 0.123, 0.060),
    ("compensated", "next"): (0.175, 0.074, 0.032, 0.170, 0.088),
    ("local_linear", "next"): (0.201, 0.104, 0.049, 0.124, 0.058),
    ("ancestral", "next"): (0.275, 0.136, 0.061, 0.186, 0.092),
}


@pytest.mark.parametrize(
    "column", [pytest.param(i, marks=[] if steps == 20 else pytest.mark.slow) for i, (_, steps) in enumerate(COLUMNS)]
)
@pytest.mark.parametrize(("integrator", "pairing"), RECORDED)
def test_the_table_is_reproduced(integrator, pairing, column):
    shift, steps = COLUMNS[column]
    recorded = RECORDED[integrator, pairing][column]
    assert tilt_error(integrator, pairing, shift=shift, steps=steps) == pytest.approx(recorded, abs=0.0105)


@pytest.mark.slow
def test_the_table_is_reproduced_on_the_hosts_own_grid():
    for steps, recorded in ((20, 0.076), (40, 0.030)):
        assert tilt_error("compensated", "next", grid="own", steps=steps) == pytest.approx(recorded, abs=0.0105)


@pytest.mark.parametrize("grid", ["uniform", "own"])
def test_the_default_reaches_the_bound(grid):
    assert tilt_error(DEFAULT_INTEGRATOR, "next", grid) <= 0.08
    assert tilt_error(DEFAULT_INTEGRATOR, "next", grid, steps=40) <= 0.04


def test_the_next_adjoint_beats_the_papers_pairing():
    for integrator in INTEGRATORS:
        # Measured .27 to .43.
        assert tilt_error(integrator, "next") < 0.5 * tilt_error(integrator, "paper"), integrator


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_coefficient_beats_both_where_the_mean_is_exact(shift):
    for integrator in ("ancestral", "posterior"):
        # Measured .17 and .19 for ancestral, .45 and .56 for posterior.
        assert tilt_error(integrator, "score", shift=shift) < 0.65 * tilt_error(integrator, "next", shift=shift), integrator


def test_clean_end_points_on_narrow_data():
    for grid in ("uniform", "own"):
        errors = {name: bench.end_point_error(bench.make_scheduler(name, grid, 3.0, 20)) for name in INTEGRATORS}
        others = min(errors[name] for name in ("euler", "compensated", "local_linear"))
        assert max(errors["ancestral"], errors["posterior"]) < 0.6 * others  # measured .22 and .51


def test_the_base_velocity_is_the_conditional_mean():
    """Against a Monte Carlo regression at one point: E[X_1 − X_0 | X_t in a narrow band]."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randint(2, (4_000_000,), generator=generator).double() * 2 - 1
    data = modes + 0.4 * torch.randn(len(modes), generator=generator, dtype=torch.float64)
    noise = torch.randn(len(modes), generator=generator, dtype=torch.float64)
    near = (0.6 * data + 0.4 * noise - 0.3).abs() < 0.01
    sampled = (data - noise)[near]
    exact = float(bench.base_velocity(torch.tensor([0.3], dtype=torch.float64), 0.6))
    # Four standard errors.
    assert float(sampled.mean()) == pytest.approx(exact, abs=4 * float(sampled.std()) / math.sqrt(len(sampled)))


def test_no_control_and_exact_control_are_measured_right(monkeypatch):
    """Without control the distance is that of base and target; with the target's own velocity only Euler's error is left."""
    scheduler = bench.make_scheduler("ancestral", "own", 1.0, 40)
    at = torch.tensor(bench.times(scheduler), dtype=torch.float64)
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    tilted = bench.target_quantiles(levels)
    base = torch.cat([m + 0.4 * torch.special.ndtri((torch.arange(1000).double() + 0.5) / 1000) for m in (-1, 1)]).sort().values
    monkeypatch.setattr(bench, "fixed_point", lambda *_: (at, torch.zeros(len(at), len(bench.AXIS)).double()))
    # Euler's error over 200 steps is about .01 of a distance of .7; the base's quantiles add their own discretisation.
    assert bench.tilt_error(scheduler, "next") == pytest.approx(float((base - tilted).square().mean().sqrt()), abs=0.03)

    def exact_change(t):
        spread = t**2 * bench.VARIANCE + (1 - t) ** 2
        means = bench.MEANS + bench.VARIANCE
        away = bench.AXIS[:, None] - t * means
        share = torch.softmax(torch.softmax(bench.MEANS, 0).log() - away**2 / (2 * spread), -1)
        tilted_velocity = (share * (means + (t * bench.VARIANCE - (1 - t)) / spread * away)).sum(-1)
        return tilted_velocity - bench.base_velocity(bench.AXIS, float(t))

    monkeypatch.setattr(bench, "fixed_point", lambda *_: (at, torch.stack([exact_change(t) for t in at])))
    assert bench.tilt_error(scheduler, "next") < 0.01
