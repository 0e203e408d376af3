"""Several updates of the weights from one rollout: each is the step that a plain loop makes, and the first one is what it was."""

import math

import pytest
import torch
from test_trainer import Counter, change
from tiny_trainer import PROMPTS, config, difference, logged, make_trainer, watch_chains, watch_targets, weights
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from diffusers_adjoint.core.matching import LossSteps, choose_loss_steps, regression_loss
from diffusers_adjoint.model.randomness import Stream, seeded_generator
from diffusers_adjoint.objectives import Targets
from diffusers_adjoint.trainer.iterations import points_of, require_plain_steps, union

# Plain steps: Adam divides by the gradient's size and would turn rounding into steps.
PLAIN = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 1, "train_sampling_strategy": "sequential"}


# ------------------------------------------------------------------------------------------------------------ the steps it takes


def chosen(trainer, iteration):
    """Two of four steps, as the documentation of the random numbers says."""
    return choose_loss_steps(torch.ones(4), 2, "uniform", seeded_generator(trainer.args.seed, 0, iteration, Stream.LOSS_STEPS))


def trained_by_hand(trainer, iterations, most):
    """One rollout, targets at all steps, and a plain loop of gradient steps on the mean loss of two of them.

    Args:
        most: the norm that each gradient is shortened to, where it is longer.
    """
    columns = {"prompt": PROMPTS[:2]}
    chain = trainer.prepare_chain({"columns": columns, "first_image": 0, "share": 1.0, "ends_update": True})
    targets = trainer.method.targets(chain, LossSteps((0, 1, 2, 3), (1.0,) * 4), trainer.scorer(chain))
    parameters = [p for p in trainer.denoiser.network.parameters() if p.requires_grad]
    for iteration in range(iterations):
        loss = torch.zeros(())
        for k in chosen(trainer, iteration).indices:
            fitted = targets.base_means[k], targets.shifts[k], targets.scales[k]
            loss = loss + regression_loss(chain.mean(k, targets.states[k]), *fitted).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= trainer.args.learning_rate * min(1.0, most / float(norm)) * gradient
    return weights(trainer)


@pytest.mark.parametrize(("iterations", "most"), [(1, math.inf), (3, math.inf), (3, 1e-2)], ids=["one", "three", "clipped"])
def test_an_update_is_a_plain_loop_over_one_rollout(tmp_path, iterations, most):
    clipping = {"max_grad_norm": most if math.isfinite(most) else 0.0}
    trainer = make_trainer(tmp_path, num_iterations=iterations, seed=1, **PLAIN | clipping)
    start = weights(trainer)
    trainer.train()
    by_hand = make_trainer(tmp_path, seed=1, **PLAIN)
    by_hand.check_first_row()  # which suits the paths to the pipeline
    expected = trained_by_hand(by_hand, iterations, most)
    moved = change(expected, start)
    assert moved > 0
    assert len({chosen(trainer, i).indices for i in range(3)}) > 1  # or steps of their own would not show
    # The same float32 gradients, summed in another order: 1e-7 of each, three digits for what the network makes of it. Where
    # they are clipped, torch adds 1e-6 to a norm of 1e-2 and more, which is as much.
    assert difference(expected, weights(trainer)) <= 1e-4 * moved


def test_the_first_iteration_is_the_only_one_of_a_run_without_others(tmp_path):
    """Bit for bit: its steps, its loss and what is logged of it."""
    alone = make_trainer(tmp_path, max_steps=1)
    several = make_trainer(tmp_path, max_steps=1, num_iterations=3)
    for trainer in (alone, several):
        trainer.train()
    for name in ("loss", "reward", "kl", "adjoint_norm"):
        assert logged(alone, name) == logged(several, name)
    assert difference(weights(alone), weights(several)) > 0


def test_the_rollout_and_the_adjoint_are_paid_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, num_inference_steps=6, num_loss_steps=2, num_iterations=3)
    monkeypatch.setattr(trainer, "check_first_row", lambda: None)
    counter, points = Counter(trainer.denoiser.network), []
    watch_targets(trainer, lambda chain, targets: points.append(targets.steps.indices))
    trainer.train()
    (steps,) = points
    at_noise = int(trainer.replay.times[steps[0]] < 0.02)  # paired with the adjoint of the next state, and takes a base mean more
    assert counter.rollout == 5 + at_noise
    assert counter.adjoint == 6 - steps[0] - at_noise
    assert counter.loss == 3 * 2


