"""A pipeline's micro-batch as a chain: what objectives see is what the scheduler and the network say."""

import inspect

import pytest
import torch
from tiny_audio import stable_audio
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, make_trainer

K = 4


@pytest.fixture(params=[sd3, sd15], ids=["flow", "epsilon"])
def chain(request, tmp_path):
    """Of a model that differs from its base."""
    trainer = make_trainer(tmp_path, request.param)
    for parameter in trainer.denoiser.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    inputs = {"columns": {"prompt": PROMPTS[:2]}, "first_image": 0, "share": 1.0, "ends_update": True}
    return trainer.prepare_chain(inputs)


def test_the_clean_prediction_and_the_mean_are_one_another_s_inverse(chain):
    path = chain.rollout()
    for k in range(K):
        mean = chain.base_mean(k, path.states[k]).detach()
        clean = chain.clean(mean, path.states[k], k)
        # float32; the first step of a flow divides by the small coefficient of a prediction from noise.
        torch.testing.assert_close(chain.toward(clean, path.states[k], k), mean, rtol=1e-4, atol=1e-4)


def test_samples_are_the_noiseless_ends_of_new_paths(chain):
    noise = [generator.clone_state() for generator in chain.noise]
    path = chain.rollout()
    expected = chain.mean(K - 1, path.states[-1]).detach()
    for generator, state in zip(chain.noise, noise, strict=True):
        generator.set_state(state.get_state())
    evaluated = chain.denoiser.evaluations
    found = chain.sample()
    assert torch.equal(found, expected) and not found.requires_grad
    assert chain.denoiser.evaluations - evaluated == 2 * K
    assert not torch.equal(chain.sample(), found)


def test_noised_data_are_fresh_draws_at_the_level_of_the_step(chain):
    clean, table = torch.full_like(chain.start, 0.5), chain.denoiser.replay.scheduler.table
    noise = [generator.clone_state() for generator in chain.noise]
    found = chain.noised(clean, 2)
    drawn = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in noise])
    torch.testing.assert_close(found, float(table.alpha[2]) * clean + float(table.beta[2]) * drawn)
    assert not torch.equal(chain.noised(clean, 2), found)


def test_the_base_s_score_asks_the_base_once_at_the_level_beside_the_grid(chain):
    network, seen = chain.denoiser.network, []
    forward = inspect.signature(network.forward)
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(forward.bind(*args, **kwargs).arguments["timestep"]), with_kwargs=True
    )
    x = torch.zeros_like(chain.start) + 0.1
    score = chain.base_score(x, 0.03)
    hook.remove()
    assert len(seen) == 1
    grid = chain.denoiser.replay.scheduler.ending_at(0.03)
    assert torch.as_tensor(seen[0]).flatten()[0] == grid.timesteps[-1]
    # By hand: the base's prediction at that level, and Tweedie's formula.
    with chain.base():
        alpha, beta = grid.levels[:, -1].tolist()
        near = alpha * x
        output = chain.denoiser.replay.predict(near, K - 1, chain.conditioning, guided=False, grid=grid)
    clean = (near - beta * output) / (1.0 if chain.denoiser.replay.component == "transformer" else alpha)  # of flow, of epsilon
    torch.testing.assert_close(score, alpha * (alpha * clean - near) / beta**2, rtol=1e-3, atol=1e-2)  # β² = 1e-3 divides float32
    assert not torch.allclose(score, chain.denoiser.score(x, chain.conditioning, noise=0.03), rtol=1e-3)


def test_an_edm_pipeline_has_a_level_beside_its_grid(tmp_path):
    trainer = make_trainer(tmp_path, stable_audio, lora=False)
    inputs = {"columns": {"prompt": PROMPTS[:1]}, "first_image": 0, "share": 1.0, "ends_update": True}
    chain = trainer.prepare_chain(inputs)
    assert chain.base_score(torch.zeros_like(chain.start), 0.05).isfinite().all()
