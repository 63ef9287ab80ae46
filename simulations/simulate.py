"""A whole federation on one machine: the same server and client apps, another engine."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtune.client.app import MakeService, make_client_app, worker_for
from fedtune.client.secure import Party
from fedtune.config import Config
from fedtune.configfile import dumps
from fedtune.data import Federation, digest, load
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.privacy.plan import ledger_place, resolve
from fedtune.resources import cores
from fedtune.server.app import Outcome, make_server_app
from fedtune.server.events import Watcher
from fedtune.server.run_folder import RunFolder
from fedtune.simulations.executors import Executor, ProcessExecutor, ThreadExecutor
from fedtune.simulations.grid import LocalGrid
from fedtune.simulations.workshop import in_processes

__all__ = ["simulate"]


def simulate(config: Config, folder: RunFolder, watch: Watcher) -> Federation:
    """Run an experiment to its end, or on from its last committed round.

    Parameters
    ----------
    config : Config
        May differ from the run's own in ``engine`` and ``output`` only.
    folder : RunFolder
        New, or that of a run to go on with.
    watch : callable
        Hears every event.

    Returns
    -------
    Federation
        The clients and the notes about their data.

    Raises
    ------
    FedtuneError
        As the server raised it, or the data is not what the run began with;
        committed rounds are in ``folder``.
    """
    outcome = Outcome()
    config = resolve(config)
    with folder.lock(), _failure_noted(folder):
        config = _with_ledger(config, folder)
        federation = load(config.data, config.seed)
        found = digest(federation)
        _require_same_data(folder, _keyed(found, folder) if config.privacy.on else found)
        parties = _parties(config, federation)
        server = make_server_app(
            config, federation.labels, folder, watch, outcome,
            (lambda: parties.public) if parties else None,
        )  # fmt: skip
        run = {"local": _local, "ray": _ray}[config.engine.kind]
        run(config, server, folder.clients, len(federation.shards), parties)
        outcome.check()
    if not outcome.finished:
        raise FedtuneError(
            "the engine ended before the run did",
            hint="see the messages above; go on with --resume",
            code=ExitCode.ENGINE,
        )
    return federation


@dataclass(frozen=True)
class _Identities:
    """Fresh identities of simulated clients, which all know each other."""

    signers: Mapping[str, Ed25519PrivateKey] = field(repr=False)

    @property
    def public(self) -> dict[str, Ed25519PublicKey]:
        """Return everybody's public key."""
        return {name: key.public_key() for name, key in self.signers.items()}

    def party(self, name: str) -> Party:
        """Return who a client is to the others."""
        return Party(name, self.signers[name], lambda: self.public)


def _parties(config: Config, federation: Federation) -> _Identities | None:
    """Return identities where sums are secure.

    Masks live in memory from one message to the next, so that one process must have them all.
    """
    if config.federation.secure is None:
        return None
    if config.engine.kind == "ray":
        raise FedtuneError(
            "engine.kind='ray' with [federation.secure]: a client's masks must stay in one process",
            hint="use engine.kind='local'", code=ExitCode.ENGINE,
        )  # fmt: skip
    return _Identities({one.name: Ed25519PrivateKey.generate() for one in federation.shards})


def _with_ledger(config: Config, folder: RunFolder) -> Config:
    """Bind a run to the ledger it began with: another one would know nothing of it."""
    if not config.privacy.on:
        return config
    place = folder.status().get("ledger")
    if place is None:
        place = ledger_place(config)
        folder.update_status(ledger=place)
    elif "://" not in place and not Path(place).is_file():
        raise FedtuneError(
            f"the ledger '{place}' of run '{folder.path}' is gone",
            hint="bring it back: without it nobody knows what was spent",
            code=ExitCode.LEDGER,
        )
    privacy = config.privacy.model_copy(update={"ledger": place})
    return config.model_copy(update={"privacy": privacy})


def _keyed(found: str, folder: RunFolder) -> str:
    """Hide a digest of private rows from whoever could try rows; the key stays with clients."""
    file = folder.clients / "digest.key"
    if not file.exists():
        write_atomic(file, secrets.token_bytes(32))
    return hmac.new(file.read_bytes(), found.encode(), hashlib.sha256).hexdigest()


