"""A client's way to the body of a cut model: its part, its link, and the noise on it."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fedtune.client.body_link import Caller, Link, LinkSettings, open_link
from fedtune.client.remote import BodyLink, ends, keep_ends, remote_of
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic, write_json
from fedtune.models import Base, load_base, share
from fedtune.privacy.cut_noise import noised
from fedtune.privacy.noise import KeyedNoise
from fedtune.seeds import derive
from fedtune.split.blocks import Cut, cut_of
from fedtune.split.calls import Service
from fedtune.split.parts import ends_digest
from fedtune.split.rows import Rows
from fedtune.wire import Task, pack_tensors

__all__ = ["Across", "Noisy", "open_across"]


@dataclass
class Across:
    """What a process of clients needs to reach the body.

    Attributes
    ----------
    base : Base
        The client's part; every parameter has the name it has in the whole model.
    digest : str
        Of the frozen part: the body's server refuses another model.
    """

    config: Config
    base: Base
    cut: Cut
    digest: str
    target: str | Service
    folder: Path | None = None
    _links: threading.local = field(init=False, default_factory=threading.local)
    _secrets: dict[int, bytes] = field(init=False, default_factory=dict)
    _rounds: dict[int, dict[str, str]] = field(init=False, default_factory=dict)

    def connect(self, model: nn.Module, client: int, task: Task, what: Literal["t", "e"]) -> Link:
        """Point a thread's model to the body, as client number ``client``.

        Parameters
        ----------
        what : {"t", "e"}
            Training or evaluation: begins the names of this task's calls, so that the same
            task gives the same names.

        Raises
        ------
        FedtuneError
            Noised records of this round were released before, from other parameters: they
            would be more releases than the run accounts for.
        """
        config, remote, job = self.config, remote_of(model), task.job
        step = f"{what}{task.round}.{task.attempt}"
        if remote is None:
            raise FedtuneError("this model is whole: nothing to connect", code=ExitCode.MODEL)
        link = self._link(client, job)
        split = config.tuning.split
        remote.link = link
        if split.noise:
            if what == "t":
                self._require_first(client, task)
            secure = not config.privacy.insecure_seeded_noise
            secret = self._secret(client) if secure else _of_seed(config.seed, client)
            remote.link = Noisy(link, split.clip, split.noise, secret, secure=secure)
        once = split.release == "once"
        secret = self._secret(client) if once else b""
        remote.begin(step, secret=secret, fresh=self._prompts())
        return link

    def _link(self, client: int, job: str) -> Link:
        links: dict[tuple[int, str], Link] = getattr(self._links, "all", {})
        self._links.all = links
        if (client, job) not in links:
            engine, split = self.config.engine, self.config.tuning.split
            settings = LinkSettings(
                codec=split.codec, rank=split.rank, release=split.release,
                root=Path(engine.body_root) if engine.body_root else None,
            )  # fmt: skip
            if split.release == "once":
                settings = replace(settings, secret=self._secret(client))
            key = Path(engine.body_key) if engine.body_key else None
            who = Caller(job or "run", f"client-{client}", self.digest, self.cut, key)
            links[client, job] = open_link(self.target, who, settings)
        return links[client, job]

    def _require_first(self, client: int, task: Task) -> None:
        """Write down what a round's records are made from, before the first is sent."""
        digest = hashlib.sha256(pack_tensors(task.tensors) + repr(task.lr).encode()).hexdigest()
        name, most = f"{task.job} {task.round}", self.config.federation.rounds
        home = self.folder / f"{client:06d}" / "cut-rounds.json" if self.folder else None
        if home is not None and client not in self._rounds:
            self._rounds[client] = json.loads(home.read_bytes()) if home.exists() else {}
        known = self._rounds.setdefault(client, {})
        if known.get(name, digest) != digest or not 1 <= task.round <= most:
            raise FedtuneError(
                f"round {task.round} of {most} was answered before, from other parameters",
                hint="begin a new run: what this one sends at the cut is accounted once a round",
                code=ExitCode.PRIVACY,
            )
        known[name] = digest
        if home is not None:
            write_json(home, known)

    def _secret(self, client: int) -> bytes:
        """Return what this client's examples are named and held under; it stays here."""
        if client not in self._secrets:
            home = self.folder / f"{client:06d}" / "cut.key" if self.folder else None
            if home is not None and not home.exists():
                write_atomic(home, secrets.token_bytes(32))
            self._secrets[client] = home.read_bytes() if home else secrets.token_bytes(32)
        return self._secrets[client]

    def _prompts(self) -> int:
        tuning = self.config.tuning
        named = tuning.tokens if tuning.adapter in ("prompt", "sfprompt") else 0
        return int(tuning.options.get("num_virtual_tokens", named))


