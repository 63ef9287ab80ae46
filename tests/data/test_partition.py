from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import DataConfig, PartitionConfig
from fedtune.data import Federation, load, load_eval
from fedtune.data.partition import partition
from fedtune.data.row import Row
from fedtune.errors import ExitCode, FedtuneError

INSTRUCTION = {"kind": "instruction", "prompt": "{q}", "completion": " {a}"}


def config(by: str = "column", **fields: Any) -> DataConfig:
    names = set(PartitionConfig.model_fields) & set(fields)
    how = {name: fields.pop(name) for name in names}
    return DataConfig(**fields, partition=PartitionConfig(by=by, **how))


def numbered(n: int, clients: int = 1, labels: int = 2) -> list[Row]:
    return [
        {"client": f"c{i % clients}", "text": f"row {i}", "label": str(i % labels)}
        for i in range(n)
    ]


def texts(federation: Federation) -> list[str]:
    return [row["text"] for shard in federation.shards for row in shard.train + shard.held]


def refused(match: str, rows: list[Row], data: DataConfig) -> FedtuneError:
    with pytest.raises(FedtuneError, match=match) as caught:
        partition(rows, data, 0)
    assert caught.value.code == ExitCode.DATA
    assert caught.value.hint
    return caught.value


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(40, 120),
    clients=st.integers(1, 4),
    how=st.sampled_from(["column", "iid", "dirichlet", "linear", "square", "exponential"]),
    holdout=st.floats(0, 1),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_row_is_lost_or_doubled(
    n: int, clients: int, how: str, holdout: float, alpha: float, seed: int
) -> None:
    by, skew = ("size", how) if how in ("linear", "square", "exponential") else (how, "square")
    data = config(by, skew=skew, clients=clients, alpha=alpha, holdout=holdout, min_rows=1)
    rows = numbered(n, clients, labels=3)
    federation = partition(rows, data, seed)
    assert Counter(texts(federation)) == Counter(row["text"] for row in rows)
    names = [shard.name for shard in federation.shards]
    assert names == sorted(set(names))
    for shard in federation.shards:
        assert shard.train
        assert bool(shard.held) == (holdout > 0 and len(shard.train) + len(shard.held) > 1)
    assert partition(rows, data, seed) == federation


@pytest.mark.parametrize("by", ["column", "iid", "dirichlet", "size"])
def test_seed_decides(by: str) -> None:
    data = config(by, clients=3)
    rows = numbered(90, 3)
    assert partition(rows, data, 1) == partition(rows, data, 1)
    assert partition(rows, data, 1) != partition(rows, data, 2)


def test_same_in_another_process() -> None:
    code = (
        "from fedtune.config import *; from fedtune.data.partition import partition\n"
        "rows = [{'client': f'c{i % 3}', 'text': str(i)} for i in range(60)]\n"
        "print([[r['text'] for r in s.held] for s in partition(rows, DataConfig(), 5).shards])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = [{"client": f"c{i % 3}", "text": str(i)} for i in range(60)]
    shards = partition(rows, DataConfig(), 5).shards
    assert run.stdout.strip() == str([[row["text"] for row in s.held] for s in shards])


def test_iid_is_even_and_named_in_order() -> None:
    federation = partition(numbered(101), config("iid", clients=10, holdout=0.0), 0)
    assert [shard.name for shard in federation.shards] == [f"client-00{i}" for i in range(10)]
    assert {len(shard.train) for shard in federation.shards} == {10, 11}


def test_sizes_grow() -> None:
    federation = partition(numbered(140), config("size", clients=3, holdout=0.0), 0)
    assert [len(shard.train) for shard in federation.shards] == [10, 40, 90]


def test_dirichlet_skew_follows_alpha() -> None:
    def purity(alpha: float) -> float:
        found = partition(numbered(600), config("dirichlet", clients=5, alpha=alpha), 3)
        counts = [Counter(row["label"] for row in shard.train) for shard in found.shards]
        return sum(max(count.values()) for count in counts) / sum(
            map(sum, (c.values() for c in counts))
        )

    assert purity(0.05) > purity(100.0)
    assert purity(100.0) < 0.6


def test_dirichlet_keeps_labels_apart_that_numpy_does_not() -> None:
    rows = [{"text": str(i), "label": "a\0" if i % 2 else "a"} for i in range(40)]
    federation = partition(rows, config("dirichlet", clients=2, min_rows=1), 0)
    assert sorted(texts(federation)) == sorted(row["text"] for row in rows)


def test_split_keeps_order_and_shares() -> None:
    (shard,) = partition(numbered(100), config(holdout=0.25), 0).shards
    numbers = [int(row["text"].split()[1]) for row in shard.train]
    assert len(shard.held) == 25
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("rows", "holdout", "held"), [(1, 0.5, 0), (2, 0.01, 1), (2, 1.0, 1), (5, 1.0, 4), (5, 0.0, 0)]
)
def test_small_clients_keep_a_row_for_training(rows: int, holdout: float, held: int) -> None:
    (shard,) = partition(numbered(rows), config(holdout=holdout, min_rows=1), 0).shards
    assert (len(shard.train), len(shard.held)) == (rows - held, held)


def test_max_rows() -> None:
    federation = partition(numbered(30, 3), config(max_rows=4, holdout=0.5), 0)
    assert [len(s.train) + len(s.held) for s in federation.shards] == [4, 4, 4]
    assert federation.notes == ("18 rows are above data.max_rows=4 and were left out",)


