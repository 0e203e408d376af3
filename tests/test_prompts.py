"""Files of prompts: what is read, and which line is named when one is no row."""

import json
import socket

import pytest
from datasets import Dataset, load_dataset

from diffusers_adjoint.data.prompts import load_prompts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_file_asks_nobody(tmp_path, monkeypatch, streaming):
    """Also when the Hub may be asked: `datasets` counts the uses of its readers by a request."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    asked = []

    def refused(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "p.parquet")
    texts = {
        "p.txt": "a cat\n",
        "p.csv": "prompt\na cat\n",
        "p.json": '[{"prompt": "a cat"}]',
        "p.jsonl": '{"prompt": "a cat"}\n',
    }
    for name in ["p.parquet", *(write(tmp_path, name, text) for name, text in texts.items())]:
        assert next(iter(load_prompts(str(tmp_path / name), "train", streaming=streaming)))["prompt"].startswith("a cat")
    (tmp_path / "folder").mkdir()
    write(tmp_path, "folder/train.csv", "prompt\na cat\n")
    assert next(iter(load_prompts(str(tmp_path / "folder"), "train", streaming=streaming)))["prompt"] == "a cat"
    assert not asked


def test_a_slice_of_a_file(tmp_path):
    file = write(tmp_path, "p.txt", "a\nb\nc\n")
    assert load_prompts(file, "train[1:]")["prompt"][:] == ["b", "c"]
    with pytest.raises(ValueError, match="split 'test' of dataset_name="):
        load_prompts(file, "test")


ROWS = [{"prompt": "a cat, asleep", "label": 3}, {"prompt": 'a "red" car', "label": 0}]


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def test_every_kind_of_file(tmp_path):
    table = Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "p.parquet")
    files = [
        write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n"),
        write(tmp_path, "p.json", json.dumps(ROWS)),
        write(tmp_path, "p.csv", 'prompt,label\n"a cat, asleep",3\n"a ""red"" car",0\n'),
        str(tmp_path / "p.parquet"),
    ]
    assert [load_prompts(file, "train").to_list() for file in files] == [ROWS] * 4
    text = write(tmp_path, "p.txt", '\ufeffa cat, asleep\r\n\n  \na "red" car')
    assert [row["prompt"] for row in load_prompts(text, "train")] == [row["prompt"] for row in ROWS]


def test_prompts_of_a_csv_are_the_texts_that_are_written(tmp_path):
    """Not numbers, and no line breaks where only Python sees one."""
    file = write(tmp_path, "p.csv", "prompt,label\n1,1\n007,2\na\u2028cat\x0c,3\n")
    assert load_prompts(file, "train")["prompt"][:] == ["1", "007", "a\u2028cat\x0c"]
    assert load_prompts(file, "train")["label"][:] == [1, 2, 3]
    file = write(tmp_path, "n.csv", "prompt\n1\n2\n")
    assert load_prompts(file, "train")["prompt"][:] == ["1", "2"]


def test_a_word_for_nothing_is_a_prompt_too(tmp_path):
    """In other columns it is still nothing, as pandas reads it; blank lines before the header are none of it."""
    words = ["NA", "null", "None", "nan", "caf\u00e9"]
    file = write(tmp_path, "p.csv", "\nprompt,label\n" + "".join(f"{word},{i or 'NA'}\n" for i, word in enumerate(words)))
    for streaming in (True, False, True):  # after it was read whole, a stream knows its columns
        rows = list(load_prompts(file, "train", streaming=streaming))
        assert [row["prompt"] for row in rows] == words
        assert [row["label"] for row in rows] == [None, 1.0, 2.0, 3.0, 4.0]


def test_a_csv_without_prompts_is_read_as_it_is(tmp_path):
    rows = [{"image": "a.png", "label": 3}, {"image": "b.png", "label": 0}]
    assert load_prompts(write(tmp_path, "p.csv", "image,label\na.png,3\nb.png,0\n"), "train").to_list() == rows


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / "a[1]").mkdir()
    for name in ("a[1]/p[2].txt", "a[1]/p2.txt"):
        write(tmp_path, name, name)
    assert load_prompts(str(tmp_path / "a[1]/p[2].txt"), "train")["prompt"][:] == ["a[1]/p[2].txt"]


def test_rows_of_several_lines_in_a_csv_are_counted_by_their_last_line(tmp_path):
    file = write(tmp_path, "p.csv", 'prompt,label\n"two\nlines",1\n\nshort\n')
    with pytest.raises(ValueError, match="^line 5 of p.csv has 1 fields for 2 columns; put text"):
        load_prompts(file, "train")


def test_a_folder_as_a_dataset_of_the_hub_has_splits(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, row in zip(("train", "test"), ROWS, strict=True):
        write(folder, f"{split}.jsonl", json.dumps(row))
    assert load_prompts(str(folder), "test").to_list() == ROWS[1:] == load_dataset(str(folder), split="test").to_list()
    assert next(iter(load_prompts(str(folder), "train", streaming=True))) == ROWS[0]


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl", f"{GOOD}\n\n{{'prompt': 1}}\n", "line 3 of p.jsonl is not JSON "),
        ("p.jsonl", f'{GOOD}\n["a cat"]\n', "line 2 of p.jsonl is of type list; write an object"),
        ("p.jsonl", f'{GOOD}\n{{"prompt": 7}}\n', "line 2 of p.jsonl has a prompt of type int; write a string"),
        ("p.jsonl", f'{GOOD}\n{{"label": 7}}\n', "line 2 of p.jsonl has no prompt; write one there"),
        ("p.jsonl", f'{GOOD}\n{{"prompt": null}}\n', "line 2 of p.jsonl has no prompt; write one there"),
        ("p.jsonl", f'{{"label": 7}}\n{GOOD}\n', "line 2 of p.jsonl has a prompt, but the first row has none"),
        ("p.csv", "prompt,label\na cat, asleep,3\n", "line 2 of p.csv has 3 fields for 2 columns; put text with commas"),
        ("p.csv", "prompt,label\na cat,3\n,4\n", "line 3 of p.csv has no prompt; write one there"),
        ("p.csv", "prompt,label\n,4\n", "line 2 of p.csv has no prompt; write one there"),
        ("p.csv", "prompt,prompt\na,b\n", "line 1 of p.csv names the column 'prompt' twice; name"),
        ("p.csv", "prompt,label\n", "split 'train' of dataset_name='.*p.csv' cannot be read "),
        ("p.json", "[1, 2]", "row 1 of p.json is of type int; write an object"),
        ("p.json", f'[{GOOD}, {{"prompt": 7}}]', "row 2 of p.json has a prompt of type int; write a string"),
        ("p.csv", 'prompt,label\n"a cat,3\n', "line 2 of p.csv is not valid CSV "),
        ("p.txt", b"a cat\n\xff\xfe\n", "line 2 of p.txt is not UTF-8 "),
        ("p.txt", "  \n", "dataset_name='.*p.txt' is empty; write"),
        ("p.doc", "a cat", "dataset_name='.*p.doc' is a file of unknown type; pass"),
        ("p.json", "{x", "split 'train' of dataset_name='.*p.json' cannot be read .*JSON"),
        ("p.parquet", "x", "split 'train' of dataset_name='.*p.parquet' cannot be read "),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_prompts(write(tmp_path, name, content), "train")
    assert str(caught.value).endswith(".")


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist; pass a file"):
        load_prompts(str(tmp_path / "none.txt"), "train")
    with pytest.raises(ValueError, match="dataset_name is missing; pass"):
        load_prompts(None, "train")