def test_updates_of_the_host_are_rollouts(tmp_path):
    """Its schedule, log and random numbers do not know of iterations."""
    settings = {"max_steps": 3, "lr_scheduler_type": "linear"}
    alone, several = (make_trainer(tmp_path, num_iterations=count, **settings) for count in (1, 2))
    starts = {trainer: [] for trainer in (alone, several)}
    for trainer, seen in starts.items():
        watch_chains(trainer, lambda chain, seen=seen: seen.append(chain.start))
        trainer.train()
        assert trainer.state.global_step == 3
    assert logged(alone, "learning_rate") == logged(several, "learning_rate")
    assert all(torch.equal(a, b) for a, b in zip(starts[alone], starts[several], strict=True))


# -------------------------------------------------------------------------------------------------------------- micro-batches


def test_accumulation_and_batch_split_change_nothing(tmp_path):
    def run(batch, accumulation):
        trainer = make_trainer(
            tmp_path,
            num_iterations=2,
            **PLAIN | {"max_steps": 2},
            rows=PROMPTS * 2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        start = weights(trainer)
        trainer.train()
        return weights(trainer), start

    whole, start = run(4, 1)
    # The sums are the same, in another order: float32 keeps 1e-7 of each, and three digits are for what the network makes of it.
    allowed = 1e-4 * change(whole, start)
    assert allowed > 0
    assert difference(whole, run(1, 4)[0]) <= allowed
    assert difference(whole, run(2, 2)[0]) <= allowed


def test_an_earlier_micro_batch_keeps_its_grid_and_its_prompts(tmp_path):
    """Where no weight moves and all steps carry the loss, a later iteration finds the gradients of the first, bit for bit."""
    trainer = make_trainer(
        tmp_path,
        num_iterations=2,
        num_loss_steps=4,
        gradient_accumulation_steps=2,
        **PLAIN | {"learning_rate": 0.0},
    )
    prepare, shifts = trainer.replay.prepare, iter([1.0, 3.0])

    def prepared(*args, **kwargs):
        if trainer.is_in_train:  # the grid of every second micro-batch is another one
            trainer.replay.scheduler.set_shift(next(shifts))
        return prepare(*args, **kwargs)

    trainer.replay.prepare = prepared
    grids, gradients = [], []
    regress = trainer.regress

    def watched(*args):
        grids.append(trainer.replay.scheduler.sigmas.clone())
        return regress(*args)

    trainer.regress = watched
    hook = register_optimizer_step_pre_hook(
        lambda one, *_: gradients.append([p.grad.clone() for group in one.param_groups for p in group["params"]])
    )
    trainer.train()
    hook.remove()
    first, second = gradients
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and any(g.any() for g in first)
    assert not torch.equal(grids[0], grids[1])
    assert torch.equal(grids[0], grids[2]) and torch.equal(grids[1], grids[3]) and len(grids) == 4


# ------------------------------------------------------------------------------------------------------- what is no number


def spoilt_passes(trainer, spoilt):
    """The gradient of one weight is NaN in the iterations, counted over the whole run from 0, that `spoilt` names."""
    parameter = next(p for p in trainer.denoiser.network.parameters() if p.requires_grad)
    passes = []

    def hook(gradient):
        passes.append(1)
        return gradient * (torch.nan if (len(passes) - 1) // trainer.args.num_loss_steps in spoilt else 1.0)

    parameter.register_hook(hook)


def steps_made(trainer):
    """How many steps the optimizer makes while the trainer trains that change a weight."""
    seen = [weights(trainer)]
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(weights(trainer)))
    trainer.train()
    hook.remove()
    return sum(difference(a, b) > 0 for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize(("spoilt", "made", "skipped"), [(set(), 4, 0), ({0}, 3, 0), ({1}, 3, 0), ({0, 1}, 2, 2)])
def test_an_iteration_without_a_finite_gradient_makes_no_step(tmp_path, caplog, spoilt, made, skipped):
    """The update counts as dropped, with its two images, only if none of its iterations has moved the weights."""
    trainer = make_trainer(tmp_path, num_iterations=2)  # two updates, and Adam, which would move by its momentum
    spoilt_passes(trainer, spoilt)
    assert steps_made(trainer) == made
    assert logged(trainer, "skipped") == [skipped, 0.0]
    told = [record.message for record in caplog.records if "is skipped" in record.message]
    assert told == [
        f"iteration {i + 1} of update 1 is skipped: rewards or gradients are NaN or infinite." for i in sorted(spoilt)
    ]


def test_an_iteration_without_a_finite_gradient_ends_training_if_asked_so(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, on_nonfinite="raise")
    spoilt_passes(trainer, {0})
    start = weights(trainer)
    with pytest.raises(ValueError, match="the gradient of the loss is NaN or infinite"):
        trainer.train()
    assert difference(start, weights(trainer)) == 0.0


def test_an_image_left_out_stays_out(tmp_path):
    """In all further iterations of its update, and in no other update."""
    trainer = make_trainer(tmp_path, num_iterations=3)
    regress, asked = trainer.regress, []

    def watched(model, chain, targets, keep):
        asked.append(keep.tolist())
        return regress(model, chain, targets, keep & torch.tensor([len(asked) != 2, True]))  # something happens in the second

    trainer.regress = watched
    trainer.train()
    both, one = [True, True], [False, True]
    assert asked == [both, both, one] + [both] * 3


def test_an_update_without_images_makes_no_step(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda images, prompts: [None] * len(images), num_iterations=2)
    with pytest.raises(ValueError, match="no update was made, because all 2 were dropped"):
        steps_made(trainer)


def test_what_an_error_has_left_is_forgotten(tmp_path):
    """The second micro-batch fails; the next call of `train` makes its update of its own two."""
    settings = {"num_iterations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **PLAIN}
    trainer, undisturbed = make_trainer(tmp_path, **settings), make_trainer(tmp_path, **settings)
    chains = []

    def fail(chain):
        chains.append(chain)
        if trainer.is_in_train and len(chains) == 3:  # the first one is of the check at the start
            raise RuntimeError("out of memory")

    watch_chains(trainer, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert len(trainer._kept) == 1
    trainer.denoiser.zero_grad()
    trainer.train()
    undisturbed.train()
    assert difference(weights(trainer), weights(undisturbed)) == 0.0


# --------------------------------------------------------------------------------------------------------------- refused, parts


@pytest.mark.parametrize("count", [0, -1])
def test_no_iteration_is_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"^num_iterations={count} would not change the weights; pass at least 1.$"):
        config(tmp_path, num_iterations=count)


def test_steps_that_are_not_the_trainers_to_make_are_refused(tmp_path):
    require_plain_steps(1, deepspeed=True, scaled=True)
    require_plain_steps(2, deepspeed=False, scaled=False)
    with pytest.raises(ValueError, match="num_iterations=2 does not work with DeepSpeed, .*; use DDP or FSDP, or leave"):
        require_plain_steps(2, deepspeed=True, scaled=False)
    trainer = make_trainer(tmp_path, num_iterations=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="num_iterations=2 does not work with fp16=True; pass bf16=True, or leave"):
        trainer.train()


def test_the_steps_of_all_iterations_together():
    steps = [LossSteps((0, 2), (0.5, 0.5)), LossSteps((2, 3), (0.5, 1.0))]
    assert union(steps) == LossSteps((0, 2, 3), (0.75, 0.75, 1.0))
    assert union(steps[:1]) is steps[0]


def test_points_of_some_steps():
    """All points of a step that has two, in their order."""
    values = torch.arange(4.0).view(4, 1, 1)
    targets = Targets(values, LossSteps((1, 2, 2, 5), (0.9,) * 4), -values, values + 10, torch.arange(4.0), None)
    found = points_of(targets, LossSteps((2, 5), (0.25, 1.0)))
    assert found.steps == LossSteps((2, 2, 5), (0.25, 0.25, 1.0))
    assert found.states.flatten().tolist() == [1, 2, 3] and found.shifts.flatten().tolist() == [-1, -2, -3]
    assert found.base_means.flatten().tolist() == [11, 12, 13] and found.scales.tolist() == [1, 2, 3]
