"""What users hand over as datasets: each kind trains, or is refused in one sentence."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig
from tiny_pipelines import sd3
from tiny_trainer import PROMPTS, brightness, config, difference, weights
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.data.columns import collate_columns
from diffusers_adjoint.data.given_datasets import require_columns
from diffusers_adjoint.trainer.probe import first_rows

TWO = PROMPTS[:2]


class Plain:
    """A class of the user's own, with the prompts under another name in what may look like a table."""

    column_names = ("text",)

    def __init__(self, prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return {"prompt": self.prompts[index]}


class OfTorch(Plain, TorchDataset):
    pass


def with_transform(prompts):
    return Dataset.from_dict({"text": prompts}).with_transform(lambda batch: {"prompt": batch["text"]})


def set_to_columns(prompts):
    dataset = Dataset.from_dict({"prompt": prompts, "unused": [0] * len(prompts)})
    dataset.set_format("torch", columns=["prompt"])
    return dataset


GOOD = {
    "list": list,
    "tuple": tuple,
    "column": lambda prompts: Dataset.from_dict({"prompt": prompts})["prompt"],
    "list of dicts": lambda prompts: [{"prompt": prompt} for prompt in prompts],
    "with_transform": with_transform,
    "set_format": set_to_columns,
    "torch": OfTorch,
    "own class": Plain,
}


def trainer_of(folder, rows, eval_dataset=None, reward=brightness, **changes):
    args = config(folder, **{"max_steps": 1} | changes)
    return AdjointMatchingTrainer(sd3(), reward, args, rows, eval_dataset=eval_dataset, peft_config=LoraConfig(r=2))


def run(folder, rows):
    trainer = trainer_of(folder, rows, eval_dataset=rows)
    trainer.train()
    return weights(trainer), trainer.evaluate()["eval_reward"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference"), Dataset.from_dict({"prompt": PROMPTS}))


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_every_kind_gives_the_same_run(tmp_path, reference, make):
    trained, reward = run(tmp_path, make(PROMPTS))
    assert difference(trained, reference[0]) == 0.0 and reward == reference[1]


def test_lists_of_several_evaluations(tmp_path):
    trainer = trainer_of(tmp_path, PROMPTS, eval_dataset={"a": TWO, "b": tuple(TWO)})
    metrics = trainer.evaluate()
    assert metrics["eval_a_reward"] == metrics["eval_b_reward"] == trainer.evaluate(TWO)["eval_reward"]
    assert trainer.evaluate("a")["eval_reward"] == metrics["eval_a_reward"]  # by name, as in the host


def splits():
    return DatasetDict(train=Dataset.from_dict({"prompt": TWO}), test=Dataset.from_dict({"prompt": TWO}))


class ByKey(TorchDataset):
    """Rows in a dict: past its end there is no IndexError, and torch asks for none."""

    def __init__(self, rows):
        self.rows = dict(enumerate(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_no_row_past_the_end_is_asked_for(tmp_path):
    rows = ByKey([{"prompt": prompt} for prompt in PROMPTS])
    trainer_of(tmp_path, rows, eval_dataset=rows, probe_base=True).train()
    assert first_rows(rows) == {"prompt": PROMPTS}
    with pytest.raises(ValueError, match="the train_dataset has no row; pass at least one prompt"):
        trainer_of(tmp_path, ByKey([]))


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


KINDS = "from_dict, from_pandas, from_generator or load_dataset"
BAD = {
    "DatasetDict": (
        splits(),
        ValueError,
        "train_dataset is a DatasetDict .*\\['train'\\] or train_dataset\\['test'\\]",
    ),
    "streamed splits": (IterableDatasetDict(train=stream([{"prompt": "a"}])), ValueError, "train_dataset\\['train'\\]"),
    "dict": ({"prompt": TWO}, TypeError, f"train_dataset is of type dict; .*{KINDS}"),
    "table": (pd.DataFrame({"prompt": TWO}), TypeError, f"train_dataset is of type DataFrame; .*{KINDS}"),
    "path": ("prompts.txt", TypeError, f"train_dataset is of type str; .*{KINDS}"),
    "generator": (({"prompt": p} for p in TWO), TypeError, f"train_dataset is of type generator; .*{KINDS}"),
    "set": (set(TWO), TypeError, f"train_dataset is of type set; .*{KINDS}"),
    "number": (3, TypeError, f"train_dataset is of type int; .*{KINDS}"),
    "list of numbers": ([1, 2], TypeError, "item 0 of train_dataset is of type int; .*prompts"),
    "mixed list": (["a cat", {"prompt": "a dog"}], TypeError, "item 1 of train_dataset is of type dict; .*prompts"),
    "ragged list": (
        [{"prompt": "a cat", "target": 1}, {"prompt": "a dog"}],
        ValueError,
        "row with the prompt 'a dog' has the columns \\['prompt'\\] where the first row has \\['prompt', 'target'\\]; give",
    ),
    "list without text": ([{"prompt": "a cat"}, {"prompt": None}], ValueError, "prompt 1 is of type NoneType; pass a string"),
    "empty list": ([], ValueError, "the train_dataset has no row; pass"),
    "a column that is numbered": ([{"text": "a cat", 3: 4}], ValueError, "have columns \\[3, 'text'\\]; add a 'prompt' column"),
    "rows without a column": ([{}], ValueError, "rows of the train_dataset have no column; pass"),
    "transform that drops the prompt": (
        Dataset.from_dict({"prompt": TWO}).with_transform(lambda batch: {"text": batch["prompt"]}),
        ValueError,
        "the rows of the train_dataset have columns \\['text'\\]; add a 'prompt' column",
    ),
    "format without the prompt": (
        Dataset.from_dict({"prompt": TWO, "target": [1, 2]}).with_format("torch", columns=["target"]),
        ValueError,
        "have columns \\['target'\\]; add a 'prompt' column",
    ),
    "rows of pandas": (
        Dataset.from_dict({"prompt": TWO}).with_format("pandas"),
        TypeError,
        "rows of .* type DataFrame; .*dicts",
    ),
    "no rows of torch": (torch.utils.data.TensorDataset(torch.zeros(2)), TypeError, "rows of .* type tuple; pass rows that are"),
}


@pytest.mark.parametrize("given, error, message", BAD.values(), ids=BAD)
def test_other_kinds_are_refused_in_the_constructor(tmp_path, given, error, message):
    with pytest.raises(error, match=f"{message}.*\\.$") as caught:
        trainer_of(tmp_path, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ("prompts.txt", "eval_dataset is of type str"),
        ({"prompt": TWO}, "eval_dataset is a dict with a column 'prompt'; pass datasets.Dataset.from_dict of it"),
        ({"a": TWO, "b": 3}, "eval_dataset\\['b'\\] is of type int"),
        ({"a": None}, "eval_dataset\\['a'\\] is of type NoneType"),
    ],
)
def test_datasets_of_an_evaluation_are_refused_too(tmp_path, given, message):
    with pytest.raises(TypeError, match=f"^{message}.*\\.$"):
        trainer_of(tmp_path, TWO, eval_dataset=given)
    with pytest.raises(TypeError, match=f"^{message}.*\\.$"):
        trainer_of(tmp_path, TWO).evaluate(given)


def test_splits_of_an_evaluation_are_several_evaluations(tmp_path):
    metrics = trainer_of(tmp_path, TWO, eval_dataset=splits()).evaluate()
    assert metrics["eval_train_reward"] == metrics["eval_test_reward"]


def test_an_evaluation_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows of the eval_dataset have columns \['caption'\]; add a 'prompt' column"):
        trainer_of(tmp_path, TWO).evaluate(Dataset.from_dict({"caption": TWO}))


FIRST = {"prompt": "a cat", "target": 1}
RAGGED = {"lacks one": {"prompt": "a dog"}, "has one more": FIRST | {"prompt": "a dog", "more": 2}}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("odd", RAGGED.values(), ids=RAGGED)
def test_a_ragged_stream_ends_before_an_update_of_its_rows(tmp_path, odd, batch):
    """Also where a batch has one row only, which has nothing to be compared with but the rows before."""
    seen = []

    def reward(images, prompts, **columns):
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    rows = stream([FIRST] * 5 + [odd] + [FIRST] * 2)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2 // batch, "per_device_eval_batch_size": batch}
    trainer = trainer_of(tmp_path, rows, reward=reward, max_steps=4, **sizes)
    message = r"^the row with the prompt 'a dog' has the columns .* where the first row has \['prompt', 'target'\]; give .*\.$"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == (2 if batch == 1 else 1)  # the loader fetches, and compares, one batch ahead
    assert "a dog" not in seen
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(rows)


class Rows(TorchDataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(TorchIterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


ODD = {
    "text": ("a dog", TypeError, "the row 'a dog' is of type str; pass rows that are dicts"),
    "nothing": (None, TypeError, "the row None is of type NoneType; pass rows that are dicts"),
    "lines": (np.zeros((2, 1)), TypeError, "the row array\\(.* is of type ndarray; pass rows that are dicts"),
    "no prompt": ({"prompt": None}, ValueError, "the row {'prompt': None} has a prompt of type NoneType; pass a string"),
    "bytes": ({"prompt": b"dog"}, ValueError, "the row {'prompt': b'dog'} has a prompt of type bytes; pass a string"),
    "several": ({"prompt": ["dog"]}, ValueError, "the row {'prompt': \\['dog']} has a prompt of type list; pass a string"),
    "numbered": ({"prompt": "a dog", 3: 4}, ValueError, "the row with the prompt 'a dog' has the columns \\[3, 'prompt']"),
}


@pytest.mark.parametrize("odd, error, message", ODD.values(), ids=ODD)
def test_an_odd_row_is_shown_when_it_is_met(odd, error, message):
    with pytest.raises(error, match=f"^{message}.*\\.$") as caught:
        collate_columns([{"prompt": "a cat"}, odd])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Rows, Stream])
def test_an_odd_row_ends_training_and_evaluation(tmp_path, kind):
    """Alone in its batch, too."""
    message = r"^the row 'a dog' is of type str; pass rows that are dicts, .*\.$"
    rows = kind([{"prompt": "a cat"}] * 2 + ["a dog"])
    trainer = trainer_of(
        tmp_path, rows, max_steps=4, probe_base=False, per_device_train_batch_size=1, gradient_accumulation_steps=1
    )
    with pytest.raises(TypeError, match=message):
        trainer.train()
    with pytest.raises(TypeError, match=message):
        trainer.evaluate(rows)


def test_a_row_without_a_prompt_is_shown():
    with pytest.raises(
        ValueError, match=r"^the row \{'label': 3\} has the columns \['label'\] where the first row has \['class'\]"
    ):
        require_columns({"label": 3}, ["class"])
