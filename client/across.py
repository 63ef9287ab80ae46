"""A client's way to the body of a cut model: its part, its link, and the noise on it."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fedtune.client.body_link import Caller, Link, LinkSettings, open_link
from fedtune.client.remote import BodyLink, ends, keep_ends, remote_of
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.models import Base, load_base, share
from fedtune.privacy.cut_noise import noised
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import noise_source
from fedtune.split.blocks import Cut, cut_of
from fedtune.split.calls import Service
from fedtune.split.parts import ends_digest
from fedtune.split.rows import Rows, real_of
from fedtune.wire import Task

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
    _reached: set[int] = field(init=False, default_factory=set)
    _token: str = field(init=False, default_factory=lambda: secrets.token_hex(4))

    def connect(self, model: nn.Module, client: int, task: Task, what: Literal["t", "e"]) -> Link:
        """Point a thread's model to the body, as client number ``client``.

        Parameters
        ----------
        what : {"t", "e"}
            Training or evaluation: begins the names of this task's calls.
        """
        config, remote, job = self.config, remote_of(model), task.job
        # A process that begins a round again makes calls of its own.
        step = f"{what}{task.round}.{task.attempt}.{self._token}"
        if remote is None:
            raise FedtuneError("this model is whole: nothing to connect", code=ExitCode.MODEL)
        link = self._link(client, job)
        split = config.tuning.split
        remote.link = link
        if split.noise:
            source = noise_source(config, "cut", client, step)
            remote.link = Noisy(link, split.clip, split.noise, source)
        once = split.release == "once"
        secret = self._secret(client, "names") if once else b""
        remote.begin(step, secret=secret, fresh=self._prompts())
        remote.total = config.privacy.example is not None
        return link

    def reach(self, client: int) -> None:
        """Find out at once whether the body is there and of this model.

        Raises
        ------
        FedtuneError
            It is not, within seconds: better said now than in the first round.
        """
        if client not in self._reached:
            open_link(
                self.target, self._caller(client, "hello"), self._settings(client, 10.0)
            ).close()
            self._reached.add(client)

    def _caller(self, client: int, job: str) -> Caller:
        engine = self.config.engine
        key = Path(engine.body_key) if engine.body_key else None
        return Caller(job or "run", f"client-{client}", self.digest, self.cut, key)

    def _settings(self, client: int, patience: float = 300.0) -> LinkSettings:
        engine, split = self.config.engine, self.config.tuning.split
        settings = LinkSettings(
            codec=split.codec, rank=split.rank, release=split.release, patience=patience,
            root=Path(engine.body_root) if engine.body_root else None,
        )  # fmt: skip
        if split.release == "once":
            settings = replace(settings, secret=self._secret(client, "held"))
        return settings

    def _link(self, client: int, job: str) -> Link:
        links: dict[tuple[int, str], Link] = getattr(self._links, "all", {})
        self._links.all = links
        if (client, job) not in links:
            who = self._caller(client, job)
            links[client, job] = open_link(self.target, who, self._settings(client))
        return links[client, job]

    def _secret(self, client: int, purpose: str) -> bytes:
        """Return 32 bytes of a client's own for one purpose; the others do not follow from it.

        What examples are named under never leaves; what they are held under goes with calls.
        """
        if client not in self._secrets:
            home = self.folder / f"{client:06d}" / "cut.key" if self.folder else None
            if home is not None and not home.exists():
                write_atomic(home, secrets.token_bytes(32))
            found = home.read_bytes() if home else secrets.token_bytes(32)
            if len(found) != 32:
                raise FedtuneError(
                    f"'{home}' has {len(found)} bytes, not 32",
                    hint="remove it: examples are then sent once more",
                    code=ExitCode.STORAGE,
                )
            self._secrets[client] = found
        return hashlib.blake2b(purpose.encode(), digest_size=32, key=self._secrets[client]).digest()

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

    No bound is claimed for it (``privacy.server_view``). A repeated call sends the same
    numbers. The gradient goes through the noise as if it were not there.
    """

    def __init__(self, link: BodyLink, clip: float, z: float, source: NoiseSource) -> None:
        self.link = link
        self._law: tuple[float, float, NoiseSource] = (clip, z, source)
        self._sent: dict[str, torch.Tensor] = {}

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        """Send a noised hidden state; see ``BodyLink``."""
        sent = noised(hidden, real_of(rows), *self._law).to(hidden.device)
        if grad:
            self._sent[step] = sent
        return self.link.forward(sent, rows, deep, step, grad=grad)

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Send a noised gradient; see ``BodyLink``."""
        sent = self._sent.pop(step)
        returned = noised(grad, real_of(rows), *self._law).to(grad.device)
        return self.link.backward(sent, rows, deep, returned, step)

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Refuse: every new token would be one more release of all before it."""
        raise FedtuneError(
            "text is not generated through a cut with noise",
            hint="generate with the adapter on the whole model",
            code=ExitCode.PRIVACY,
        )
