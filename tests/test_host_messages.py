"""What diffusers says at every call is said once, and nothing is lost that was not said before."""

import logging

import pytest
from diffusers.utils import logging as host
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, make_trainer

from diffusers_adjoint.trainer.host_messages import said_once


@pytest.fixture
def said():
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = host.get_verbosity()
    host.set_verbosity_warning()
    host.add_handler(handler)
    yield lines
    host.remove_handler(handler)
    host.set_verbosity(level)


def test_each_place_speaks_once_and_errors_always(said):
    logger = host.get_logger("diffusers.pipelines.some")
    for _ in range(2):
        with said_once():
            for prompt in ("a", "b"):
                logger.warning(f"cut: {prompt}")
                logger.warning("another")
                logger.error("wrong")
    assert said == ["cut: a", "another", "wrong", "wrong"] * 2
    logger.warning("cut: c")
    logger.warning("cut: c")
    assert said[8:] == ["cut: c"] * 2


def test_what_shares_the_handler_is_not_the_host_s(said):
    ours, shared = logging.getLogger("diffusers_adjoint.some"), list(logging.getLogger("diffusers").handlers)
    for handler in shared:
        ours.addHandler(handler)
    with said_once():
        for _ in range(2):
            ours.warning("ours")
    for handler in shared:
        ours.removeHandler(handler)
    assert said == ["ours"] * 2


def test_a_training_tells_of_cut_prompts_once(tmp_path, said):
    pipeline = sd3()
    long = " ".join(["a red car by the sea"] * 40)
    trainer = make_trainer(tmp_path, pipeline=pipeline, rows=[long, *PROMPTS[:1]] * 2, eval_dataset=[{"prompt": long}])
    trainer.train()
    cut = [line for line in said if "truncated" in line]
    assert 1 <= len(cut) <= 2  # by CLIP's tokenizers and by T5's, at two places
    trainer.evaluate()
    assert len([line for line in said if "truncated" in line]) == 2 * len(cut)
