"""``fedtune report``: make a run's privacy report, or check one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedtune.cli.out import Out, reporting
from fedtune.errors import ExitCode, FedtuneError

if TYPE_CHECKING:
    from fedtune.privacy.facts import Facts
    from fedtune.privacy.report_ledger import Extract
    from fedtune.privacy.signing import Signed, Signer

__all__ = ["make", "report", "verify"]

Format = Literal["html", "md", "json", "pdf"]
_LARGEST = 256 * 2**20


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, name or 'latest'; to check: a file.")
    ],
    form: Annotated[Format, typer.Option("--format", "-f", help="html, md, json or pdf.")] = "html",
    check: Annotated[
        bool, typer.Option("--verify", help="Check the signature of a .json or .html report.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="Private key to sign with; with --verify: public key that must have signed.",
        ),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write; '-' is stdout. With --verify: the checked JSON.",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where runs are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")] = False,
) -> None:
    """Make the privacy report of a run, signed; or check one."""
    out = Out("report", as_json)
    with reporting(out):
        if check:
            verify(out, Path(run), key, out_file)
        else:
            make(out, _find(run, folder), form, key, out_file)


def make(out: Out, run: Path, form: Format, key: Path | None, out_file: Path | None) -> None:
    """Write a run's report; without ``out_file`` into the run folder, its JSON beside it."""
    from fedtune.files import write_atomic
    from fedtune.privacy.report import build
    from fedtune.privacy.report_render import as_json, sealed
    from fedtune.privacy.signing import fingerprint, read_signer
    from fedtune.privacy.statement import read_extract, read_facts
    from fedtune.server.run_folder import RunFolder

    if form == "pdf" and out_file == Path("-"):
        raise FedtuneError("a PDF is not for a screen", hint="name a file", code=ExitCode.USAGE)
    facts = read_facts(run / "privacy_facts.json")
    signer = read_signer(key, out.say)
    out.say("accounting for every release ...")
    extract, live = _newest(out, facts, read_extract(run / "ledger.json"))
    made = build(facts, extract, live=live, decisions=RunFolder(run).decisions())
    envelope = sealed(made, signer)
    data = _formats(signer)[form](envelope)
    if out_file == Path("-"):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = out_file or run / f"report.{form}"
    write_atomic(path, data)
    if out_file is None and form != "json":
        write_atomic(run / "report.json", as_json(envelope))
    for note in made.notes:
        out.say(f"{'DANGER' if note.level == 'danger' else 'note'}: {note.text}")
    result = {
        "file": str(path), "format": form, "differential_privacy": made.private,
        "answer": made.answer, "sha256": envelope["signature"]["sha256"],
        "public_key": signer.public, "fingerprint": fingerprint(signer.public),
    }  # fmt: skip
    out.result(result, f"{_clean(made.answer)}\n{path}")


def verify(out: Out, path: Path, key: Path | None, out_file: Path | None) -> None:
    """Check a report's signature, and say what it claims and whose key it is."""
    from fedtune.files import write_atomic
    from fedtune.privacy.report import Report
    from fedtune.privacy.report_render import as_json
    from fedtune.privacy.signing import default_key, fingerprint, read_public

    required = read_public(key) if key is not None else None
    signed = _unsealed(path, required)
    try:
        claimed = Report.model_validate(signed.report)
    except ValueError as error:
        raise FedtuneError(
            f"'{path}' is signed, but is no report that this version of fedtune reads",
            hint="check it with the version that made it",
            code=ExitCode.SIGNATURE,
        ) from error
    own = ""
    with contextlib.suppress(FedtuneError):
        own = read_public(default_key())
    name = fingerprint(signed.public)
    whose = (
        "the key that was asked for" if required
        else "this user's own key" if signed.public == own
        else "a key that nobody vouches for: compare the fingerprint, or give --key"
    )  # fmt: skip
    if out_file is not None:
        data = as_json(_envelope(signed))
        if out_file == Path("-"):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        write_atomic(out_file, data)
    result = {
        "file": str(path), "name": claimed.facts.name, "job": claimed.facts.job,
        "made": claimed.made, "differential_privacy": claimed.private, "answer": claimed.answer,
        "sha256": signed.sha256, "public_key": signed.public, "fingerprint": name,
        "key_was_required": required is not None,
    }  # fmt: skip
    lines = [
        f"unchanged since it was signed: {path}",
        f"key {name}: {whose}",
        f"run {_clean(claimed.facts.name)}, job {_clean(claimed.facts.job)}",
        _clean(claimed.answer),
    ]
    out.result(result, "\n".join(lines))


def _formats(signer: Signer) -> Mapping[str, Callable[[Mapping[str, Any]], bytes]]:
    from fedtune.privacy.report_pdf import as_pdf
    from fedtune.privacy.report_render import as_html, as_json, as_markdown

    return {
        "html": lambda envelope: as_html(envelope, signer),
        "md": as_markdown,
        "json": as_json,
        "pdf": as_pdf,
    }


def _unsealed(path: Path, required: str | None) -> Signed:
    from fedtune.privacy.signing import unseal, unseal_page

    try:
        if path.stat().st_size > _LARGEST:
            raise FedtuneError(f"'{path}' is too large for a report", code=ExitCode.SIGNATURE)
        data = path.read_bytes()
    except OSError as error:
        raise FedtuneError(
            f"'{path}' cannot be read: {error.strerror or error}",
            hint="--verify takes a report: a .json or .html file",
            code=ExitCode.USAGE,
        ) from error
    if data.startswith(b"%PDF") or path.suffix == ".md":
        raise FedtuneError(
            f"'{path}' is not signed itself",
            hint="check the .json or the .html; a PDF has report.json attached",
            code=ExitCode.SIGNATURE,
        )
    open_one = unseal if data.lstrip()[:1] == b"{" else unseal_page
    return open_one(data, required)


def _envelope(signed: Signed) -> dict[str, Any]:
    from fedtune.privacy.signing import ALGORITHM

    return {
        "report": signed.report,
        "signature": {
            "algorithm": ALGORITHM, "public_key": signed.public, "sha256": signed.sha256,
            "value": signed.value,
        },
    }  # fmt: skip


def _newest(out: Out, facts: Facts, left: Extract) -> tuple[Extract, Extract | None]:
    """Return what this job released, and the ledger of now where it can be asked.

    A killed run may have reserved more than it could note: then the ledger counts.
    """
    from fedtune.privacy.ledger import open_ledger
    from fedtune.privacy.report_ledger import Extract, compare

    if not facts.ledger:
        return left, None
    try:
        ledger = open_ledger(facts.ledger, create=False)
        now = Extract.model_validate(ledger.extract(facts.job, compact=True))
    except (FedtuneError, ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        out.say(f"note: budgets are as when the run ended; the ledger cannot be asked: {first}")
        return left, None
    match compare(left, now):
        case "less":
            out.say(
                "DANGER: the ledger has fewer releases of this job than the run noted: it is "
                "another one, or an old copy. The report goes by what the run noted."
            )
            return left, None
        case "more":
            out.say("note: the ledger has releases that the run did not note; they count")
            return now, now
        case _:
            return left, now


def _find(run: str, folder: Path) -> Path:
    from fedtune.server.run_folder import find

    path = Path(run)
    return path if (path / "privacy_facts.json").is_file() else find(run, folder).path


def _clean(text: str) -> str:
    from fedtune.privacy.words import shown

    return shown(text)
