"""``fedtune audit``: what the server of a cut model could read of this experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedtune.cli.out import Out, reporting
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["audit"]


def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (TOML).")],
    attack: Annotated[
        Literal["inversion"], typer.Option("--attack", help="Rebuild texts and labels.")
    ] = "inversion",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to attack.")] = 16,
    length: Annotated[
        int, typer.Option("--length", min=0, help="Language models: tokens of each; 0 is all.")
    ] = 0,
    noise: Annotated[
        str, typer.Option("--noise", help="Multipliers z, such as 0,0.02,0.1; 'auto' is a range.")
    ] = "auto",
    steps: Annotated[
        int, typer.Option("--steps", min=0, help="Tune the model for so many steps first.")
    ] = 100,
    head: Annotated[
        int | None, typer.Option("--head", min=0, help="Blocks before the body.")
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Blocks after it.")] = None,
    clip: Annotated[
        float, typer.Option("--clip", min=0.0, help="Clip norm; 0 is the experiment's or a median.")
    ] = 0.0,
    to: Annotated[Path, typer.Option("--out", help="Where figures and picture go.")] = Path(
        "audit"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")] = False,
) -> None:
    """Attack an experiment as the server of its body could, without noise and with it."""
    with reporting(Out("audit", as_json)) as out:
        from fedtune.configfile import load
        from fedtune.files import write_atomic
        from fedtune.privacy.inversion_picture import draw
        from fedtune.privacy.inversion_words import lines, to_json
        from fedtune.simulations.audit import LEVELS
        from fedtune.simulations.audit import audit as attacked

        levels = LEVELS if noise == "auto" else _levels(noise)
        config = load(file, override or [])
        found = attacked(
            config, rows=rows, length=length, noise=levels, steps=steps, head=head, tail=tail,
            clip=clip, say=out.say,
        )  # fmt: skip
        made = to_json(found)
        to.mkdir(parents=True, exist_ok=True)
        text = json.dumps(made, indent=1, allow_nan=False) + "\n"
        write_atomic(to / f"{attack}.json", text.encode())
        write_atomic(to / f"{attack}.png", draw(found))
        out.result(made | {"folder": str(to)}, "\n".join(lines(found)))
        out.say(f"figures: {to / f'{attack}.json'}; picture: {to / f'{attack}.png'}")


def _levels(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FedtuneError(
            f"--noise {text}", hint="numbers with commas, such as 0,0.02,0.1", code=ExitCode.USAGE
        ) from None