def _require_same_data(folder: RunFolder, found: str) -> None:
    """Refuse to go on with a run on other rows than it began with."""
    before = folder.status().get("data")
    if before is None:
        folder.update_status(data=found)
    elif before != found:
        raise FedtuneError(
            f"the rows behind '{folder.path}' have changed since it began "
            f"({before[:12]}, now {found[:12]})",
            hint="restore the data, or start a new run without --resume",
            code=ExitCode.RESUME_REFUSED,
        )


@contextlib.contextmanager
def _failure_noted(folder: RunFolder) -> Iterator[None]:
    """Write down the failure of a run that did not even begin; it is not running."""
    try:
        yield
    except FedtuneError as error:
        if error.code == ExitCode.RESUME_REFUSED:
            raise
        with contextlib.suppress(FedtuneError):
            folder.update_status(status="failed", reason=str(error))
        raise


def _local(
    config: Config, server: ServerApp, home: Path, clients: int, parties: _Identities | None
) -> None:
    with _body(config) as reached:
        grid = LocalGrid(_executor(reached, home, clients, parties), clients)
        try:
            server(grid, Context(1, 0, {}, RecordDict(), {}))
        finally:
            grid.close()


@contextlib.contextmanager
def _body(config: Config) -> Iterator[Config]:
    """Start the body's own process if the settings ask for one; name its address."""
    if not config.tuning.cut or config.engine.body != "process":
        yield config
        return
    from fedtune.simulations.body_process import start_body

    with tempfile.TemporaryDirectory(prefix="fedtune-") as place:
        file = Path(place) / "experiment.toml"
        file.write_text(dumps(config), encoding="utf-8")
        with start_body(file) as body:
            engine = config.engine.model_copy(update={"body": body.address})
            yield config.model_copy(update={"engine": engine})


def _executor(config: Config, home: Path, clients: int, parties: _Identities | None) -> Executor:
    settings = config.engine
    if parties is not None:
        app = make_client_app(config, home.resolve(), _service(config), parties.party)
        return ThreadExecutor(app, 1)
    workers = min(settings.workers or max(1, cores() // settings.threads), clients)
    make = partial(_client_app, config, home.resolve())
    if in_processes(config):
        return ProcessExecutor(make, workers)
    if workers > 1 and worker_for(config, home.resolve(), _service(config)).has_dropout():
        raise FedtuneError(
            f"engine.executor='threads' with workers={workers} gives other bits every time: "
            f"the model has dropout (tuning.dropout={config.tuning.dropout}, or its own), "
            "and threads share one generator",
            hint="use executor='processes' or workers=1",
            code=ExitCode.ENGINE,
        )
    return ThreadExecutor(make(), workers)


def _client_app(config: Config, home: Path) -> ClientApp:
    """Make the client app; a module-level function, so that workers can import it."""
    return make_client_app(config, home, _service(config))


def _service(config: Config) -> MakeService | None:
    """Return what makes the body in each worker, where none is served elsewhere."""
    if not config.tuning.cut or config.engine.body != "local":
        return None
    from fedtune.simulations.body import local_service

    return local_service


def _ray(
    config: Config, server: ServerApp, home: Path, clients: int, parties: _Identities | None
) -> None:
    """Drive the same apps with Flower's own simulation runtime."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise FedtuneError(
            "engine.kind='ray' needs the optional package ray",
            hint="pip install 'fedtune[ray]', or use engine.kind='local'",
            code=ExitCode.ENGINE,
        ) from error
    from flwr.simulation import run_simulation

    workers = config.engine.workers or cores()
    share = max(1, cores() // workers)
    with _environment(RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1"):
        run_simulation(
            server_app=server,
            client_app=make_client_app(config, home.resolve(), _service(config)),
            num_supernodes=clients,
            backend_config={
                "client_resources": {"num_cpus": share, "num_gpus": 0.0},
                "init_args": {"num_cpus": cores(), "logging_level": 40, "log_to_driver": False},
            },
        )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
