"""The script that makes ``fedtune:tiny``: two steps of it, and everything it refuses."""

import json
import logging
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.data import stdlib
from fedtune.simulations import pretrain_tiny

SMALL = ["--hidden=32", "--layers=1", "--vocab=300", "--context=16", "--batch=4", "--warmup=1"]
TWO_STEPS = ["--steps=2", "--eval-every=1", *SMALL]
ODD = ["", " a  b\t\r\n\x0c\x00", "don't , stop .", "naïve → 漢字 \U0001f40d", "\u2028 \ufeff x"]


def _row(split: str, module: str) -> dict[str, str]:
    text = "".join(f"def {module}_{n}(x):\n    return x + {n}\n" for n in range(20))
    return {"split": split, "client": module, "module": module, "text": text + "# §\u2028\n"}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    private = [pretrain_tiny.digest("a private text")]
    meta = {"split": "meta", "python": "3.11.7", "private_sha256": private}
    return [meta, _row("train", "abc"), _row("train", "bisect"), _row("heldout", "cmd")]


@pytest.fixture
def data(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    return _write(rows, tmp_path)


def _write(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "public.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what transformers logs at warning level or above; it does not propagate."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: found.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    return found


def _train(data: Path, out: Path, *options: str) -> None:
    pretrain_tiny.main([f"--data={data}", f"--out={out}", *TWO_STEPS, *options])


def test_the_output_loads_without_a_warning(data: Path, tmp_path: Path, logged: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "tiny"
    _train(data, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert logged == []
    assert model.dtype in {torch.float16, torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    for text in ODD:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_figures_and_card_agree_with_the_files(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    _train(data, out)
    figures = json.loads((out / "training.json").read_text("utf-8"))
    card = (out / "README.md").read_text("utf-8")
    assert figures["model_bytes"] == (out / "model.safetensors").stat().st_size
    assert f"{figures['model_bytes']:,} bytes" in card
    assert f"{figures['loss_per_token']:.4f} nats per token" in card
    assert (figures["train_files"], figures["heldout_files"]) == (2, 1)
    assert [entry["step"] for entry in figures["history"]] == [1, 2]
    assert figures["last"]["tokens"] == 2 * 4 * 16
    assert figures["best"]["heldout_loss"] == min(
        entry["heldout_loss"] for entry in figures["history"]
    )
    assert figures["loss_per_token"] == pytest.approx(figures["best"]["heldout_loss"], rel=1e-2)
    assert str(tmp_path) not in card + json.dumps(figures)


def test_the_seed_decides_everything(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _train(data, tmp_path / name, f"--seed={seed}")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_training_stops_when_the_heldout_loss_no_longer_falls(data: Path, tmp_path: Path) -> None:
    # A rate this high makes the loss grow after the first steps.
    _train(data, tmp_path / "tiny", "--steps=40", "--lr=3", "--patience=2")
    figures = json.loads((tmp_path / "tiny" / "training.json").read_text("utf-8"))
    assert figures["last"]["step"] == figures["best"]["step"] + 2 < 40


def test_it_runs_as_a_plain_file_without_fedtune(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fedtune", None)
    monkeypatch.setitem(sys.modules, "fedtune.data", None)
    script = runpy.run_path(str(pretrain_tiny.__file__))
    script["main"]([f"--data={data}", f"--out={tmp_path / 'tiny'}", *TWO_STEPS])
    assert (tmp_path / "tiny" / "model.safetensors").is_file()


def test_every_block_is_new_text_within_an_epoch() -> None:
    ids = torch.arange(101)
    stream = pretrain_tiny.batches(ids, context=10, size=3, seed=0)
    first_epoch = torch.cat([next(stream) for _ in range(3)])
    assert torch.equal(first_epoch[:, 1:], first_epoch[:, :-1] + 1)
    assert len(set(first_epoch[:, :-1].flatten().tolist())) == 90


def test_the_heldout_loss_counts_every_token_once() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model, ids = LlamaForCausalLM(config), torch.arange(40) % 7
    with torch.no_grad():
        expected = model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert pretrain_tiny.heldout_loss(model, ids, 39) == pytest.approx(expected, rel=1e-5)
    # Padding of the last block must not change the mean.
    assert pretrain_tiny.heldout_loss(model, ids, 64) == pytest.approx(expected, rel=1e-5)


def test_too_many_parameters_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"number of parameters is \d+, over the limit 3000000"):
        _train(data, tmp_path / "tiny", "--hidden=320", "--layers=6")
    assert not (tmp_path / "tiny").exists()


def test_too_many_bytes_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_tiny, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"safetensors in bytes is \d+, over the limit 1000"):
        _train(data, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_private_text_is_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[2]["text"] = "a private text"
    with pytest.raises(SystemExit, match=r"private half in \['bisect'\]"):
        _train(_write(rows, tmp_path), tmp_path / "tiny")


@pytest.mark.parametrize("missing", [0, 3])
def test_data_without_a_part_is_refused(
    rows: list[dict[str, Any]], missing: int, tmp_path: Path
) -> None:
    del rows[missing]
    with pytest.raises(SystemExit, match="--export-data"):
        _train(_write(rows, tmp_path), tmp_path / "tiny")


def test_the_export_holds_out_whole_files_and_no_private_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A part of each half is enough, and takes a fraction of the time.
    monkeypatch.setattr(stdlib, "PUBLIC", ("idlelib",))
    monkeypatch.setattr(stdlib, "PRIVATE", ("json", "re"))
    path = tmp_path / "public.jsonl"
    pretrain_tiny.main([f"--export-data={path}"])
    meta, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    modules = {
        split: {row["module"] for row in rows if row["split"] == split}
        for split in ("train", "heldout")
    }
    assert not modules["train"] & modules["heldout"]
    share = len(modules["heldout"]) / len(modules["train"] | modules["heldout"])
    assert share == pytest.approx(0.05, abs=0.01)
    assert {row["client"] for row in rows} <= set(stdlib.PUBLIC)
    private = {pretrain_tiny.digest(row["text"]) for row in stdlib.read_half(stdlib.PRIVATE)}
    assert private == set(meta["private_sha256"])
    assert not private & {pretrain_tiny.digest(row["text"]) for row in rows}


def test_nothing_to_do_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain_tiny.main([])
    assert "--out DIR" in capsys.readouterr().err
