"""What `benchmarks/work.py` keeps, counts and measures with, and the rows that are committed."""

import json
import sys
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import network_chain
import work
import work_digits
import work_gradients
import work_kept
import work_mixture
import work_tables
from rows import read
from work_count import WorkCount

from diffusers_adjoint.core.matching import LossSteps
from diffusers_adjoint.objectives import AdjointMatching
from diffusers_adjoint.soc import FLOW, PathSampler


@pytest.fixture
def two_runs(monkeypatch):
    monkeypatch.setattr(work, "settings", lambda: [replace(work.MIXTURE, seed=seed) for seed in (0, 1)])


@pytest.mark.usefixtures("two_runs")
def test_a_row_that_is_there_is_not_run_again(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    work.main(["--short", "--rows", str(rows)])
    first = rows.read_text()
    assert [row["setting"]["seed"] for row in read(rows)] == [0, 1]
    work.main(["--short", "--rows", str(rows)])
    assert rows.read_text() == first
    assert capsys.readouterr().out.count("| next | – | 4 | 2 | 2 | 2 | 0.01 | 1 |") == 2  # one line of two seeds, in each table


@pytest.mark.usefixtures("two_runs")
def test_a_row_torn_by_a_kill_is_run_again(tmp_path):
    rows = tmp_path / "rows.jsonl"
    work.main(["--short", "--rows", str(rows)])
    whole = read(rows)
    rows.write_text(rows.read_text()[:-40])
    assert [row["setting"]["seed"] for row in read(rows)] == [0]
    work.main(["--short", "--rows", str(rows)])
    again = read(rows)
    assert [row["found"] for row in again] == [row["found"] for row in whole]  # and the same numbers: all is seeded


def test_short_rows_stay_out_of_the_record(capsys):
    with pytest.raises(SystemExit):
        work.main(["--short"])
    assert "pass --rows" in capsys.readouterr().err


def test_the_record_holds_the_settings_and_makes_the_tables(capsys):
    rows = read(work.RECORDED)
    recorded, wanted = [row["setting"] for row in rows], [asdict(setting) for setting in work.settings()]
    assert all(recorded.count(setting) == 1 for setting in wanted)
    assert all(setting in wanted for setting in recorded)
    work.main(["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == list(work.RUN)
    groups = {str(setting | {"seed": 0}) for setting in wanted}
    assert sum(line.startswith("| ") for line in lines) == len(groups) + 2 * len(work.RUN)  # and each table's two heads


def test_each_kind_of_evaluation_counts_for_what_it_is_for():
    network = torch.nn.Linear(2, 2)
    count, x = WorkCount(network), torch.ones(5, 2)
    network(x)
    assert count.total == 0  # not asked for
    with count.counting():
        with torch.no_grad():
            network(x)
        assert count.total == 5
        network(x)
        assert count.total == 5 + 15
        network(x.requires_grad_())
        assert count.total == 5 + 15 + 10


@pytest.mark.parametrize("pairing", ["next", "score"])
def test_the_work_of_an_update(pairing):
    """K − 1 of the rollout, 2 for each VJP of the base from K − 1 on, 3 for each loss; "score" goes one step further down."""
    base = work_mixture.Base()
    network = work_mixture.Network(2, base.forward)
    setting = replace(work.MIXTURE, pairing=pairing, steps=6, loss_steps=5, updates=1, batch=3)
    count, chosen = WorkCount(network, base), []
    choose = network_chain.choose_loss_steps
    with pytest.MonkeyPatch.context() as patch, count.counting():
        patch.setattr(network_chain, "choose_loss_steps", lambda *given: chosen.append(choose(*given)) or chosen[-1])
        network_chain.train(network, base, AdjointMatching(pairing), work_mixture.Scored, setting)
    earliest = chosen[0].indices[0]
    lowest = earliest + (pairing == "next" or earliest == 0)  # pure noise is paired as "next"
    means_alone = lowest - earliest  # of the base at the earliest step
    assert count.total == 3 * (5 + 2 * (6 - lowest) + means_alone + 3 * 5)


def test_a_rollout_that_is_kept_serves_as_many_updates():
    """The second update has other steps of the same paths, and costs nothing but its losses."""
    base = work_mixture.Base()
    network = work_mixture.Network(2, base.forward)
    kept, count = work_kept.Kept(AdjointMatching("next"), 2), WorkCount(network, base)
    generator = torch.Generator().manual_seed(0)

    def targets(steps):
        start = network_chain.gaussian(4, generator)
        chain = network_chain.NetworkChain(network, base, network_chain.make_scheduler("posterior", 5), start, generator)
        with count.counting():
            return kept.targets(chain, LossSteps(steps, (0.4, 0.4)), work_mixture.Scored)

    first, spent = targets((1, 3)), count.total
    second = targets((3, 4))
    assert count.total == spent > 0
    assert torch.equal(first.states[1], second.states[0]) and torch.equal(first.shifts[1], second.shifts[0])
    assert second.steps.indices == (3, 4)
    assert not torch.equal(targets((1, 3)).states, first.states)  # the third begins anew


def test_the_tilts_own_velocity_is_at_no_distance():
    tilted = work_mixture.LAW.tilt(work_mixture.REWARD)[0]

    def velocity(x, t):
        data, noise = tilted.denoise(x, float(t), 1 - float(t))
        return data - noise

    found, start = work_mixture.distances(velocity, 4096), work_mixture.distances(work_mixture.Base(), 4096)
    # 50 Euler steps; 20 steps of "posterior" (.039; of "ancestral", .068) and 4096 random points. The base is .67 away.
    assert found["ODE"] < 0.03 and found["memoryless"] < 0.055
    assert min(start.values()) > 0.6


def test_the_chain_is_the_schedulers():
    """Its ODE limit aside: one step of `PathSampler` with the same noise has the same mean."""
    base, generator = work_mixture.Base(), torch.Generator().manual_seed(0)
    x = network_chain.gaussian(4, generator)
    chain = network_chain.NetworkChain(base, base, network_chain.make_scheduler("posterior", 4), x, generator)
    sampler = PathSampler(FLOW, lambda t: (2 * FLOW.eta(t)).sqrt(), torch.linspace(0, 1, 5))
    for k in range(1, 4):
        # Sigmas are float32 in diffusers; the other's noise is integrated by 256 midpoints.
        torch.testing.assert_close(chain.base_mean(k, x), sampler.mean(base)(k, x), atol=1e-4, rtol=0)


def test_the_referees_errors_are_those_of_many_referees():
    generator, count, scale = torch.Generator().manual_seed(0), 2000, 0.3
    shifts, errors, normalizers = [], [], []
    for _ in range(300):
        values = torch.randn(count, generator=generator, dtype=torch.float64)
        weights = (scale * values).softmax(0)
        shifts.append(float(weights @ values - values.mean()))
        errors.append(float(work_digits.shift_error(values, weights)))
        normalizers.append(work_digits.log_normalizer(scale * values))
    found = torch.tensor(shifts)
    assert float(found.mean()) == pytest.approx(scale, abs=0.02)  # of N(0, 1): the tilt moves the mean by λ
    assert float(found.std()) == pytest.approx(sum(errors) / 300, rel=0.2)  # a spread of 300 is known to 4 %, the rest is bias
    values, claimed = (torch.tensor(part) for part in zip(*normalizers, strict=True))
    assert float(values.mean()) == pytest.approx(scale**2 / 2, abs=0.01)
    assert float(values.std()) == pytest.approx(float(claimed.mean()), rel=0.2)


def test_steps_are_drawn_with_the_probabilities_asked_for():
    sizes = torch.tensor([5.0, 3.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    wanted = work_gradients.inclusion(sizes, 3)
    assert float(wanted.sum()) == pytest.approx(3) and wanted.max() == 1
    torch.testing.assert_close(wanted[2:] / wanted[2], sizes[2:] / sizes[2])
    joint = work_gradients.joint_inclusion(wanted, 3)
    torch.testing.assert_close(joint.diagonal(), wanted, atol=1e-9, rtol=0)  # a fixed point, after 1000 iterations
    torch.testing.assert_close(joint.sum(1), 3 * wanted, atol=1e-9, rtol=0)  # three steps in each set
    alike = work_gradients.joint_inclusion(torch.full((6,), 0.5).double(), 3)
    assert float(alike[0, 1]) == pytest.approx(0.5 * 2 / 5)


def test_the_variance_of_an_estimate_is_that_of_its_draws():
    """Uniform draws of 2 of 4 steps, by listing them; and a gradient without noise, of which √‖g‖² knows all."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(50, 4, 3, generator=generator, dtype=torch.float64)
    products, sums = gradients @ gradients.transpose(1, 2), gradients.sum(1)
    found = work_gradients.variances(products, sums, torch.ones(4).double(), 2)
    estimates = torch.stack([2 * gradients[:, list(pair)].sum(1) for pair in combinations(range(4), 2)])
    spread = (estimates - sums.mean(0)).square().sum(2).mean()
    # ‖mean‖² of 50 batches is freed of its own noise there, and here not: a 49th of the batches' variance.
    correction = (sums - sums.mean(0)).square().sum(1).mean() / 49
    assert found["uniform"] == pytest.approx(float(spread + correction), rel=1e-9)
    assert found["loss"] == pytest.approx(found["uniform"], rel=1e-9)  # steps of equal losses
    repeated = torch.stack([2 * gradients[:, list(pair)].sum(1) for pair in product(range(4), repeat=2)])
    spread_repeated = (repeated - sums.mean(0)).square().sum(2).mean()
    assert found["loss, repeated"] == pytest.approx(float(spread_repeated + correction), rel=1e-9)
    assert found["all"] < found["uniform"]
    parallel = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()[None, :, None] * torch.ones(50, 1, 3).double()
    exact = work_gradients.variances(parallel @ parallel.transpose(1, 2), parallel.sum(1), parallel[0, :, 0] ** 2, 2)
    assert exact["loss"] == pytest.approx(0, abs=1e-6 * exact["uniform"])


@pytest.mark.slow
def test_digits_in_short(tmp_path, monkeypatch):
    """The public trainer, both samplers and the referee, on a few images; and the gradients' variances."""
    monkeypatch.setattr(work_digits, "CACHE", tmp_path)
    monkeypatch.setattr(work_digits, "PATHS", 8)
    score = {"pairing": "score", "cap": 1.2}
    gradients = replace(work.INK, problem="gradients", **score, updates=0)
    monkeypatch.setattr(work, "settings", lambda: [replace(work.INK, per_rollout=2, **score), gradients])
    rows = tmp_path / "rows.jsonl"
    work.main(["--short", "--rows", str(rows)])
    ink, gradients = (row["found"] for row in read(rows))
    assert ink["work"] <= 2 * (3 + 8 + 2 * 6)  # the second update has the first one's paths: nothing but two losses
    assert set(ink["samplers"]) == {"ODE", "memoryless"} and 0 <= ink["capped"] <= 1
    assert list(gradients["variances"]) == ["uniform", "loss", "loss, repeated", "gradient", "all"]
    assert json.loads(rows.read_text().splitlines()[0])["setting"]["steps"] == 4
    assert work_tables.tables(read(rows)).count("##") == 2
