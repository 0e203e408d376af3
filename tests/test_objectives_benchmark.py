"""What `benchmarks/objectives.py` trains, counts and measures with, and the rows that are committed."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import network_chain
import objectives
import work_digits
import work_gallery
import work_mixture
from rows import missing, read
from work_memory import peak_memory

from diffusers_adjoint.objectives import OBJECTIVES


def mixture_chain(count: int) -> network_chain.NetworkChain:
    base, generator = work_mixture.Base(), torch.Generator().manual_seed(0)
    scheduler = network_chain.make_scheduler("posterior", 5)
    return network_chain.NetworkChain(base, base, scheduler, network_chain.gaussian(count, generator), generator)


def test_every_objective_is_compared():
    assert {name for name, _ in objectives.OBJECTIVES.values()} == set(OBJECTIVES)
    assert all(set(updates) == set(objectives.OBJECTIVES) for updates in objectives.UPDATES.values())


def test_the_record_holds_the_settings_and_makes_the_tables(capsys):
    rows = read(objectives.RECORDED)
    recorded, wanted = [row["setting"] for row in rows], [asdict(setting) for setting in objectives.settings()]
    assert all(recorded.count(setting) == 1 for setting in wanted)
    assert all(setting in wanted for setting in recorded)
    objectives.main(["--table"])
    text = capsys.readouterr().out
    assert all(f"## {problem}" in text for problem in objectives.RUN)


def test_runs_of_a_problem_have_about_the_same_work():
    """Their numbers are compared: the least is 93 % of the most."""
    for problem in objectives.RUN:
        rows = objectives.adjoint_matching_on_digits() + read(objectives.RECORDED)
        works = [row["found"]["work"] for row in rows if row["setting"]["problem"] == problem]
        if problem != "costs":
            assert min(works) > 0.93 * max(works)


def test_a_setting_is_run_once():
    first, second = objectives.settings()[:2]
    assert missing([first, second, first], [{"setting": asdict(second)}]) == [first]


def test_the_base_s_score_is_that_of_the_blurred_law():
    chain, noise = mixture_chain(4), 0.1
    x = network_chain.gaussian(6, torch.Generator().manual_seed(1)).requires_grad_()
    blur = (noise / (1 - noise)) ** 2
    law = replace(work_mixture.LAW, covariances=work_mixture.LAW.covariances + blur * torch.eye(2, dtype=torch.float64))
    expected = torch.autograd.grad(law.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(chain.base_score(x.detach(), noise), expected, atol=1e-9, rtol=1e-9)  # float64


def test_the_chain_s_samples_are_the_mixture_s():
    samples = mixture_chain(20_000).sample()
    means = torch.einsum("m,md->d", work_mixture.LAW.weights, work_mixture.LAW.means)
    # Five standard errors of a mean over 20 000 with deviation about .9; and 5 steps, which keep a mean nearly.
    torch.testing.assert_close(samples.mean(0), means, atol=0.05, rtol=0)


def test_the_peak_of_memory_is_that_of_tensors_that_live_together():
    def call():
        first = torch.ones(250_000)  # 1 MB
        second = torch.ones(500_000)
        del first
        return second + 1  # 2 MB more

    # Allocations are rounded up to 64 bytes.
    assert peak_memory(call) == pytest.approx(4e6, rel=1e-3)


def test_a_short_run_of_the_plane(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work_gallery, "CACHE", tmp_path)
    monkeypatch.setattr(work_gallery.tilt_2d, "Settings", lambda: work_gallery.tilt_2d.SMOKE)
    work_gallery.learnt.cache_clear()
    chosen = [s for s in objectives.settings() if s.seed == 0 and s.problem in ("mixture", "two moons")]
    monkeypatch.setattr(objectives, "settings", lambda: chosen)
    objectives.main(["--short", "--rows", str(tmp_path / "rows.jsonl")])
    assert len(read(tmp_path / "rows.jsonl")) == 2 * len(objectives.OBJECTIVES)
    assert "## two moons" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        objectives.main(["--short"])
    work_gallery.learnt.cache_clear()


@pytest.mark.slow
def test_a_short_run_on_digits_and_the_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(work_digits, "CACHE", tmp_path)
    monkeypatch.setattr(work_digits, "PATHS", 8)
    chosen = [s for s in objectives.settings() if s.seed == 0 and s.problem in ("digits-ink", "costs")]
    monkeypatch.setattr(objectives, "settings", lambda: chosen)
    objectives.main(["--short", "--rows", str(tmp_path / "rows.jsonl")])
    costs = {
        row["setting"]["loss_type"] + row["setting"]["loss_kwargs"].get("mode", ""): row["found"]
        for row in read(tmp_path / "rows.jsonl")
        if row["setting"]["problem"] == "costs"
    }
    # K = 4, S = 2: 2K − 1 and 4 at each of two points; one step scores at each of its two.
    assert costs["ram"]["work"] == 7 + 8 and costs["ram"]["rewards"] == 1 and not costs["ram"]["reward_gradient"]
    assert costs["one_step"]["rewards"] == 2 and costs["one_step"]["reward_gradient"]
    assert costs["ram"]["peak_bytes"] < costs["adjoint_matching"]["peak_bytes"]


def test_the_docs_have_its_numbers():
    """Each objective's mean W2 on the mixture, and the shares of each seed on the digits."""
    page = (Path(__file__).parents[1] / "docs/results.md").read_text(encoding="utf-8")

    def short(value):
        return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"

    for loss_type, options in objectives.OBJECTIVES.values():
        rows = objectives.adjoint_matching_on_digits() + read(objectives.RECORDED)
        mine = [r for r in rows if (r["setting"]["loss_type"], r["setting"]["loss_kwargs"]) == (loss_type, options)]
        w2 = [r["found"]["w2"] for r in mine if r["setting"]["problem"] == "mixture"]
        assert f"| {' | '.join(short(sum(w[s] for w in w2) / 3) for s in ('ODE', 'memoryless'))} |" in page
        shares = [r["found"]["samplers"]["ODE"]["share"] for r in mine if r["setting"]["problem"] == "digits-ink"]
        assert len(shares) == 3 and f"({', '.join(map(short, shares))})" in page
