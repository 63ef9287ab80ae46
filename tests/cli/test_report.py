"""``fedtune report``: files, checks, exit codes, and what people see."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.report import report
from fedtune.errors import ExitCode
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import Claim, open_ledger
from fedtune.privacy.signing import read_public
from tests.privacy import report_runs as runs

app = typer.Typer()
app.command()(report)


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def envelope(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["schema"], found["command"]) == (1, "report")
    assert found["ok"] is (result.exit_code == 0)
    return found.get("result") or found["error"]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's configuration, where the key is."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        patch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return runs.seeded_run(tmp_path_factory.mktemp("ledger"))


@pytest.fixture
def run(finished: runs.Run, tmp_path: Path) -> Path:
    """A run without a report."""
    return finished.save(tmp_path / "runs" / "folio-seeded")


@pytest.fixture(scope="module")
def made(
    finished: runs.Run, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A run with its report, not to be changed, and what the command said."""
    path = finished.save(tmp_path_factory.mktemp("made") / "folio-seeded")
    return path, command(path)


def test_a_report_is_written_beside_the_run_and_checks_out(
    made: tuple[Path, Result], home: Path
) -> None:
    run, result = made
    assert result.exit_code == 0, result.output
    assert {"report.html", "report.json"} <= {path.name for path in run.iterdir()}
    assert "Not private" in result.stdout
    assert str(run / "report.html") in result.stdout
    assert "DANGER" in result.stderr
    key = home / "fedtune" / "report.pub"
    for name in ("report.html", "report.json"):
        checked = command(run / name, "--verify")
        assert checked.exit_code == 0, checked.output
        assert "unchanged since it was signed" in checked.stdout
        assert "this user's own key" in checked.stdout
        required = envelope(command(run / name, "--verify", "--key", key, "--json"))
        assert required["key_was_required"] is True
        assert required["public_key"] == read_public(key)
        assert required["differential_privacy"] is False


def test_names_of_runs_work_as_elsewhere(run: Path) -> None:
    result = command("folio-seeded", "--folder", run.parent, "-f", "json", "--json")
    found = envelope(result)
    assert found["file"] == str(run / "report.json")
    assert found["format"] == "json"
    assert not (run / "report.html").exists()
    assert envelope(command("nobody", "--folder", run.parent, "--json"))["code"] == 13


@pytest.mark.parametrize("form", ["md", "json", "html"])
def test_a_report_can_go_to_stdout(run: Path, form: str) -> None:
    result = command(run, "--format", form, "--out", "-")
    assert result.exit_code == 0
    start = {"md": "# Privacy report", "json": '{\n "report"', "html": "<!doctype html>"}[form]
    assert result.stdout.startswith(start)
    assert not list(run.glob("report.*"))


def test_a_pdf_goes_into_a_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "paper.pdf"
    assert command(run, "--format", "pdf", "--out", file).exit_code == 0
    assert file.read_bytes().startswith(b"%PDF")
    assert command(run, "--format", "pdf", "--out", "-").exit_code == ExitCode.USAGE
    refused = envelope(command(file, "--verify", "--json"))
    assert refused["name"] == "signature"
    assert "report.json" in refused["hint"]
    monkeypatch.setitem(sys.modules, "typst", None)
    missing = envelope(command(run, "--format", "pdf", "--json"))
    assert "fedtune[pdf]" in missing["hint"]


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_changed_report_is_refused(made: tuple[Path, Result], tmp_path: Path, name: str) -> None:
    data = (made[0] / name).read_bytes()
    epsilon = re.search(rb"0\.\d{3}", data)
    assert epsilon is not None
    file = tmp_path / name
    for changed in (
        data.replace(epsilon.group(), b"0.001", 1), data.replace(b"secure", b"Secure", 1),
        data[:-1], data + b"\n", b"", data.replace(b"client", b"server", 1),
    ):  # fmt: skip
        file.write_bytes(changed)
        result = command(file, "--verify")
        assert result.exit_code == ExitCode.SIGNATURE, result.output
        assert "not the report that was signed" in result.stderr


