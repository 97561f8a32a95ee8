"""The API's description: what it declares is what is answered, whatever is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from server.running import serving
from server.toy_bundle import write_toy_bundle

from vpdeploy import load
from vpdeploy.server.description import _MEANINGS
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import STATUSES

CONFIG = Path(__file__).with_name("schemathesis.toml")
LEFT = 499
"""The status that no client sees: it has left."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    zoo = write_toy_bundle(tmp_path_factory.mktemp("described") / "zoo").path
    settings = ServerSettings(admin_token="admin", administered=zoo)
    with load(zoo) as session, serving(session, settings) as server:
        yield server


@pytest.fixture(scope="module")
def description(server):
    return httpx.get(f"{server.url}/openapi.json", headers={"authorization": "Bearer admin"}, timeout=30).json()


def operations(description: dict) -> dict[tuple[str, str], dict]:
    return {
        (method.upper(), path): operation
        for path, by_method in description["paths"].items()
        for method, operation in by_method.items()
    }


@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("coverage,fuzzing,stateful", marks=pytest.mark.slow)])
def test_whatever_is_asked_the_description_declares_the_answer(server, description, tmp_path, phases):
    """Requests made of the description, valid and invalid, against a live server; a longer run takes --max-examples."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", "--no-color"]
    command += [f"{server.url}/openapi.json", "-H", "Authorization: Bearer admin", "--phases", phases]
    command += ["--max-examples", "2", "--seed", "1", "--generation-deterministic"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(operations(description))} selected" in ended.stdout


def test_every_operation_declares_its_errors(description):
    for (method, path), operation in operations(description).items():
        declared = set(operation["responses"])
        assert {"200", "400", "401", "403", "408", "421", "431", "500", "503"} <= declared, (method, path)
        if "{task}" in path:
            assert "404" in declared, (method, path)
        if "requestBody" in operation:
            assert {"413", "429"} <= declared, (method, path)
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}, (method, path, status)


def test_every_status_of_the_table_is_declared_somewhere(description):
    declared = {int(status) for operation in operations(description).values() for status in operation["responses"]}
    assert set(STATUSES.values()) - {LEFT} <= declared
    assert declared - {200} == set(_MEANINGS)


def test_a_path_names_all_its_parameters(description):
    for (method, path), operation in operations(description).items():
        named = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert {part for part in ("task", "version") if f"{{{part}}}" in path} == named, (method, path)


def test_who_needs_a_token_is_declared(description, client):
    assert description["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert operations(description)["GET", "/v2/health/live"]["security"] == []
    assert "security" not in operations(description)["POST", "/v1/predict"]
    assert "security" not in client.get("/openapi.json").json()


def test_a_method_that_a_path_has_not_is_told_which_it_has(server, client):
    headers = {"authorization": "Bearer admin"}
    refused = httpx.patch(f"{server.url}/v1/tasks/rgb", headers=headers, timeout=30)
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "PUT", "DELETE"}
    assert client.put("/v1/tasks/rgb").headers["allow"] == "GET"
