"""The five sentences that `make demo` ends with, and its table, from numbers that were made up."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

from telling import five_sentences, training_table

from diffusers_adjoint.metrics import Estimate, TiltEstimate, TiltGap, TiltReport, TiltShift

TARGET = TiltEstimate(0.36, 0.003, 0.1, 13.4, 0.04, 1.05, 0.07, 5000)
SHARES = {"before": torch.full((10,), 0.1), "target": torch.eye(10)[3], "after": 0.5 * torch.eye(10)[3] + 0.05}


SHARE = Estimate(0.97, 0.056)
GAP = TiltGap(Estimate(14.3, 0.03), Estimate(1.24, 0.01), Estimate(1.0, 0.05), Estimate(0.22, 0.05))


def report(fraction=SHARE, gap=GAP):
    before, after, rise = Estimate(0.31, 0.0004), Estimate(0.359, 0.0008), Estimate(0.049, 0.0009)
    shifts = [TiltShift("reward (ink)", sampler, before, after, rise, TARGET, fraction) for sampler in ("ODE", "memoryless")]
    return TiltReport(shifts, gap)


def test_five_sentences():
    told = five_sentences("ink", report(), SHARES)
    assert len(told) == 5 and all(sentence.endswith(".") and "nan" not in sentence for sentence in told)
    target, models, share, nats, referee = told
    assert "mean ink of 0.3600 ± 0.0030" in target and "from 5000 images" in target and "worth 500 of" in target
    assert "The base has 0.31000 ± 0.00040, the fine-tuned model 0.35900 ± 0.00080" in models
    assert "97% ± 6% of the way" in share
    assert (
        "1.240 ± 0.010 nats" in nats
        and "takes 1.000 ± 0.050" in nats
        and "are 0.220 ± 0.050 nats from those of the target" in nats
    )
    # Half the sum of |share − target|: before 9 · .1 of it, after half of that.
    assert "are 0.450 from those of the target, after 0.900 before" in referee


def test_what_cannot_be_told_is_said():
    gap = TiltGap(Estimate(14.3, 0.03), Estimate(1.24, 0.01), None, None)
    *_, share, nats, _ = five_sentences("three", report(fraction=None, gap=gap), SHARES)
    assert "an unknown part of the way" in share and "cannot be told" in nats


def test_the_table_has_the_first_and_the_last_update():
    names = ("reward", "kl", "loss", "evaluations_per_second")
    history = [{"step": i + 1, **dict.fromkeys(names, i / 8)} for i in range(62)] + [{"train_loss": 1.0}]
    rows = training_table(history).splitlines()
    assert len(rows) == 2 + 8 and rows[2].startswith("| 1 ") and rows[-1].startswith("| 62 ")
    assert len(training_table(history[:3]).splitlines()) == 2 + 3