def test_largest_clients_and_small_ones() -> None:
    rows = [{"client": name, "text": "x"} for name in "aaabbbccccd "]
    federation = partition(rows, config(clients=2), 0)
    assert [shard.name for shard in federation.shards] == ["a", "c"]
    assert federation.notes == (
        "1 rows name no client in column 'client' and were left out",
        "1 of 4 clients have fewer than partition.min_rows=2 rows and were left out, with 1 rows",
        "the 2 largest of 3 clients were taken",
    )


def test_client_without_usable_rows_stays() -> None:
    rows = [{"client": name, "text": text} for name in "ab" for text in ("", " \n", name)]
    rows = [row | {"text": "" if row["client"] == "b" else row["text"]} for row in rows]
    federation = partition(rows, config(), 0)
    assert [(s.name, len(s.train), s.held) for s in federation.shards] == [
        ("a", 1, ()),
        ("b", 0, ()),
    ]
    assert federation.notes == (
        "5 rows have no text, completion or label and were left out",
        "1 clients have no usable row: b",
    )


def test_empty_completion_is_unusable() -> None:
    rows = [{"client": "a", "q": "?", "a": answer} for answer in ("yes", "", "no")]
    (shard,) = partition(rows, config(**INSTRUCTION), 0).shards
    assert {row["a"] for row in shard.train + shard.held} == {"yes", "no"}


def test_labels_found_sorted_and_given_kept() -> None:
    rows = [{"client": "a", "text": "x", "label": label} for label in ("b", "a", "", "b")]
    found = partition(rows, config(kind="classification"), 0)
    assert found.labels == ("a", "b")
    assert found.notes[0] == "2 labels found in the data: a, b"
    assert len(texts(found)) == 3
    given_labels = partition(rows, config(kind="classification", labels=("b", "a", "z")), 0)
    assert given_labels.labels == ("b", "a", "z")


def test_unknown_label_is_refused() -> None:
    rows = [{"client": "hospital", "text": "x", "label": label} for label in ("pos", "negg")]
    data = config(kind="classification", labels=("neg", "pos"))
    error = refused(
        "client 'hospital': the label 'negg' is not one of the labels 'neg', 'pos'", rows, data
    )
    assert error.hint == "did you mean 'neg'?"


def test_refusals() -> None:
    rows = numbered(20, 4)
    error = refused(
        "partition.column='clint': there is no column 'clint'; the columns are 'client', 'text'",
        rows,
        config(column="clint"),
    )
    assert error.hint == "did you mean 'client'?"
    refused("data.text='body': there is no column 'body'", rows, config(text="body"))
    refused("data.label='y'", rows, config(kind="classification", label="y"))
    refused("data.prompt: there is no column 'q'", rows, config(**INSTRUCTION))
    refused("with data.label='y'", rows, config("dirichlet", clients=2, label="y"))
    refused("min_rows=9, but the largest of 4 clients has 5 rows", rows, config(min_rows=9))
    refused("partition.clients=21, but there are 20 rows", rows, config("iid", clients=21))
    refused("by='size' cannot divide 20 rows", rows, config("size", clients=10))
    sizes = config("size", clients=800, skew="exponential")
    refused("by='size' cannot divide 900 rows", numbered(900), sizes)
    refused("two or more different labels", numbered(4, labels=1), config(kind="classification"))
    doubled = config(kind="classification", labels=("0", "0"))
    refused(r"data.labels=\['0', '0'\]", rows, doubled)
    blank = [row | {"text": " "} for row in rows]
    refused("no client of the 4 has a usable row", blank, config())
    refused("there are no rows", [], config())


def test_load_adds_the_notes_of_reading(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a:one\na:two\nnothing\n")
    data = config(source=str(tmp_path / "a.txt"), pattern="(?P<client>.):(?P<text>.+)")
    federation = load(data, 0)
    assert [shard.name for shard in federation.shards] == ["a"]
    assert federation.notes == ("1 of 3 rows do not match data.pattern and were left out",)


def test_load_eval(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    path.write_text("text,label\nx,a\n,b\ny,b\nz,\n")
    data = config(kind="classification", eval=str(path))
    assert load_eval(DataConfig(), ()) == ()
    assert [row["text"] for row in load_eval(data, ("a", "b"))] == ["x", "y"]
    with pytest.raises(FedtuneError, match=r"data.eval='.*eval.csv': the label 'a' is not one of"):
        load_eval(data, ("b", "c"))
    with pytest.raises(FedtuneError, match="there is no column 'body'"):
        load_eval(data.model_copy(update={"text": "body"}), ("a", "b"))
    path.write_text("text,label\n,a\n")
    with pytest.raises(FedtuneError, match=r"eval.csv' has no usable row"):
        load_eval(data, ("a", "b"))


def test_sst2_dirichlet(shared: Path) -> None:
    data = config(
        "dirichlet",
        clients=10,
        alpha=0.5,
        min_rows=1,
        kind="classification",
        format="text",
        pattern=r"(?P<label>\d) (?P<text>.+)",
        source=str(shared / "data/sentence_classification/stsa.binary.train"),
    )
    federation = load(data, 0)
    assert federation.labels == ("0", "1")
    assert len(federation.shards) == 10
    assert len(texts(federation)) == 6920


def test_shakespeare_by_role(shared: Path) -> None:
    data = config(
        column="role",
        min_rows=1,
        separator="\n\n",
        pattern=r"(?s)(?P<role>[^\n:]+):\n(?P<text>.+)",
        source=str(shared / "data/tinyshakespeare/input.txt"),
    )
    assert len(load(data, 0).shards) >= 250
