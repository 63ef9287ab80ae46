"""Who may call: signatures, names, clocks, calls made twice, TLS."""

from __future__ import annotations

import datetime as dt
import ipaddress
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.node import (
    line_of,
    new_identity,
    new_key,
    public_line,
    public_of,
    read_enrolled,
    read_key,
    write_identity,
)
from fedtune.server import body_server
from fedtune.server.body_server import Door
from fedtune.split import body_pb2 as pb
from fedtune.split import node_keys
from fedtune.split.calls import PACKAGE, Refused, Status
from fedtune.split.node_keys import Claim, Gate, admit, metadata_of
from tests.split import service_kit as kit

CLAIM = Claim("Forward", "run-1", "ann", "body", kit.DIGEST, b"\1" * 32)


def _gate(folder: Path, **keys: Any) -> Gate:
    lines = [f"{name} {public_line(key)} {name}@somewhere" for name, key in keys.items()]
    (folder / "enrolled").write_text("# who may call\n\n" + "\n".join(lines) + "\n")
    return Gate.at(folder / "enrolled", "body")


def _refused(gate: Gate, metadata: Any, claim: Claim = CLAIM) -> Status:
    with pytest.raises(Refused) as caught:
        admit(gate, metadata, claim)
    return caught.value.status


def _alone(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a key as ssh-keygen does."""
    form = serialization.PrivateFormat.OpenSSH
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path.write_bytes(data)
    path.chmod(0o600)


def test_keys_are_read_from_every_file_that_holds_them(tmp_path: Path) -> None:
    identity = new_identity("ann")
    public = write_identity(tmp_path / "ann.key", identity)
    _alone(tmp_path / "node", identity.login)
    key = public_line(identity.login)
    assert public_line(read_key(tmp_path / "ann.key")) == key
    assert public_line(read_key(tmp_path / "node")) == key
    bob = line_of(public_of(new_identity("bob")))
    lines = ["# who may call", f"eve {key} eve@somewhere", public.read_text().strip(), bob]
    (tmp_path / "enrolled").write_text("\n".join(lines) + "\n")
    found = read_enrolled(tmp_path / "enrolled")
    assert [*found] == ["eve", "ann", "bob"]
    assert public_line(found["ann"]) == public_line(found["eve"]) == key
    assert public_line(found["bob"]) == " ".join(bob.split()[1:3])


def test_other_keys_are_refused(tmp_path: Path) -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    _alone(tmp_path / "small", small)
    _alone(tmp_path / "open", new_key())
    (tmp_path / "open").chmod(0o640)
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    for name in ("small", "text", "missing", "open"):
        with pytest.raises(FedtuneError) as caught:
            read_key(tmp_path / name)
        assert caught.value.code == ExitCode.SIGNATURE
    assert "chmod 600" in caught.value.hint
    line = public_line(new_key())
    for wrong in (f"ann {public_line(small)}", "ann ssh-ed25519 AAAA", f"a {line}\na {line}"):
        (tmp_path / "enrolled").write_text(wrong + "\n")
        with pytest.raises(FedtuneError, match="line"):
            read_enrolled(tmp_path / "enrolled")


def test_a_signed_call_is_let_in_once(tmp_path: Path) -> None:
    key = new_key()
    gate = _gate(tmp_path, ann=key)
    metadata = metadata_of(key, CLAIM)
    admit(gate, metadata, CLAIM)
    assert _refused(gate, metadata) == Status.PERMISSION_DENIED
    admit(gate, metadata_of(key, CLAIM), CLAIM)


@pytest.mark.parametrize("field", ["method", "run", "server", "model", "digest"])
def test_a_signature_is_over_every_field(tmp_path: Path, field: str) -> None:
    key = new_key()
    gate = _gate(tmp_path, ann=key)
    other: Any = b"\2" * 32 if field == "digest" else "another"
    signed = Claim(**{**CLAIM.__dict__, field: other})
    assert _refused(gate, metadata_of(key, signed)) == Status.UNAUTHENTICATED


def test_fields_cannot_run_into_each_other() -> None:
    left, right = Claim("a", "bc", "d", "e", "f", b""), Claim("ab", "c", "d", "e", "f", b"")
    assert left.message("1", "2") != right.message("1", "2")
    assert left.message("12", "3") != left.message("1", "23")


def test_strangers_and_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, bob, eve = new_key(), new_key(), new_key()
    gate = _gate(tmp_path, ann=ann, bob=bob)
    as_eve = Claim(**{**CLAIM.__dict__, "client": "eve"})
    assert _refused(gate, metadata_of(eve, as_eve), as_eve) == Status.PERMISSION_DENIED
    # Ann's name with another's key, and bob's good signature on a call in ann's name.
    assert _refused(gate, metadata_of(eve, CLAIM)) == Status.UNAUTHENTICATED
    as_bob = Claim(**{**CLAIM.__dict__, "client": "bob"})
    assert _refused(gate, metadata_of(bob, as_bob)) == Status.PERMISSION_DENIED
    assert _refused(gate, ()) == Status.UNAUTHENTICATED
    assert _refused(gate, metadata_of(ann, CLAIM)[:-1]) == Status.UNAUTHENTICATED
    now = time.time()
    old = metadata_of(ann, CLAIM)
    monkeypatch.setattr(node_keys.time, "time", lambda: now + 301)
    assert _refused(gate, old) == Status.PERMISSION_DENIED
    late = metadata_of(ann, CLAIM)
    monkeypatch.setattr(node_keys.time, "time", lambda: now)
    assert _refused(gate, late) == Status.PERMISSION_DENIED


def test_a_nonce_is_remembered_for_as_long_as_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key()
    gate = _gate(tmp_path, ann=key)
    now = time.time()
    monkeypatch.setattr(node_keys.time, "time", lambda: now + 299)
    ahead = metadata_of(key, CLAIM)
    monkeypatch.setattr(node_keys.time, "time", lambda: now)
    admit(gate, ahead, CLAIM)
    # The client's clock was ahead: its signature is good for nearly 600 s here.
    monkeypatch.setattr(node_keys.time, "time", lambda: now + 598)
    assert _refused(gate, ahead) == Status.PERMISSION_DENIED
    assert len(gate._nonces) == 1
    monkeypatch.setattr(node_keys.time, "time", lambda: now + 1201)
    admit(gate, metadata_of(key, CLAIM), CLAIM)
    assert len(gate._nonces) == 1


def test_who_is_taken_off_the_list_is_out(tmp_path: Path) -> None:
    key = new_key()
    gate = _gate(tmp_path, ann=key)
    admit(gate, metadata_of(key, CLAIM), CLAIM)
    _gate(tmp_path, bob=key)
    assert _refused(gate, metadata_of(key, CLAIM)) == Status.PERMISSION_DENIED


def _certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "body")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1).not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip


def test_over_tls_with_keys(tmp_path: Path) -> None:
    _certificate(tmp_path)
    ann, eve = tmp_path / "ann", tmp_path / "eve"
    for path in (ann, eve):
        write_identity(path, new_identity(path.name))
    gate = _gate(tmp_path, ann=read_key(ann))
    made = kit.service()
    door = Door(cert=tmp_path / "cert.pem", key=tmp_path / "key.pem", enrolled=gate.enrolled)
    running = body_server.start(made, door, made.limits)
    root = {"root": tmp_path / "cert.pem", "patience": 2.0}

    def reach(client: str, key: Path | None, **settings: Any) -> kit.Link:
        who, how = kit.caller(client, key=key), kit.LinkSettings(**(root | settings))
        return kit.open_link(running.address, who, how)

    over = reach("ann", ann)
    first = kit.train(kit.part(), over, 2)
    for client, key, code in (
        ("eve", eve, "PERMISSION_DENIED"), ("ann", eve, "UNAUTHENTICATED"),
        ("bob", ann, "PERMISSION_DENIED"), ("ann", None, "UNAUTHENTICATED"),
    ):  # fmt: skip
        with pytest.raises(FedtuneError, match=code) as caught:
            reach(client, key)
        assert caught.value.code == ExitCode.SIGNATURE
    with pytest.raises(FedtuneError, match="UNAUTHENTICATED"):
        reach("ann", ann, server="another")
    with pytest.raises(FedtuneError, match="no answer"):
        reach("ann", ann, root=None, patience=0.5)
    mutual = Door(cert=door.cert, key=door.key, client_root=door.cert)
    second = body_server.start(made, mutual, made.limits)
    mine = {"root": door.cert, "patience": 0.5}
    with pytest.raises(FedtuneError, match="no answer"):
        kit.link(second.address, "carl", **mine)
    kit.link(second.address, "carl", **mine, pair=(door.cert, door.key)).close()
    second.stop(0)
    # Others' failures changed nothing for ann.
    assert kit.same(first, kit.train(kit.part(), reach("ann", ann), 2))
    over.close()
    running.stop(0)


def test_a_recorded_call_is_not_let_in_again(tmp_path: Path) -> None:
    key = new_key()
    gate = _gate(tmp_path, ann=key)
    made = kit.service()
    running = body_server.start(made, Door(enrolled=gate.enrolled), made.limits)
    heard: list[Any] = []
    with grpc.insecure_channel(running.address) as channel:
        raw = channel.stream_stream(
            f"/{PACKAGE}/Forward",
            request_serializer=pb.Chunk.SerializeToString,
            response_deserializer=pb.Chunk.FromString,
        )
        from hashlib import sha256

        from fedtune.split.frames import frames, seal

        header = pb.Header(
            run="run-1", client="ann", step="s", part=pb.FORWARD, model=kit.DIGEST,
            cut=pb.Cut(head=1, tail=1, count=4), rows=pb.Rows(batch=2, length=5),
        )  # fmt: skip

        def ask(seed: int, metadata: Any = None) -> Any:
            chunks = list(frames(header, [seal(pb.HIDDEN, kit.numbers(seed))], 1 << 20))
            digest = sha256(chunks[0].header.SerializeToString(deterministic=True)).digest()
            claim = Claim("Forward", "run-1", "ann", "body", kit.DIGEST, digest)
            heard.append(metadata or metadata_of(key, claim))
            return list(raw(iter(chunks), timeout=5, metadata=heard[-1]))

        assert ask(1)
        with pytest.raises(grpc.RpcError) as caught:
            ask(1, heard[0])
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        # Nor do its credentials serve another tensor.
        with pytest.raises(grpc.RpcError) as caught:
            ask(2, heard[0])
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert ask(1)
        with pytest.raises(grpc.RpcError) as caught:
            list(raw(iter([pb.Chunk(header=header)]), metadata=heard[0]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    running.stop(0)
    assert torch.get_num_threads() == 1
