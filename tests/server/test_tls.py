"""TLS: the right files serve, the wrong ones are refused in a line, and what is no TLS disturbs nobody."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from server.running import TIMEOUT_S, serving, until
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.tls import Certificate


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_certificate(authority: trustme.CA, folder: Path) -> tuple[Path, Path]:
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    return write_certificate(authority, tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def trusting(authority) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def server(toy_bundle, files):
    certfile, keyfile = files
    settings = ServerSettings(certfile=certfile, keyfile=keyfile, header_timeout_s=1.0)
    with load(toy_bundle) as session, serving(session, settings) as server:
        yield server


@pytest.fixture
def client(server, trusting):
    with httpx.Client(base_url=f"https://{server.address}", verify=trusting, timeout=30) as client:
        yield client


def connect(server) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def peer_certificate(server, trusting) -> bytes | None:
    with trusting.wrap_socket(connect(server), server_hostname="127.0.0.1") as secure:
        return secure.getpeercert(binary_form=True)


def test_requests_are_answered(client):
    assert client.get("/v2/health/live").json() == {"live": True}
    answer = client.post("/v1/tasks/rgb:predict?top=1", content=encoded("red")).json()
    assert answer["predictions"][0]["label"] == "red"


def test_what_is_no_tls_disturbs_nobody(server, client, caplog):
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{server.address}/v2/health/live", timeout=TIMEOUT_S)
    with connect(server) as plain:
        plain.sendall(bytes(range(256)) * 100)
        assert not plain.recv(1 << 16).startswith(b"HTTP")
    assert client.get("/v2/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_client_that_never_shakes_hands_is_hung_up_on(server, client):
    with connect(server) as silent:
        assert silent.recv(1) == b""  # after header_timeout_s
    assert client.get("/v2/health/live").status_code == 200


def test_old_protocols_are_refused(server, trusting):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(server) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_renewed_certificate_is_served_and_a_broken_one_is_not(toy_bundle, authority, trusting, tmp_path, caplog):
    caplog.set_level("INFO", logger="vpdeploy")
    certfile, keyfile = write_certificate(authority, tmp_path)
    with load(toy_bundle) as session, serving(session, ServerSettings(certfile=certfile, keyfile=keyfile)) as server:
        first = peer_certificate(server, trusting)
        good = certfile.read_bytes()
        certfile.write_bytes(b"broken")
        until(lambda: "the certificate stays as it was" in caplog.text)
        assert peer_certificate(server, trusting) == first
        certfile.write_bytes(good)
        write_certificate(authority, tmp_path)
        until(lambda: peer_certificate(server, trusting) != first)
    assert caplog.text.count("the certificate stays as it was") <= 2  # once more between the two new files


def test_files_that_are_no_certificate_are_refused_in_one_line(authority, files, tmp_path):
    certfile, keyfile = files
    other = write_certificate(authority, tmp_path)[1]
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\x00" * 100)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(_locked_key())
    for given, complaint in (
        ((tmp_path / "none.pem", None), "none.pem: cannot be read: No such file"),
        ((certfile, tmp_path / "none.pem"), "none.pem: cannot be read: No such file"),
        ((tmp_path, None), "cannot be read: Is a directory"),
        ((garbage, keyfile), "not a certificate and its key"),
        ((certfile, garbage), "not a certificate and its key"),
        ((certfile, None), "not a certificate and its key"),
        ((certfile, other), "key values mismatch"),
        ((certfile, locked), "has a passphrase"),
    ):
        with pytest.raises(SpecError) as refused:
            Certificate(*given)
        assert complaint in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_key_without_a_certificate_is_refused(files):
    with pytest.raises(SpecError, match="give certfile too"):
        ServerSettings(keyfile=files[1])


def _locked_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))


def test_grpc_speaks_with_the_same_certificate_and_follows_its_renewal(toy_bundle, authority, tmp_path):
    certfile, keyfile = write_certificate(authority, tmp_path)
    settings = ServerSettings(certfile=certfile, keyfile=keyfile)
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with load(toy_bundle) as session, serving(session, settings, with_grpc=True) as server:

        def is_live(credentials) -> bool:
            with grpc.secure_channel(server.grpc_address, credentials) as channel:
                live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                return live(b"", timeout=TIMEOUT_S, wait_for_ready=True) == b"\x08\x01"

        assert is_live(trusted)
        with grpc.insecure_channel(server.grpc_address) as plain, pytest.raises(grpc.RpcError):
            plain.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=TIMEOUT_S)
        other = trustme.CA()
        write_certificate(other, tmp_path)
        assert is_live(grpc.ssl_channel_credentials(other.cert_pem.bytes()))
