"""`run.json`: which run a checkpoint is of, and what must and what may differ when it goes on."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import sd3, sd15
from tiny_trainer import PROMPTS, brightness, difference, make_trainer, weights

from diffusers_adjoint.model.fingerprint import base_fingerprint
from diffusers_adjoint.trainer.checkpoint import checkpoint_to_resume, rotate
from diffusers_adjoint.trainer.run_record import RunRecord

SHORT = {"save_strategy": "steps", "save_steps": 1, "num_inference_steps": 3, "num_loss_steps": 1, "learning_rate": 1e-3}
ONE = SHORT | {"max_steps": 1}


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    make_trainer(folder, **ONE).train()
    return folder


@pytest.fixture
def old(written, tmp_path):
    """A folder with one checkpoint."""
    return shutil.copytree(written, tmp_path / "old")


# -------------------------------------------------------------------------------------------------------------- what it says


def test_the_hashes_are_those_of_the_files(written):
    folder = written / "checkpoint-1"
    files = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "run.json"}
    assert record_of(folder)["files"] == files and len(files) == 5


def test_it_holds_no_secret_and_no_path(tmp_path):
    token, secret = "hf_" + "x" * 34, "s3cret-Word"
    sd3().save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out",
        pipeline=type(sd3()).from_pretrained(tmp_path / "base"),
        hub_token=token,
        model_init_kwargs={"token": token, "cache_dir": str(tmp_path)},
        pipeline_kwargs={"max_sequence_length": 8, "negative_prompt": f"{secret} in {tmp_path}"},
        peft_config=LoraConfig(r=2, base_model_name_or_path=str(tmp_path / "base")),
        **ONE,
    )
    trainer.train()
    text = (tmp_path / "out" / "checkpoint-1" / "run.json").read_text()
    assert token not in text and secret not in text and str(tmp_path) not in text and os.sep not in text
    assert record_of(tmp_path / "out" / "checkpoint-1")["settings"]["pipeline_kwargs"]["max_sequence_length"] == 8


def test_what_decides_the_result_is_in_it(written):
    record = record_of(written / "checkpoint-1")
    expected = {
        "reward_scale": 50.0,
        "num_inference_steps": 3,
        "seed": 42,
        "loss_type": "adjoint_matching",
        "rewards": ["brightness"],
    }
    assert record["settings"].items() >= expected.items()
    assert record["settings"]["prompts per update"] == 2
    assert record["adapter"]["lora_alpha"] == 4 and record["adapter"]["r"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{32}", record["run"])


def test_a_run_keeps_its_name_and_another_gets_its_own(old, tmp_path):
    first = record_of(old / "checkpoint-1")["run"]
    make_trainer(old, **SHORT).train(resume_from_checkpoint=True)
    assert record_of(old / "checkpoint-2")["run"] == first
    make_trainer(tmp_path / "new", **ONE).train()
    assert record_of(tmp_path / "new" / "checkpoint-1")["run"] != first


# ------------------------------------------------------------------------------------------------------------------ network


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"lora_alpha": 64}, "lora_alpha 4, now 64"),
        ({"use_rslora": True}, "use_rslora False, now True"),
        ({"alpha_pattern": {"to_q": 8}}, "alpha_pattern {}, now {'to_q': 8}"),
        ({"rank_pattern": {"to_q": 3}}, "rank_pattern {}, now {'to_q': 3}"),
        ({"r": 3}, "r 2, now 3"),
    ],
)
def test_another_adapter_is_refused(old, config, what):
    trainer = make_trainer(old, peft_config=LoraConfig(**{"r": 2, "lora_alpha": 4} | config), **SHORT)
    before = weights(trainer)
    with pytest.raises(ValueError, match="resume with the peft_config it was trained with") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-1 has another adapter ({what})" in str(caught.value)
    assert difference(weights(trainer), before) == 0.0


def test_an_adapter_that_began_otherwise_is_the_same(old, caplog):
    """Neither the start of the weights nor dropout is left when a run goes on."""
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_v", "to_k", "to_q", "to_out.0"])
    assert make_trainer(old, peft_config=config, **SHORT).train(resume_from_checkpoint=True).global_step == 2
    assert "other settings" not in caplog.text


@pytest.mark.parametrize(("lora", "change"), [(True, "dtype"), (False, "weights")])
def test_another_base_is_refused(tmp_path, lora, change):
    make_trainer(tmp_path, lora=lora, **ONE).train()
    pipeline = sd3()
    if change == "weights":
        with torch.no_grad():
            pipeline.transformer.proj_out.weight.mul_(1.001)
    else:
        pipeline.to(torch.bfloat16)
    trainer = make_trainer(tmp_path, pipeline=pipeline, lora=lora, **SHORT)
    with pytest.raises(ValueError, match="trained on a base with other weights or another dtype; resume with the pipeline"):
        trainer.train(resume_from_checkpoint=True)


def test_the_fingerprint_sees_what_it_says():
    network = sd3().transformer
    first = base_fingerprint(network, None)
    assert base_fingerprint(sd3().transformer, None) == first
    for change in (lambda w: w.add_(1e-3), lambda w: w[-1, -1].add_(1.0)):  # everywhere; at the last element, always sampled
        other = sd3().transformer
        with torch.no_grad():
            change(other.proj_out.weight)
        assert base_fingerprint(other, None) != first
    assert base_fingerprint(sd3().transformer.half(), None) != first
    assert base_fingerprint(sd15().unet, None) != first


def test_the_fingerprint_is_of_the_base_alone(tmp_path):
    trainer = make_trainer(tmp_path, **ONE)
    before = base_fingerprint(trainer.denoiser.network, [])
    assert before == base_fingerprint(sd3().transformer, None)  # the adapter is not seen
    trainer.train()
    assert base_fingerprint(trainer.denoiser.network, []) == before


def test_an_adapter_of_the_base_and_its_strength_are_part_of_it():
    def network(strength, scale=1.0):
        found = sd3().transformer
        torch.manual_seed(0)
        found.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), adapter_name="style")
        found.set_adapters(["style"], [strength])
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
        return base_fingerprint(found, ["style"])

    assert network(1.0) == network(1.0)
    assert len({network(1.0), network(0.5), network(1.0, scale=2.0), base_fingerprint(sd3().transformer, [])}) == 4


def test_large_tensors_are_sampled_evenly_to_the_end():
    network = torch.nn.Linear(3000, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    first, seen = base_fingerprint(network, None), 0
    for i in (0, 1, 1500, 2999):
        with torch.no_grad():
            network.weight.zero_()[0, i] = 1.0
        seen += base_fingerprint(network, None) != first
    assert seen >= 2  # the ends, by construction; of the others one in three


# ----------------------------------------------------------------------------------------------------------------- settings


def test_other_settings_are_one_warning(old, caplog):
    def darkness(images, prompts, **columns):
        return -brightness(images, prompts)

    changes = {"reward_scale": 10.0, "seed": 7, "num_inference_steps": 4, "loss_type": "basic_adjoint_matching", "optim": "sgd"}
    with pytest.raises(ValueError, match="SGD cannot load the optimizer's state in .*checkpoint-1; resume with the optim"):
        make_trainer(old, reward=darkness, **SHORT | changes | {"logging_steps": 5}).train(resume_from_checkpoint=True)
    (line,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    for part in (
        "reward_scale 50.0, now 10.0",
        "seed 42, now 7",
        "num_inference_steps 3, now 4",
        "optim adamw_torch_fused, now sgd",
    ):
        assert part in line
    assert "loss_type adjoint_matching, now basic_adjoint_matching" in line
    assert "rewards ['brightness'], now ['darkness']" in line
    # No option is of both objectives but the pairing, which is the chain's to choose in one of them.
    assert "loss_kwargs['pairing'] None, now next" in line and "cap" not in line
    assert "logging" not in line and line.count(" now ") == 7


def test_another_way_to_train_is_in_the_warning(old, caplog):
    make_trainer(old, method="discrete_adjoint", **SHORT | {"num_loss_steps": None}).train(resume_from_checkpoint=True)
    (line,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert "trainer AdjointMatchingTrainer, now RewardBackpropagationTrainer" in line


@pytest.mark.parametrize(("then", "now"), [("paper", None), ("paper", "paper"), ("next", "next"), ("next", "paper")])
def test_an_option_of_an_earlier_version_is_compared_where_it_is_now(old, caplog, then, now):
    folder = old / "checkpoint-1"
    record = RunRecord.read(folder)
    settings = {name: value for name, value in record.settings.items() if name != "loss_kwargs"} | {"adjoint_pairing": then}
    (folder / "run.json").write_bytes(replace(record, settings=settings)._as_json())
    trainer = make_trainer(old, loss_kwargs=None if now is None else {"pairing": now}, **SHORT)
    trainer.train(resume_from_checkpoint=True)
    said = f"loss_kwargs['pairing'] {then}, now {now}" in caplog.text
    assert said == (then != now)


def test_options_left_out_are_those_by_default(old, caplog):
    make_trainer(old, loss_kwargs={"cap": 1.2}, **SHORT).train(resume_from_checkpoint=True)
    assert "other settings" not in caplog.text


def test_an_optimizer_with_other_groups_cannot_go_on(tmp_path):
    trainer = make_trainer(tmp_path, **ONE)
    trainer.optimizer = torch.optim.AdamW([p for p in trainer.denoiser.network.parameters() if p.requires_grad], lr=1e-3)
    trainer.train()
    with pytest.raises(ValueError, match="AdamW cannot load the optimizer's state in .*checkpoint-1; resume with the optim"):
        make_trainer(tmp_path, **SHORT).train(resume_from_checkpoint=True)


def test_the_class_of_a_given_optimizer_counts(old, caplog):
    trainer = make_trainer(old, **SHORT)
    trainer.optimizer = torch.optim.SGD([p for p in trainer.denoiser.network.parameters() if p.requires_grad], lr=1e-3)
    trainer._load_optimizer_and_scheduler = lambda folder: None  # Adam's, of no use to it
    trainer.train(resume_from_checkpoint=True)
    assert "optim adamw_torch_fused, now SGD" in caplog.text
    assert record_of(old / "checkpoint-2")["settings"]["optim"] == "SGD"
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(old / "checkpoint-2"))  # the same trainer, whose optimizer is wrapped by now
    assert "other settings" not in caplog.text


def test_the_same_settings_are_no_warning(old, caplog):
    make_trainer(old, **SHORT | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}).train(
        resume_from_checkpoint=True
    )
    assert "other settings" not in caplog.text


# ------------------------------------------------------------------------------------------------------------ several runs


def test_a_new_run_in_an_old_folder_says_so(old, caplog):
    make_trainer(old, **ONE).train()
    lines = [record.getMessage() for record in caplog.records if "of an earlier run" in record.getMessage()]
    assert len(lines) == 1 and "holds checkpoint-1 of an earlier run, which this new run may overwrite or delete" in lines[0]


def test_true_is_the_run_that_wrote_last(tmp_path, caplog):
    rows = {"rows": PROMPTS + ["a tree", "a lamp"], "per_device_train_batch_size": 1}
    make_trainer(tmp_path, **SHORT | rows | {"max_steps": 3}).train()
    second = make_trainer(tmp_path, **SHORT | rows | {"max_steps": 1})
    second.train()  # checkpoint-1 is now of another run than 2 and 3
    for step in (2, 3):  # as a copy of the folder would date them
        os.utime(tmp_path / f"checkpoint-{step}")
    caplog.clear()
    again = make_trainer(tmp_path, **SHORT | rows | {"max_steps": 1})
    assert again.train(resume_from_checkpoint=True).global_step == 1
    assert difference(weights(second), weights(again)) == 0.0
    assert f"checkpoint-2, checkpoint-3 in {tmp_path} are of other runs than checkpoint-1 and are skipped." in caplog.text


def test_a_clock_that_was_set_back_makes_no_checkpoint_old(tmp_path, monkeypatch):
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda now=time.time: now() + 1e6)
        make_trainer(tmp_path, **ONE).train()
    make_trainer(tmp_path, **SHORT | {"max_steps": 3, "save_total_limit": 2, "rows": PROMPTS * 2}).train(
        resume_from_checkpoint=True
    )
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint_to_resume(True, tmp_path, ["optimizer.pt"]) == str(tmp_path / "checkpoint-3")


def test_the_record_says_which_is_the_oldest(tmp_path):
    make_trainer(tmp_path, **SHORT | {"max_steps": 3, "rows": PROMPTS * 2}).train()
    for second, step in enumerate((3, 2, 1)):
        os.utime(tmp_path / f"checkpoint-{step}", (second, second))
    rotate(tmp_path, 2, tmp_path / "checkpoint-3", None)
    assert not (tmp_path / "checkpoint-1").exists() and (tmp_path / "checkpoint-2").is_dir()
    assert checkpoint_to_resume(True, tmp_path, ["optimizer.pt"]) == str(tmp_path / "checkpoint-3")
