"""``fedtune keys``: the federation's CA, the server's certificate, nodes, who is enrolled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.out import Out, reporting

if TYPE_CHECKING:
    from fedtune.keys.authority import ServerFacts
    from fedtune.keys.roster import Roster

__all__ = ["keys"]

keys = typer.Typer(
    help="Who is who: the CA, the server's certificate, nodes' keys.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")]
Folder = Annotated[Path, typer.Option("--folder", help="The federation's keys.")]
DEFAULT = Path("keys")


@keys.command("ca")
def ca(
    folder: Folder = DEFAULT,
    name: Annotated[str, typer.Option("--name", help="What people call it.")] = "federation",
    days: Annotated[int, typer.Option("--days", help="How long it is valid.")] = 3650,
    as_json: Json = False,
) -> None:
    """Make a federation: a private CA, and a list of nodes that is empty."""
    with reporting(Out("keys ca", as_json)) as out:
        from fedtune.keys.authority import make_authority

        made = make_authority(folder, name, days)
        out.result(
            {
                "folder": str(folder), "federation": made.federation, "name": made.name,
                "until": _time(made.until), "days_left": made.days_left,
            },
            f"federation {made.federation} ({made.name}), until {made.until:%Y-%m-%d}",
        )  # fmt: skip
        out.say(f"keep {folder / 'ca.key'} secret and in a backup; give {folder / 'ca.pem'} to all")
        out.say(f"next: fedtune keys server HOST{_place(folder)}")


@keys.command("server")
def server(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(metavar="HOST...", help="Names and addresses that nodes will use."),
    ] = None,
    folder: Folder = DEFAULT,
    days: Annotated[int, typer.Option("--days", help="How long it is valid.")] = 825,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Replace the certificate, keep the key; hosts as before."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the server's key and certificate, or renew the certificate."""
    with reporting(Out("keys server", as_json)) as out:
        from fedtune.keys.authority import make_server

        facts = make_server(folder, hosts or [], days, renew=renew)
        out.result(
            {
                "folder": str(folder), "federation": facts.authority.federation,
                "hosts": list(facts.hosts), "until": _time(facts.until),
                "days_left": facts.days_left, "warnings": list(facts.warnings),
            },
            f"{folder / 'server.pem'}: {', '.join(facts.hosts)}, until {facts.until:%Y-%m-%d}",
        )  # fmt: skip
        _warn(out, facts)
        out.say(
            "next: start the server again" if renew
            else f"next: at each node: fedtune keys node NAME; then here: "
            f"fedtune keys enrol NAME.pub{_place(folder)}"
        )  # fmt: skip


@keys.command("node")
def node(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of this node.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where the files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a node's keys, at the node: NAME.key stays there, NAME.pub goes to the CA."""
    with reporting(Out("keys node", as_json)) as out:
        from fedtune.keys.node import (
            check_name,
            fingerprint_of,
            new_identity,
            public_of,
            write_identity,
        )

        path = folder / f"{check_name(name)}.key"
        identity = new_identity(name)
        public = write_identity(path, identity)
        fingerprint = fingerprint_of(public_of(identity))
        out.result(
            {
                "name": name, "key": str(path), "public": str(public),
                "fingerprint": fingerprint,
            },
            f"{name}  {fingerprint}",
        )  # fmt: skip
        out.say(f"{path} is secret and never leaves this machine")
        out.say(
            f"next: send {public} to whoever runs the federation, and compare the fingerprint "
            "by phone; there: fedtune keys enrol " + public.name
        )


@keys.command("enrol")
def enrol(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.pub...", help="From the nodes.")],
    folder: Folder = DEFAULT,
    as_json: Json = False,
) -> None:
    """Let nodes in: all that are named, or none."""
    with reporting(Out("keys enrol", as_json)) as out:
        from fedtune.keys.node import fingerprint_of, read_public
        from fedtune.keys.roster import enrol as enrolled

        publics = [read_public(path) for path in files]
        roster = enrolled(folder, *publics)
        rows = [{"name": one.name, "fingerprint": fingerprint_of(one)} for one in publics]
        out.result(
            _facts(folder, roster) | {"enrolled": rows},
            "\n".join(f"{row['name']}  {row['fingerprint']}" for row in rows),
        )
        out.say("compare the fingerprints with the nodes by phone; if one differs, revoke it")
        out.say(_copy(folder, roster))


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As it is enrolled.")],
    folder: Folder = DEFAULT,
    as_json: Json = False,
) -> None:
    """Lock a node out for good: neither its name nor its keys come back."""
    with reporting(Out("keys revoke", as_json)) as out:
        from fedtune.keys.roster import revoke as revoked

        roster = revoked(folder, name)
        out.result(_facts(folder, roster) | {"revoked": name}, f"{name} is revoked")
        out.say(_copy(folder, roster))


@keys.command("show")
def show(folder: Folder = DEFAULT, as_json: Json = False) -> None:
    """Show the CA, the server's certificate, the nodes, and what is wrong with them."""
    with reporting(Out("keys show", as_json)) as out:
        from fedtune.keys.authority import describe

        found = describe(folder)
        out.result(found, "\n".join(_lines(found)))
        for problem in found["problems"]:
            out.say(f"problem: {problem['error']}")
            out.say(f"   hint: {problem['hint']}")
        for warning in found["warnings"]:
            out.say(f"note: {warning}")


def _lines(found: dict[str, Any]) -> Iterable[str]:
    where = "its key is here" if found["ca_key"] else "its key is kept elsewhere"
    yield f"federation  {found['federation']}"
    yield f"        CA  {found['name']}, {_until(found)}; {where}"
    server = found["server"]
    yield (
        f"    server  {', '.join(server['hosts'])}, {_until(server)}" if server
        else "    server  none: fedtune keys server HOST"
    )  # fmt: skip
    if found["serial"] is None:
        return
    yield f"    roster  serial {found['serial']}, {found['issued']}"
    rows = [(one["name"], "enrolled", one["fingerprint"]) for one in found["nodes"]]
    rows += [(one["name"], "revoked", one["fingerprint"]) for one in found["revoked"]]
    width = max([len(row[0]) for row in rows], default=0)
    if rows:
        yield ""
    for row in rows:
        yield f"{row[0].ljust(width)}  {row[1].ljust(8)}  {row[2]}"
    if not rows:
        yield "     nodes  none: fedtune keys enrol NAME.pub"


def _until(facts: dict[str, Any]) -> str:
    left = facts["days_left"]
    state = f"{left} days left" if left >= 0 else f"EXPIRED {-left} days ago"
    return f"until {facts['until'][:10]} ({state})"


def _facts(folder: Path, roster: Roster) -> dict[str, Any]:
    return {
        "folder": str(folder), "federation": roster.federation, "serial": roster.serial,
        "nodes": len(roster.members),
    }  # fmt: skip


def _copy(folder: Path, roster: Roster) -> str:
    return (
        f"next: when the server is another machine, copy {folder / 'roster'} "
        f"(serial {roster.serial}, {len(roster.members)} nodes) to its keys folder"
    )


def _warn(out: Out, facts: ServerFacts) -> None:
    for warning in facts.warnings:
        out.say(f"note: {warning}")


def _place(folder: Path) -> str:
    return "" if folder == DEFAULT else f" --folder {folder}"


def _time(when: Any) -> str:
    return f"{when:%Y-%m-%dT%H:%M:%SZ}"
