"""The names that the server answers to."""

from __future__ import annotations

import socket

import httpx
import pytest
from server.running import TIMEOUT_S, serving

from vpdeploy import load
from vpdeploy.cli.serve import _allowed_hosts
from vpdeploy.server.hosts import HostCheck, host_name
from vpdeploy.server.settings import ServerSettings


@pytest.fixture(scope="module")
def named(toy_bundle):
    settings = ServerSettings(allowed_hosts=("localhost", "127.0.0.1", "[::1]", "*.zoo.example"))
    with (
        load(toy_bundle) as session,
        serving(session, settings) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000", "a.zoo.example:80"]
)
def test_names_of_this_machine_are_answered(named, host):
    assert named.get("/v1/tasks", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "", "localhost.evil.example", "zoo.example", "xzoo.example",
     "127.0.0.1.a.example",
     "::1", "localhost:x", "localhost@evil.example", "[::1]:80:80"],
)  # fmt: skip
def test_other_names_are_refused_and_health_is_not(named, host):
    refused = named.get("/v1/tasks", headers={"host": host})
    assert refused.status_code == 421
    assert "--allowed-host" in refused.json()["error"]
    assert named.post("/v1/tasks/rgb:predict", headers={"host": host}, content=b"x").status_code == 421
    assert named.get("/v2/health/live", headers={"host": host}).status_code == 200


def test_two_names_must_both_be_good(named):
    address = (named.base_url.host, named.base_url.port)
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 421")


def test_what_is_listened_on_decides_the_default():
    assert _allowed_hosts(None, "127.0.0.1") == ("localhost", "127.0.0.1", "[::1]", "127.0.0.1")
    assert "[::1]" in _allowed_hosts(None, "::1")
    assert "127.0.0.2" in _allowed_hosts(None, "127.0.0.2")
    assert _allowed_hosts(None, "0.0.0.0") is None
    assert _allowed_hosts(["a.example"], "0.0.0.0") == ("a.example",)


@pytest.mark.parametrize(
    ("host", "name"), [("A.b", "a.b"), ("a:80", "a"), ("a:", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("", "")]
)
def test_names_without_their_ports(host, name):
    assert host_name(host) == name


def test_a_star_allows_every_name():
    check = HostCheck(None, allowed=("*",), open_paths=frozenset())
    assert "*" in check._names
