from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.config import DataConfig
from fedtune.data import Encoded, batches, encode, plan_order
from fedtune.data.row import Row, render, template_columns
from fedtune.errors import ExitCode, FedtuneError

LETTERS = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *"abcdefghij"])}


@pytest.fixture(scope="module")
def stories(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "models/stories260K", local_files_only=True)


def letters(*, specials: bool = True, eos: bool = True, bos: bool = False) -> Any:
    """Return a tokenizer of one-letter words, so that tests can count."""
    inner = Tokenizer(models.WordLevel(LETTERS, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        pair = [("[CLS]", 1), ("[SEP]", 2)]
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A" if bos else "[CLS] $A [SEP]", special_tokens=pair
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[SEP]" if eos else None,
        bos_token="[CLS]" if bos else None,
    )


def config(**fields: Any) -> DataConfig:
    return DataConfig(**({"max_length": 8} | fields))


def rows_of(*texts: str) -> list[Row]:
    return [{"text": text} for text in texts]


def lists(arrays: tuple[Any, ...]) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def refused(match: str, rows: list[Row], data: DataConfig, labels: tuple[str, ...] = ()) -> str:
    with pytest.raises(FedtuneError, match=match) as caught:
        encode(rows, letters(), data, labels)
    assert caught.value.code == ExitCode.DATA
    return caught.value.hint


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text("ab \n\u00e9", min_size=1, max_size=60), min_size=1, max_size=12),
    length=st.integers(8, 40),
)
def test_blocks_join_to_the_token_stream(stories: Any, texts: list[str], length: int) -> None:
    encoded = encode(rows_of(*texts), stories, config(max_length=length))
    stream: list[int] = []
    for text in texts:
        if text.strip():
            stream += stories(text, add_special_tokens=False)["input_ids"]
            stream.append(stories.eos_token_id)
    joined = list(itertools.chain.from_iterable(lists(encoded.ids)))
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) == (1 if len(stream) % length == 1 else 0)
    assert all(len(block) == length for block in encoded.ids[:-1])
    assert lists(encoded.targets) == lists(encoded.ids)
    assert encoded.truncated == 0
    assert encoded.rows + encoded.dropped == len(texts)


def test_pack_without_end_token() -> None:
    encoded = encode(rows_of("a b", "c"), letters(specials=False, eos=False), config())
    assert lists(encoded.ids) == [[3, 4, 5]]
    assert encoded.ids[0].dtype == np.int32


def test_pack_starts_rows_as_the_tokenizer_does() -> None:
    encoded = encode(rows_of("a b", "c"), letters(bos=True), config())
    assert lists(encoded.ids) == [[1, 3, 4, 2, 1, 5, 2]]


def test_text_by_row() -> None:
    rows = rows_of("a b", "a b c d e f g h i", " ")
    encoded = encode(rows, letters(), config(pack=False))
    assert lists(encoded.ids) == [[3, 4, 2], [3, 4, 5, 6, 7, 8, 9, 10]]
    assert (encoded.rows, encoded.truncated, encoded.dropped) == (2, 1, 1)


def test_text_by_row_drops_single_tokens() -> None:
    encoded = encode(rows_of("a", "a b"), letters(eos=False), config(pack=False))
    assert lists(encoded.ids) == [[3, 4]]
    assert (encoded.rows, encoded.dropped) == (1, 1)


def instruction(q: str, a: str, tokenizer: Any, **fields: Any) -> tuple[list[int], list[int], int]:
    data = config(kind="instruction", prompt="{q}", completion=" {a}", **fields)
    encoded = encode([{"q": q, "a": a}], tokenizer, data)
    return encoded.ids[0].tolist(), encoded.targets[0].tolist(), encoded.truncated


def test_instruction_masks_the_prompt() -> None:
    assert instruction("a b", "c d", letters()) == ([3, 4, 5, 6, 2], [-100, -100, 5, 6, 2], 0)


def test_instruction_cuts_the_prompt_from_the_left() -> None:
    ids, targets, truncated = instruction("a b c d e f g h", "i j", letters())
    assert ids == [6, 7, 8, 9, 10, 11, 12, 2]
    assert targets == [-100] * 5 + [11, 12, 2]
    assert truncated == 1


def test_instruction_keeps_the_start_token() -> None:
    ids, targets, _ = instruction("a b c d e f g h", "i j", letters(bos=True))
    assert ids == [1, 7, 8, 9, 10, 11, 12, 2]
    assert targets == [-100] * 5 + [11, 12, 2]


def test_instruction_cuts_a_long_completion() -> None:
    ids, targets, truncated = instruction("a b", "a b c d e f g h i j", letters())
    assert ids == targets == [3, 4, 5, 6, 7, 8, 9, 10]
    assert truncated == 1


def test_instruction_tokens_are_those_of_the_whole_text(stories: Any) -> None:
    ids, targets, _ = instruction("Once upon", "a time", stories, max_length=64)
    whole = stories("Once upon a time", add_special_tokens=False)["input_ids"]
    asked = stories("Once upon", add_special_tokens=False)["input_ids"]
    assert ids == [*whole, stories.eos_token_id]
    assert targets == [-100] * len(asked) + ids[len(asked) :]


