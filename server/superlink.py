"""The engine of a real federation: Flower's SuperLink as a child that is kept alive.

Nodes reach one public port (gRPC, TLS, node keys). Everything else the SuperLink offers
listens on 127.0.0.1, behind TLS and a secret that only this process and its children know.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.bundle import build_bundle
from fedtune.server.superlink_calls import (
    FINISHED,
    GONE,
    Node,
    cut_off,
    end_run,
    enrol,
    node_of,
    take_task_of,
)
from fedtune.server.superlink_control import Control, Secrets, open_control
from fedtune.server.superlink_place import (
    Place,
    check_certificate,
    check_port,
    free_port,
    loopback_certificate,
    take,
)
from fedtune.server.superlink_process import Child, cut, spawn, tail

__all__ = ["Engine", "Node", "Place", "start_engine"]

_T = TypeVar("_T")
_READY_SECONDS = 60.0
_MOST_DEATHS = 5
_DEATHS_WITHIN = 600.0
_LOOK_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_STUCK_SECONDS = 60.0
_ASK_SECONDS = 120.0
_GRACE = 10.0


@dataclass
class _App:
    """The process that works on one run."""

    folder: Path
    child: Child
    told: bool = False
    stopped: bool = False


@dataclass(eq=False, repr=False)
class Engine:
    """A running SuperLink, the runs on it, and what is done when one of them dies.

    Made by ``start_engine``. Each method may be called from any thread. A method that
    needs the SuperLink while it is away waits until it is back.
    """

    _place: Place
    _watch: Callable[[str], None]
    _bundle: bytes
    _lock_file: int
    _port: int
    _loopback: tuple[Path, Path]
    _secrets: Secrets
    _control: Control
    _superlink: Child | None = None
    _apps: dict[int, _App] = field(default_factory=dict)
    _names: dict[bytes, str] = field(default_factory=dict)
    _deaths: list[float] = field(default_factory=list)
    _told: bool = False
    _looked: float = 0.0
    _silent: float | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> Engine:
        """Return itself; ``close`` at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def join_address(self) -> str:
        """Where the fleet's port listens, as configured."""
        return self._place.address

    # -------------------------------------------------------------- nodes

    def sync(
        self, members: Mapping[str, EllipticCurvePublicKey]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Let exactly ``members`` in; return the names that came, and those that went.

        A node that is no member any more is cut off: its next call is refused, whatever it
        is doing. Its key cannot come back to this server; that is said through ``watch``.

        Raises
        ------
        FedtuneError
            Two names with one key.
        """
        with self._lock:
            wanted = {public_key_to_bytes(key): name for name, key in members.items()}
            if len(wanted) != len(members):
                twice = sorted(set(members) - set(wanted.values()))
                raise FedtuneError(
                    f"the key of {', '.join(twice)} is also another node's",
                    hint="every node needs a key of its own: fedtune keys node",
                    code=ExitCode.SIGNATURE,
                )
            known = {bytes(node.public_key): node for node in self._ask(Control.nodes)}
            added, removed = [], []
            for key, name in wanted.items():
                if key not in known:
                    self._ask(partial(enrol, name=name, key=key))
                    added.append(name)
                elif known[key].status == GONE and key not in self._names:
                    self._watch(
                        f"{name} cannot join: its key was revoked on this server before; "
                        "it needs a new one (fedtune keys node)"
                    )
            for key, node in known.items():
                if key not in wanted and node.status != GONE:
                    self._ask(partial(cut_off, node=node.node_id))
                    removed.append(self._names.get(key, node.name))
            self._names = wanted
            return tuple(added), tuple(removed)

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that may join, by name."""
        with self._lock:
            found = [node for node in self._ask(Control.nodes) if node.status != GONE]
            named = [node_of(node, self._names.get(bytes(node.public_key))) for node in found]
            return tuple(sorted(named, key=lambda node: (node.name, node.node_id)))

    # -------------------------------------------------------------- runs

    def start_run(self, folder: Path) -> int:
        """Start a Flower run whose ServerApp works on ``folder``; return the run's id.

        Raises
        ------
        FedtuneError
            ``ExitCode.RUN_FOLDER``: a ServerApp of this engine works on it already.
        """
        folder = folder.resolve()
        with self._lock:
            if self.app_alive(folder):
                raise FedtuneError(
                    f"run '{folder}' is being worked on",
                    hint="wait for it, or stop it",
                    code=ExitCode.RUN_FOLDER,
                )
            for _ in range(3):
                run = self._ask(lambda c: c.start(self._bundle, {"folder": str(folder)}))
                if (token := self._ask(partial(take_task_of, run=run))) is not None:
                    break
                # A SuperLink that died just then took the token with it.
                self._ask(partial(end_run, run=run))
            else:
                raise FedtuneError(
                    f"the SuperLink does not hand out the task of run {run}",
                    hint=f"see '{self._place.superlink_log}'",
                    code=ExitCode.ENGINE,
                )
            order = {
                "what": "serverapp",
                "address": f"127.0.0.1:{self._port}",
                "root": str(self._loopback[0]),
                "token": token,
            }
            self._apps[run] = _App(folder, self._spawn(order, self._place.serverapp_log))
            return run

    def app_alive(self, folder: Path) -> bool:
        """Say whether a ServerApp's process of this engine works on ``folder``."""
        folder = folder.resolve()
        with self._lock:
            return any(app.child.alive() for app in self._apps.values() if app.folder == folder)

    def run_status(self, run: int) -> tuple[str, str]:
        """Return how a run stands, and why.

        Returns
        -------
        tuple of str
            ``pending``, ``starting``, ``running``, ``finished:completed``,
            ``finished:failed`` or ``finished:stopped``; and the reason of a failure.
        """
        with self._lock:
            app = self._apps.get(run)
            # Looked at first: a process tells Flower how it ended before it ends.
            dead = app is not None and not app.child.alive()
            status = self._ask(lambda control: control.run(run)).status
            if app is not None and app.stopped and status.sub_status != "completed":
                return f"{FINISHED}:stopped", ""
            if status.status == FINISHED:
                return f"{FINISHED}:{status.sub_status}", str(status.details)
            if app is not None and dead:
                return f"{FINISHED}:failed", f"the ServerApp ended with {app.child.ending()}"
            return str(status.status), str(status.details)

    def stop_run(self, run: int, grace: float = _GRACE) -> None:
        """End a run. When this returns, no process works on its folder.

        Parameters
        ----------
        grace : float
            Seconds that the ServerApp may take; it is killed then.
        """
        with self._lock:
            if app := self._apps.get(run):
                app.told = app.stopped = True
                app.child.stop(grace)
            self._ask(partial(end_run, run=run))

    # -------------------------------------------------------------- life

    def tend(self) -> None:
        """Bring back what died, and say so through ``watch``. To be called every second or so.

        Raises
        ------
        FedtuneError
            ``ExitCode.ENGINE``: the SuperLink died more than 5 times in 10 minutes.
        """
        with self._lock:
            cut(self._place.superlink_log)
            cut(self._place.serverapp_log)
            for run, app in self._apps.items():
                if not app.told and not app.child.alive():
                    app.told = True
                    self._watch(f"the ServerApp of run {run} ended with {app.child.ending()}")
            if self._superlink is not None and self._superlink.alive():
                self._look(self._superlink)
            if self._superlink is not None and not self._superlink.alive():
                self._revive(self._superlink)

    def _look(self, superlink: Child) -> None:
        """Kill a SuperLink that lives and has not answered for a minute."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self._control.healthy(_ANSWER_SECONDS):
            self._silent = None
        elif self._silent is None:
            self._silent = now
        elif now - self._silent > _STUCK_SECONDS:
            self._watch("the SuperLink has not answered for a minute: ending it")
            self._silent = None
            superlink.stop(0.0)

    def _revive(self, dead: Child) -> None:
        now = time.monotonic()
        if not self._told:
            self._told = True
            self._deaths = [at for at in self._deaths if now - at < _DEATHS_WITHIN] + [now]
            self._watch(f"the SuperLink ended with {dead.ending()}: starting it again")
        if len(self._deaths) > _MOST_DEATHS:
            raise FedtuneError(
                f"the SuperLink died {len(self._deaths)} times in {_DEATHS_WITHIN / 60:.0f} "
                f"minutes; its last lines:\n{tail(dead.log)}",
                hint=f"see '{dead.log}'; then start the server again: runs go on where they were",
                code=ExitCode.ENGINE,
            )
        # At once after a first death, then 1, 2, 4, 8 seconds after the last.
        if now - self._deaths[-1] < 2 ** (len(self._deaths) - 2) * (len(self._deaths) > 1):
            return
        try:
            self._launch()
        except FedtuneError as error:
            self._told = True
            self._deaths.append(time.monotonic())
            self._watch(str(error))
        else:
            self._watch(f"the SuperLink is back after {time.monotonic() - self._deaths[-1]:.1f} s")

    def _launch(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises
        ------
        FedtuneError
            ``ExitCode.ENGINE``: it did not come up; with its last lines.
        """
        place = self._place
        order = {
            "what": "superlink",
            "address": place.address,
            "ca": str(place.ca),
            "certificate": str(place.certificate),
            "key": str(place.key),
            "most_bytes": place.most_bytes,
            "port": self._port,
            "loopback_certificate": str(self._loopback[0]),
            "loopback_key": str(self._loopback[1]),
            "database": str(place.database),
            "secret": self._secrets.control,
            "task_secret": self._secrets.tasks.hex(),
        }
        self._superlink = child = self._spawn(order, place.superlink_log)
        self._told = False
        try:
            self._until_ready(child)
        except BaseException:
            child.stop(0.0)
            raise

    def _until_ready(self, child: Child) -> None:
        end = time.monotonic() + _READY_SECONDS
        while not self._control.healthy(1.0):
            alive = child.alive()
            if not alive or time.monotonic() > end:
                how = "is not ready" if alive else f"ended with {child.ending()}"
                raise FedtuneError(
                    f"the SuperLink {how}; its last lines:\n{tail(child.log)}",
                    hint=f"see '{child.log}'",
                    code=ExitCode.ENGINE,
                )
            time.sleep(0.05)

    def _forget_runs(self) -> None:
        """Stop runs that an earlier server left unfinished."""
        for run, info in self._ask(Control.runs).items():
            if info.status.status != FINISHED and run not in self._apps:
                self._ask(partial(end_run, run=run))

    def close(self) -> None:
        """End all children; nothing of this engine runs when this returns."""
        with self._lock:
            for app in self._apps.values():
                app.told = True
                app.child.stop(_GRACE)
            if self._superlink is not None:
                # A connection that is open keeps the SuperLink waiting.
                self._control.close()
                self._superlink.stop(_GRACE)
                self._superlink = None
                os.close(self._lock_file)

    def _spawn(self, order: Mapping[str, object], log: Path) -> Child:
        return spawn(order, log, home=self._place.home, lock=self._lock_file)

    def _ask(self, call: Callable[[Control], _T]) -> _T:
        """Ask the SuperLink; when it is away, bring it back and ask again."""
        end = time.monotonic() + _ASK_SECONDS
        while True:
            try:
                return call(self._control)
            except httpx.TransportError as error:
                if self._superlink is None or time.monotonic() > end:
                    raise FedtuneError(
                        f"the SuperLink does not answer: {error}",
                        hint=f"see '{self._place.superlink_log}'",
                        code=ExitCode.ENGINE,
                    ) from error
            self.tend()
            time.sleep(0.2)


def start_engine(
    place: Place, watch: Callable[[str], None], *, bundle: bytes | None = None
) -> Engine:
    """Start the SuperLink and return when it answers.

    Parameters
    ----------
    place : Place
        Its state folder goes on where an earlier server left it; runs that were unfinished
        are stopped in Flower, and their folders can be resumed.
    watch : callable
        Hears in words what happens to the children.
    bundle : bytes, optional
        Another ServerApp than fedtune's own (see ``build_bundle``).

    Raises
    ------
    FedtuneError
        ``ExitCode.ENGINE``: another server in this folder, a port that is taken, a SuperLink
        that does not come up. ``ExitCode.SIGNATURE``: certificates. ``ExitCode.STORAGE``.
    """
    place = _absolute(place)
    check_certificate(place)
    lock = take(place.home)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, lock)
        check_port(place.address)
        port, loopback = free_port(), loopback_certificate(place.home)
        known = Secrets(secrets.token_hex(32), secrets.token_bytes(32))
        control = open_control(port, loopback[0], known)
        undo.callback(control.close)
        engine = Engine(
            place, watch, bundle or build_bundle(), lock, port, loopback, known, control
        )
        engine._launch()
        undo.pop_all()
    try:
        engine._forget_runs()
    except BaseException:
        engine.close()
        raise
    return engine


def _absolute(place: Place) -> Place:
    return Place(
        place.home.resolve(),
        place.address,
        place.ca.resolve(),
        place.certificate.resolve(),
        place.key.resolve(),
        place.most_bytes,
    )
