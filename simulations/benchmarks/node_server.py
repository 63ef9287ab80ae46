"""A SuperLink of one's own for a measurement: TLS, node keys, a database file, loopback ports."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

__all__ = ["SuperLink", "bundle", "free_ports", "make_certificates", "offline", "superlink"]

_PATIENCE = 60.0
_QUICK = """
from fedtune.server.fast_link import hold_questions, sweep_seldom
from flwr.superlink.cli.flower_superlink import flower_superlink
hold_questions()
sweep_seldom()
flower_superlink()
"""


def offline(home: Path, **more: str) -> dict[str, str]:
    """Return an environment in which Flower asks nobody on the internet."""
    switches = {
        "FLWR_HOME": str(home),
        # Flower starts its own commands by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return os.environ | switches | more


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback device that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def make_certificates(
    folder: Path, *, days: int = 30, names: tuple[str, ...] = ("localhost", "127.0.0.1")
) -> None:
    """Write ``ca.pem``, ``server.pem`` and ``server.key``: a CA and a server's certificate.

    ``days`` is how long the server's certificate holds from now; below 0 it is over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = dt.datetime.now(dt.UTC)
    authority, key = (
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP384R1()),
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "measurement")])
    start = now - dt.timedelta(days=60)
    ca = (
        x509.CertificateBuilder()
        .subject_name(issuer)
        .issuer_name(issuer)
        .public_key(authority.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(now + dt.timedelta(days=60))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA384())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    server = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_name(one) for one in names]), critical=False)
        .sign(authority, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(server.public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def bundle(files: Mapping[str, str]) -> bytes:
    """Pack an app's files as ``flwr run`` does."""
    return build_fab_from_files({name: text.encode() for name, text in files.items()})[0]


@dataclass
class SuperLink:
    """One SuperLink: its folder, its two ports and its process; ``quick`` with our changes."""

    folder: Path
    isolation: str = "process"
    secure: bool = True
    quick: bool = False
    port: int = 0
    fleet_port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def fleet(self) -> str:
        """Return the address that nodes call."""
        return f"127.0.0.1:{self.fleet_port}"

    @property
    def address(self) -> str:
        """Return the address of the control and the runtime API."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Return the process's number."""
        if self.process is None:
            raise RuntimeError("the SuperLink is not running")
        return self.process.pid

    @property
    def root(self) -> bytes:
        """Return the CA's certificate."""
        return (self.folder / "ca.pem").read_bytes()

    def start(self) -> None:
        """Start the process and wait until both of its ports answer."""
        if not self.port:
            self.port, self.fleet_port = free_ports(2)
        secret = self.folder / "superexec.secret"
        if not secret.exists():
            secret.write_bytes(secrets.token_bytes(32))
            secret.chmod(0o600)
        tls = ["--insecure"]
        if self.secure:
            tls = [
                "--ssl-ca-certfile", str(self.folder / "ca.pem"),
                "--ssl-certfile", str(self.folder / "server.pem"),
                "--ssl-keyfile", str(self.folder / "server.key"),
                "--enable-supernode-auth",
            ]  # fmt: skip
        flower = [str(Path(sys.executable).with_name("flower-superlink"))]
        command = [
            *([sys.executable, "-c", _QUICK] if self.quick else flower),
            *tls,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--fleet-api-address", self.fleet,
            "--database", str(self.folder / "state.db"),
            "--isolation", self.isolation,
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        if self.isolation == "process":
            command += ["--superexec-auth-secret-file", str(secret)]
        with (self.folder / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=offline(self.folder / "flwr"),
                start_new_session=True,
            )
        deadline = time.monotonic() + _PATIENCE
        while not all(_listens(port) for port in (self.port, self.fleet_port)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "superlink.log").read_text(errors="replace")[-2000:]
                self.stop()
                raise RuntimeError(f"the SuperLink did not start:\n{tail}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End the process at once, with all it started."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the process to end, and insist after a while."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def control(self) -> ControlHttpClient:
        """Return a client of the control API."""
        root = self.root if self.secure else None
        return ControlHttpClient.from_server_address(
            self.address, not self.secure, root, interceptors=[]
        )

    def enrol(self, keys: list[ec.EllipticCurvePublicKey]) -> list[int]:
        """Register public keys; return their node ids."""
        client = self.control()
        try:
            return [
                int(
                    client.RegisterNode(
                        RegisterNodeRequest(public_key=public_key_to_bytes(key))
                    ).node_id
                )
                for key in keys
            ]
        finally:
            client.close()

    def run(self, app: bytes) -> int:
        """Start a run of a bundle; return its id."""
        client = self.control()
        try:
            fab = Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)
            return int(client.StartRun(StartRunRequest(fab=fab)).run_id)
        except httpx.HTTPStatusError as error:
            raise RuntimeError(f"the run was refused: {error.response.text[:500]}") from error
        finally:
            client.close()


@contextlib.contextmanager
def superlink(folder: Path, **options: object) -> Iterator[SuperLink]:
    """Start a SuperLink in ``folder`` with new certificates, and stop it after use."""
    make_certificates(folder)
    link = SuperLink(folder, **options)  # type: ignore[arg-type]
    link.start()
    try:
        yield link
    finally:
        link.stop()


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
