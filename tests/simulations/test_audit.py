"""The inversion audit on tiny models: what goes over the wire, and what is read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from fedtune.adapters import attach
from fedtune.cli.audit import audit as command
from fedtune.client.remote import connect, keep_ends
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import load_base, share
from fedtune.privacy.inversion import invert_causal
from fedtune.privacy.inversion_words import Finding
from fedtune.server.body import Body
from fedtune.simulations.audit import audit
from fedtune.simulations.audit_scene import observe, open_scene
from fedtune.simulations.audit_view import PublicHead, Wire
from fedtune.split.blocks import cut_of, network
from tests import tiny

HARMLESS = 1e-5


def experiment(tmp_path: Path, shared: Path, kind: str, **tuning: Any) -> Config:
    """Return a small experiment: ``kind`` is the model, "bert" with labels."""
    made = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}[kind]
    base = made(tmp_path / kind, shared)
    classify = kind == "bert"
    source = tiny.jsonl(tmp_path / f"{kind}.jsonl", clients=3, rows=8, label=classify)
    tables: dict[str, Any] = {"tuning": {"batch_size": 4, **tuning}}
    if classify:
        tables["model"] = {"task": "classification", "pooling": "mean"}
        tables["data"] = {"kind": "classification", "labels": ["no", "yes"], "pack": True}
    return tiny.settings(source, base, **tables)


def parts(config: Config) -> tuple[torch.nn.Module, torch.nn.Module, PublicHead, Wire, Any]:
    labels = config.data.labels
    base = load_base(config.model, labels, config.seed)
    model = attach(base, config.tuning, config.model.task, config.seed)
    cut = cut_of(model, 1, 0)
    client, far = share(model), share(model)
    keep_ends(client, cut)
    wire = Wire(Body(network(far), cut))
    connect(client, wire)
    return model, client.eval(), PublicHead(model, cut), wire, cut


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("llama", "prompt"), ("llama", "lora"), ("llama", "prefix"), ("gpt2", "prompt"),
     ("bert", "prompt"), ("bert", "lora")],
)  # fmt: skip
def test_the_servers_head_makes_what_the_client_sends(
    tmp_path: Path, shared: Path, kind: str, adapter: str
) -> None:
    config = experiment(tmp_path, shared, kind, adapter=adapter)
    _, client, head, wire, _ = parts(config)
    tokens = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    with torch.no_grad():
        client(input_ids=tokens, attention_mask=mask)
    sent = wire.sent[0][:, -9:]
    # One row after the other: the server rebuilds rows without their padding.
    for row, length in ((0, 9), (1, 6)):
        made = head.states(tokens[row : row + 1, :length])[0]
        assert float((made - sent[row, :length]).abs().max()) < HARMLESS
    # And a head of other weights makes something else.
    head.table = head.table.flip(0)
    assert float((head.states(tokens)[0] - sent[0]).abs().max()) > 100 * HARMLESS


@pytest.mark.parametrize(("kind", "adapter"), [("llama", "prompt"), ("gpt2", "lora")])
def test_candidates_on_keys_and_values_give_what_whole_rows_give(
    tmp_path: Path, shared: Path, kind: str, adapter: str
) -> None:
    config = experiment(tmp_path, shared, kind, adapter=adapter)
    head = parts(config)[2]
    before = torch.randint(500, (3, 5), generator=torch.Generator().manual_seed(1))
    candidates = torch.arange(30).expand(3, -1)
    found = head.after(before, candidates)
    assert head._fast
    assert torch.allclose(found, head._after_slow(before, candidates), atol=HARMLESS)
    assert head.causal()
    assert not parts(experiment(tmp_path / "b", shared, "bert", adapter="lora"))[2].causal()


def test_a_server_with_another_model_reads_nothing(tmp_path: Path, shared: Path) -> None:
    _, client, head, wire, _cut = parts(experiment(tmp_path, shared, "llama", adapter="prompt"))
    other = parts(experiment(tmp_path / "other", shared, "gpt2", adapter="prompt"))[2]
    tokens = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        client(input_ids=tokens, attention_mask=mask)
    sent = wire.sent[0][:, -9:]
    right = invert_causal(head.after, sent, mask.bool(), head.vocabulary)
    wrong = invert_causal(other.after, sent, mask.bool(), other.vocabulary)
    assert torch.equal(right, tokens)
    assert int((wrong == tokens).sum()) <= 1


def test_a_causal_text_is_read_and_much_noise_hides_it(tmp_path: Path, shared: Path) -> None:
    config = experiment(
        tmp_path, shared, "llama", adapter="prompt", epochs=1.5, method="sfprompt",
        split={"head": 1, "tail": 0},
    )  # fmt: skip
    found = audit(config, rows=4, noise=[20.0], steps=2)
    plain, drowned = found.levels
    assert plain.best.rate == 1.0
    assert plain.rows.right == plain.rows.of == 4
    assert plain.tokens["search"].rate == 1.0
    assert plain.best.of == found.tokens > 20
    assert plain.epsilon_record is None
    assert drowned.best.rate < 0.3
    assert drowned.rows.right == 0
    assert drowned.quality["loss"] > 0
    # Two rounds, an example at most twice in each, hidden states and gradients.
    assert found.chance < 0.3
    assert any("not private" in note for note in found.notes)


def test_special_tokens_do_not_count(tmp_path: Path, shared: Path) -> None:
    found = audit(experiment(tmp_path, shared, "llama"), rows=3, noise=[], steps=0, head=0, tail=1)
    plain = found.levels[0]
    assert found.head == 0
    assert plain.best.rate == 1.0
    text = sorted(len(one) for one in tiny.TEXTS)
    assert found.tokens < sum(text[-3:])


@pytest.mark.parametrize("head", [0, 1])
def test_a_classifiers_text_and_labels_are_read(tmp_path: Path, shared: Path, head: int) -> None:
    config = experiment(tmp_path, shared, "bert", adapter="prompt")
    found = audit(config, rows=8, noise=[1.38], steps=2, head=head, tail=0)
    plain, noisy = found.levels
    assert plain.best.rate == 1.0
    assert plain.labels["tail known"].rate == 1.0
    assert set(plain.labels) >= {"by direction", "tail known"}
    assert noisy.epsilon_record == pytest.approx(6.77, rel=0.01)
    assert noisy.best.rate < plain.best.rate


def test_the_same_seed_gives_the_same_audit(tmp_path: Path, shared: Path) -> None:
    config = experiment(tmp_path, shared, "llama", adapter="prompt")

    def once() -> Finding:
        return audit(config, rows=2, noise=[0.02], steps=1, head=1, tail=0)

    assert once() == once()


def test_no_gradient_no_labels(tmp_path: Path, shared: Path) -> None:
    """Only the classifier is tuned: nothing before the body asks for a gradient."""
    config = experiment(
        tmp_path, shared, "bert", adapter="lora", method="sfprompt",
        split={"head": 0, "tail": 1},
    )  # fmt: skip
    found = audit(config, rows=4, noise=[], steps=1)
    assert found.levels[0].labels == {}
    assert any("no gradient is returned" in note for note in found.notes)


def test_a_codec_is_on_the_wire_and_hides_nothing(tmp_path: Path, shared: Path) -> None:
    settings = {"method": "sfprompt", "adapter": "prompt"}
    split = {"head": 1, "tail": 0, "codec": "int8"}
    config = experiment(tmp_path, shared, "llama", split=split, **settings)
    scene = open_scene(config, 2, 0, 0, None, None, 8, print)
    sent = observe(scene).seen
    # At most 255 values in a token: what arrived was rounded to the codec's grid.
    steps = sent[0, 1] / sent[0, 1].abs().max() * 127
    assert float((steps - steps.round()).abs().max()) < 1e-3
    assert audit(config, rows=2, noise=[], steps=0).levels[0].best.rate == 1.0


@pytest.mark.parametrize("noise", [[-0.1], [float("nan")]])
def test_bad_noise_is_refused(tmp_path: Path, shared: Path, noise: list[float]) -> None:
    with pytest.raises(FedtuneError, match="noise=") as refused:
        audit(experiment(tmp_path, shared, "llama"), noise=noise)
    assert refused.value.code is ExitCode.USAGE


def test_a_cut_that_leaves_no_body_is_refused(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(FedtuneError, match="leave nothing of 2 blocks"):
        audit(experiment(tmp_path, shared, "llama"), head=1, tail=1)


# ---------------------------------------------------------------- the command


def run(*words: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def written(tmp_path: Path, shared: Path) -> Path:
    base = tiny.llama(tmp_path / "llama", shared)
    source = tiny.jsonl(tmp_path / "rows.jsonl")
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'schema = 1\n[model]\nbase = "{base}"\n[data]\nsource = "{source}"\nmax_length = 24\n'
        'holdout = 0.2\npack = false\n[tuning]\nadapter = "prompt"\ntokens = 4\n',
        encoding="utf-8",
    )
    return file


def test_the_command_prints_and_writes(tmp_path: Path, shared: Path) -> None:
    file, to = written(tmp_path, shared), tmp_path / "found"
    words = ("--rows", "2", "--noise", "0,0.05", "--steps", "1", "--head", "1", "--tail", "0")
    result = run(str(file), "--attack", "inversion", *words, "--out", str(to))
    assert result.exit_code == 0, result.output
    assert "Without noise the server that runs the body can reconstruct the text: 100 %" in (
        result.stdout
    )
    made = json.loads((to / "inversion.json").read_text(encoding="utf-8"))
    assert [one["z"] for one in made["levels"]] == [0.0, 0.05]
    assert (to / "inversion.png").read_bytes().startswith(b"\x89PNG")
    again = run(str(file), *words, "--out", str(to), "--json")
    envelope = json.loads(again.stdout)
    assert envelope["ok"]
    assert envelope["result"]["levels"] == made["levels"]


def test_the_command_refuses_words_for_numbers(tmp_path: Path, shared: Path) -> None:
    result = run(str(written(tmp_path, shared)), "--noise", "much")
    assert result.exit_code == ExitCode.USAGE
