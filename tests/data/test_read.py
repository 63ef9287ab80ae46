from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.config import DataConfig
from fedtune.data.read import read_rows, read_table
from fedtune.errors import ExitCode, FedtuneError

ROWS = [{"client": "a", "text": "one"}, {"client": "b", "text": "two, three"}]


def config(**fields: Any) -> DataConfig:
    return DataConfig(**fields)


def put(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(match: str, source: str, **fields: Any) -> FedtuneError:
    with pytest.raises(FedtuneError, match=match) as caught:
        read_rows(config(**fields), source)
    assert caught.value.code == ExitCode.DATA
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    assert read_rows(config(), put(tmp_path, name, lines(ROWS) + "\n")) == ROWS


def test_json_list(tmp_path: Path) -> None:
    assert read_rows(config(), put(tmp_path, "a.json", json.dumps(ROWS, indent=1))) == ROWS


def test_values_become_text(tmp_path: Path) -> None:
    row = {"a": None, "b": 7, "c": 0.5, "d": True, "e": ["x", 1], "f": "007"}
    found = read_rows(config(), put(tmp_path, "a.jsonl", lines([row, {"g": "2020-01-01"}])))
    assert found[0] == {
        "a": "", "b": "7", "c": "0.5", "d": "true", "e": '["x", 1]', "f": "007", "g": "",
    }  # fmt: skip
    assert found[1] == dict.fromkeys("abcdef", "") | {"g": "2020-01-01"}


def test_csv_keeps_text_as_it_is(tmp_path: Path) -> None:
    source = put(tmp_path, "a.csv", '\ufeffid,text\n007,"a ""b"",\nc"\n\n1e3,NaN\n')
    assert read_rows(config(), source) == [
        {"id": "007", "text": 'a "b",\nc'},
        {"id": "1e3", "text": "NaN"},
    ]


def test_csv_long_field(tmp_path: Path) -> None:
    source = put(tmp_path, "a.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(read_rows(config(), source)[0]["text"]) == 300_000


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([*ROWS, {"client": None}]), tmp_path / "a.parquet")
    found = read_rows(config(), str(tmp_path / "a.parquet"))
    assert found == [*ROWS, {"client": "", "text": ""}]


def test_text_rows(tmp_path: Path) -> None:
    source = put(tmp_path, "a.txt", "one\r\n\r\n  \r\n two\r\n")
    assert read_rows(config(), source) == [{"text": "one"}, {"text": " two"}]
    assert read_rows(config(separator=""), source) == [{"text": "one\n\n  \n two"}]
    assert read_rows(config(separator="\r\n  \r\n"), source) == [{"text": "one"}, {"text": " two"}]


def test_pattern_drops_and_counts(tmp_path: Path) -> None:
    source = put(tmp_path, "a.txt", "1 good\nbad\n0 so so\n")
    table = read_table(config(pattern=r"(?P<label>\d) (?P<text>.+)(?P<more>!)?"), source)
    assert table.rows[1] == {"label": "0", "text": "so so", "more": ""}
    assert table.notes == ("1 of 3 rows do not match data.pattern and were left out",)


def test_pattern_refused(tmp_path: Path) -> None:
    source = put(tmp_path, "a.txt", "one\ntwo\n")
    refused(r"matches none of the 2 rows", source, pattern=r"(?P<text>\d)")
    refused(r"data.pattern='\(' is not a regular expression", source, pattern="(")
    refused(r"data.pattern='\.\+' has no named group", source, pattern=".+")


def test_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.csv", "README.md"):
        put(tmp_path, name, lines([{"text": name}]))
    assert read_rows(config(), str(tmp_path)) == [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    put(tmp_path, "c.csv", "text\nx\n")
    refused("several formats: csv, jsonl", str(tmp_path))
    assert read_rows(config(format="csv"), str(tmp_path)) == [{"text": "x"}]
    refused("holds no parquet file", str(tmp_path), format="parquet")


def test_format_wins_over_extension(tmp_path: Path) -> None:
    source = put(tmp_path, "set.train", "one\n")
    refused("the extension '.train' is unknown; known are .csv, .json", source)
    assert read_rows(config(format="text"), source) == [{"text": "one"}]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", lines(ROWS))
    error = refused("train.json' does not exist", str(tmp_path / "train.json"))
    assert error.hint == "did you mean 'train.jsonl'?"
    assert "data.source" in refused("does not exist", str(tmp_path / "no" / "where")).hint


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: a JSON object is needed, not list"),
        ("a.json", '[{"a": 1},\n 5]', "item 2: a JSON object is needed, not int"),
        ("a.json", '[{"a": 1},\n{]', "line 2: not JSON"),
        ("a.jsonl", '{"a": "\\ud800"}', "line 1: 'a' holds half of a surrogate pair"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1: not"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "line 1: not usable JSON"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", 'a,b\n"1"x,2\n', "a.csv, line 2: not CSV"),
        ("a.csv", "a,b,a\n", "line 1: the header repeats 'a'"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.txt", " \n\n", "holds no rows"),
        ("a.jsonl", "", "holds no rows"),
        ("a.parquet", "PAR?", "cannot be read as parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, match: str) -> None:
    refused(match, put(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_undecodable(tmp_path: Path, name: str) -> None:
    source = put(tmp_path, name, '{"a":\n"caf\xe9"}\n'.encode("latin-1"))
    error = refused("line 2: byte 0xe9 is not utf-8", source)
    assert "data.encoding" in error.hint
    refused("data.encoding='utf-9' is not a known", source, encoding="utf-9")
    refused("data.encoding='rot13' is not a known", source, encoding="rot13")


def test_encoding(tmp_path: Path) -> None:
    source = put(tmp_path, "a.txt", "caf\xe9".encode("latin-1"))
    assert read_rows(config(encoding="latin-1"), source) == [{"text": "caf\xe9"}]


def test_bytes_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"b": [b"ok", b"\xff"]}), tmp_path / "a.parquet")
    refused("column 'b', line 1: byte 0xff is not utf-8", str(tmp_path / "a.parquet"))


def saved(folder: Path) -> str:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["x", "y", "z"], "label": [1, 0, -1]}
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=train, test=train.select([1])).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("kind", ["auto", "datasets"])
def test_saved_data_set(tmp_path: Path, kind: str) -> None:
    source = saved(tmp_path / "set")
    assert read_rows(config(format=kind), source) == [
        {"text": "x", "label": "pos"},
        {"text": "y", "label": "neg"},
        {"text": "z", "label": ""},
    ]
    assert read_rows(config(format=kind, split="test"), source) == [{"text": "y", "label": "neg"}]
    error = refused("data.split='tset' is not in .*'train', 'test'", source, split="tset")
    assert error.hint == "did you mean 'test'?"


def test_saved_single_split(tmp_path: Path) -> None:
    single = datasets.Dataset.from_dict({"text": ["x"]}, split="test")
    single.save_to_disk(str(tmp_path / "set"))
    source = str(tmp_path / "set")
    assert read_rows(config(split="test"), source) == [{"text": "x"}]
    refused("data.split='train', but .* is the split 'test'", source)


def test_not_a_saved_data_set(tmp_path: Path) -> None:
    refused("is not a saved data set", str(tmp_path), format="datasets")


def test_unknown_embedded_name() -> None:
    refused("data.source='fedtune:stdlip' is unknown", "fedtune:stdlip")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        if name == "gone":
            raise ConnectionError("no such host")
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(config(), "hub:org/name") == [{"text": "x"}]
    assert read_rows(config(split="test"), "hub:org/name:sub") == [{"text": "x"}]
    assert calls == [("org/name", None, "train"), ("org/name", "sub", "test")]
    refused("data.source='hub:gone', split 'train', cannot be loaded: no such host", "hub:gone")
    refused("data.source='hub:' names no data set", "hub:")
    refused("data.format='csv' does not go with data.source='hub:x'", "hub:x", format="csv")


def test_shakespeare(shared: Path) -> None:
    rows = read_rows(
        config(separator="\n\n", pattern=r"(?s)(?P<role>[^\n:]+):\n(?P<text>.+)"),
        str(shared / "data/tinyshakespeare/input.txt"),
    )
    assert len({row["role"] for row in rows}) >= 250
    assert rows[0] == {
        "role": "First Citizen",
        "text": "Before we proceed any further, hear me speak.",
    }


def test_sst2(shared: Path) -> None:
    table = read_table(
        config(format="text", pattern=r"(?P<label>\d) (?P<text>.+)"),
        str(shared / "data/sentence_classification/stsa.binary.train"),
    )
    assert len(table.rows) == 6920
    assert table.notes == ()
    assert {row["label"] for row in table.rows} == {"0", "1"}