def open_across(
    config: Config,
    labels: tuple[str, ...],
    service: Callable[[Base, Cut], Service] | None,
    folder: Path | None = None,
) -> Across:
    """Load the client's part of the model and find its body.

    Parameters
    ----------
    service : callable or None
        Makes a body of this process from the whole model, for simulations; None: the
        body is where ``engine.body`` says.
    folder : Path or None
        Where clients keep their own state.
    """
    split, given = config.tuning.split, (config.model, labels, config.seed, config.data.template)
    if service is None:
        if ":" not in config.engine.body:
            raise FedtuneError(
                f"engine.body='{config.engine.body}': no body of a model is served here",
                hint="set engine.body to the HOST:PORT of a server: fedtune body FILE",
                code=ExitCode.CONFIG,
            )
        base = load_base(*given, ends(split.head, split.tail))
        cut = cut_of(base.model, split.head, split.tail)
        digest = ends_digest(base.model, cut)
        return Across(config, base, cut, digest, config.engine.body, folder)
    whole = load_base(*given)
    cut = cut_of(whole.model, split.head, split.tail)
    digest = ends_digest(whole.model, cut)
    target = service(whole, cut)
    part = share(whole.model)
    keep_ends(part, cut)
    return Across(config, replace(whole, model=part), cut, digest, target, folder)


class Noisy:
    """A link that clips and noises what leaves, example by example.

    What is released again is the same release: the noise belongs to a secret and to what it
    is added to (``KeyedNoise``). The gradient goes through the noise as if it were not there.

    Parameters
    ----------
    secret : bytes
        32 bytes that stay with the client, over restarts.
    secure : bool
        False where a seed gave them.
    """

    def __init__(
        self, link: BodyLink, clip: float, z: float, secret: bytes, *, secure: bool = True
    ) -> None:
        self.link = link
        self._clip, self._z = clip, z
        self._secret, self._secure = secret, secure

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        """Send a noised hidden state; see ``BodyLink``."""
        return self.link.forward(self._noised("hidden", hidden, rows), rows, deep, step, grad=grad)

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Send a noised gradient; see ``BodyLink``."""
        sent, returned = self._noised("hidden", hidden, rows), self._noised("gradient", grad, rows)
        return self.link.backward(sent, rows, deep, returned, step)

    def _noised(self, what: str, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        found = torch.zeros_like(values, dtype=torch.float32)
        spans = _within(rows) or [(0, rows.length)] * rows.batch
        for row, (start, end) in enumerate(spans):
            one = values[row : row + 1, start:end].detach().float().cpu().contiguous()
            content = what.encode() + one.numpy().tobytes()
            source = KeyedNoise(self._secret, content, self._secure)
            found[row, start:end] = noised(one, None, self._clip, self._z, source)[0]
        return found

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Refuse: every new token would be one more release of all before it."""
        raise FedtuneError(
            "text is not generated through a cut with noise",
            hint="generate with the adapter on the whole model",
            code=ExitCode.PRIVACY,
        )


def _of_seed(seed: int, client: int) -> bytes:
    """Return a secret that is none, for repeating an experiment."""
    return derive(seed, "insecure-cut", client).to_bytes(32, "little")


def _within(rows: Rows) -> Sequence[tuple[int, int]] | None:
    """Return where the real positions are among the new ones."""
    if rows.spans is None:
        return None
    return [(max(0, a - rows.past), max(0, b - rows.past)) for a, b in rows.spans]