def test_another_key_is_refused(run: Path, tmp_path: Path, home: Path) -> None:
    others = tmp_path / "others"
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "theirs.html")],
                                env={"XDG_CONFIG_HOME": str(others)})  # fmt: skip
    assert result.exit_code == 0
    assert "made a signing key" in result.stderr
    theirs = command(tmp_path / "theirs.html", "--verify")
    assert theirs.exit_code == 0
    assert "a key that nobody vouches for" in theirs.stdout
    mine = home / "fedtune" / "report.pub"
    assert command(tmp_path / "theirs.html", "--verify", "--key", mine).exit_code == 33
    right = command(tmp_path / "theirs.html", "--verify", "--key", others / "fedtune/report.pub")
    assert right.exit_code == 0
    assert "the key that was asked for" in right.stdout


def test_a_checked_page_gives_its_json(made: tuple[Path, Result], tmp_path: Path) -> None:
    run, _ = made
    file = tmp_path / "report.json"
    assert command(run / "report.html", "--verify", "--out", file).exit_code == 0
    assert file.read_bytes() == (run / "report.json").read_bytes()
    shown = command(run / "report.html", "--verify", "--out", "-")
    assert shown.stdout_bytes == file.read_bytes()


def test_a_run_without_facts_is_refused(run: Path) -> None:
    (run / "privacy_facts.json").unlink()
    error = envelope(command(run, "--json"))
    assert (error["code"], error["name"]) == (13, "run_folder")
    assert "[privacy]" in error["hint"]


def test_a_ledger_that_is_gone_is_said_and_not_made(run: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "privacy_facts.json").read_text())
    facts["ledger"] = str(tmp_path / "gone" / "ledger.db")
    (run / "privacy_facts.json").write_text(json.dumps(facts))
    result = command(run, "--format", "json")
    assert result.exit_code == 0
    assert "the ledger cannot be asked" in result.stderr
    assert not (tmp_path / "gone").exists()


def test_other_jobs_since_are_shown(tmp_path: Path) -> None:
    made = runs.seeded_run(tmp_path)
    live = made.facts.model_copy(update={"ledger": str(tmp_path / "seeded.db")})
    run = runs.Run(live, made.extract, made.ledger).save(tmp_path / "run")
    runs.spend(made.ledger, "since", Unit.EXAMPLE, {"shakespeare/ROMEO": (runs.STEP, 1, 3)})
    assert command(run, "--format", "json").exit_code == 0
    report = json.loads((run / "report.json").read_text())["report"]
    assert [job["job"] for job in report["chapters"][0]["jobs"]] == ["since"]
    assert report["as_of"] != report["facts"]["finished"]


def test_what_a_killed_run_could_not_note_counts(tmp_path: Path) -> None:
    made = runs.seeded_run(tmp_path)
    live = made.facts.model_copy(update={"ledger": str(tmp_path / "seeded.db")})
    run = runs.Run(live, made.extract, made.ledger).save(tmp_path / "run")
    account = made.ledger.account("shakespeare/ROMEO", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    made.ledger.reserve(account, Claim(made.facts.job, 2, 0, runs.STEP, 15))
    result = command(run, "--format", "json")
    assert "they count" in result.stderr
    report = json.loads((run / "report.json").read_text())["report"]
    assert report["chapters"][0]["statement"]["releases"] == 30
    assert report["ledger"]["accounts"][0]["unfinished"] == 15


def test_a_ledger_with_fewer_releases_is_not_believed(tmp_path: Path) -> None:
    made = runs.seeded_run(tmp_path)
    live = made.facts.model_copy(update={"ledger": str(tmp_path / "old.db")})
    run = runs.Run(live, made.extract, made.ledger).save(tmp_path / "run")
    runs.spend(open_ledger(tmp_path / "old.db"), made.facts.job, Unit.EXAMPLE,
               {"shakespeare/ROMEO": (runs.STEP, 1, 14)})  # fmt: skip
    result = command(run, "--format", "json")
    assert "DANGER: the ledger has fewer releases" in result.stderr
    report = json.loads((run / "report.json").read_text())["report"]
    assert report["chapters"][0]["statement"]["releases"] == 15


def test_what_others_wrote_cannot_move_the_cursor(finished: runs.Run, tmp_path: Path) -> None:
    name = "x\x1b[2J\u202e"
    facts = finished.facts.model_copy(update={"name": name, "warnings": (name,)})
    run = runs.Run(facts, finished.extract, finished.ledger).save(tmp_path / "run")
    for result in (command(run), command(run / "report.html", "--verify")):
        assert result.exit_code == 0
        assert "\x1b[2J" not in result.output
        assert "\u202e" not in result.output