def test_classification() -> None:
    data = config(kind="classification")
    texts = [("a", "no"), ("a b c d e f g h", "yes"), ("b", ""), ("", "no")]
    rows = [{"text": text, "label": label} for text, label in texts]
    encoded = encode(rows, letters(), data, ("yes", "no"))
    assert lists(encoded.ids) == [[1, 3, 2], [1, 3, 4, 5, 6, 7, 8, 2]]
    assert lists(encoded.targets) == [[1], [0]]
    assert (encoded.rows, encoded.truncated, encoded.dropped) == (2, 1, 2)
    hint = refused(
        "the label 'yess' is not one of", [{"text": "a", "label": "yess"}], data, ("yes",)
    )
    assert hint == "did you mean 'yes'?"


def test_no_rows() -> None:
    assert encode([], letters(), config()) == Encoded((), (), 0, 0, 0)
    assert encode(rows_of(" "), letters(), config()) == Encoded((), (), 0, 0, 1)


def test_missing_columns() -> None:
    rows = [{"question": "a", "answer": "b"}]
    refused(
        "data.text='text': there is no column 'text'; the columns are 'question'", rows, config()
    )
    data = config(kind="instruction", prompt="{questoin}", completion="{answer}")
    assert refused("data.prompt: there is no column 'questoin'", rows, data) == (
        "did you mean 'question'?"
    )


def test_render() -> None:
    row = {"a": "{b}", "two words": "2"}
    assert render("{{{a}}} {two words}", row) == "{{b}} 2"
    assert template_columns("{a}{two words}{a}") == ("a", "two words")
    with pytest.raises(FedtuneError, match="there is no column 'c'; the columns are 'a', 'two"):
        render("{c}", row)


name = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@settings(max_examples=40, deadline=None)
@given(
    column=name,
    tail=st.one_of(
        name.map(lambda n: f".{n}"),
        st.one_of(name, st.integers().map(str)).map(lambda n: f"[{n}]"),
        st.sampled_from(["!r", "!s", "!a", ":>10", ":{x}", ".__class__.__mro__[1]"]),
    ),
)
def test_anything_but_a_plain_column_is_refused(column: str, tail: str) -> None:
    with pytest.raises(FedtuneError, match=r"is refused; only plain {column} is allowed"):
        render("Say {" + column + tail + "}", {column: "x", "x": "1"})


@pytest.mark.parametrize(
    ("template", "match"),
    [("{", "is not a template"), ("a}", "is not a template"), ("{}", "is refused")],
)
def test_broken_templates(template: str, match: str) -> None:
    with pytest.raises(FedtuneError, match=match) as caught:
        template_columns(template, "data.prompt")
    assert "data.prompt" in str(caught.value)
    assert "{{" in caught.value.hint


def encoded_of(*examples: list[int], targets: list[list[int]] | None = None) -> Encoded:
    ids = tuple(np.asarray(example, dtype=np.int32) for example in examples)
    ends = ids if targets is None else tuple(np.asarray(t, dtype=np.int32) for t in targets)
    return Encoded(ids, ends, len(ids), 0, 0)


def test_batches_pad_on_the_right() -> None:
    encoded = encoded_of([5, 6], [7, 8, 9], [4, 4])
    first, second = batches(encoded, np.asarray([2, 1, 0]), 2, 3, "causal-lm")
    assert all(tensor.dtype == torch.int64 for tensor in first.values())
    assert first["input_ids"].tolist() == [[4, 4, 3], [7, 8, 9]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert first["labels"].tolist() == [[4, 4, -100], [7, 8, 9]]
    assert second["input_ids"].tolist() == [[5, 6]]


def test_batches_of_classes() -> None:
    encoded = encoded_of([5, 6], [7], targets=[[1], [0]])
    (batch,) = batches(encoded, [1, 0], 4, 0, "classification")
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64
    assert list(batches(encoded, [], 4, 0, "classification")) == []


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 50), passes=st.floats(0.01, 4), seed=st.integers(0, 2**63 - 1))
def test_plan_order(n: int, passes: float, seed: int) -> None:
    order = plan_order(n, passes, seed)
    assert order.dtype == np.int64
    assert len(order) == max(1, round(n * passes))
    counts = Counter(order.tolist())
    assert set(counts) <= set(range(n))
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(n)) <= 1
    assert np.array_equal(order, plan_order(n, passes, seed))


def test_plan_order_edges() -> None:
    assert len(plan_order(0, 1.0, 0)) == 0
    assert not np.array_equal(plan_order(50, 1.0, 0), plan_order(50, 1.0, 1))
    for passes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FedtuneError, match="passes="):
            plan_order(3, passes, 0)


def test_nothing_touches_the_global_generators() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoded = encode(rows_of("a b c", "d e"), letters(), config())
    list(batches(encoded, plan_order(len(encoded.ids), 2.5, 0), 2, 0, "causal-lm"))
    assert torch.equal(before, torch.get_rng_state())
