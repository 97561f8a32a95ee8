"""The files of the page at /, and what pages of other sites may not do."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from server.running import serving
from server.toy_bundle import encoded
from starlette.testclient import TestClient

import vpdeploy.server
from vpdeploy import load
from vpdeploy.server.app import create_app
from vpdeploy.server.playground_routes import PLAYGROUND_PATHS
from vpdeploy.server.settings import ServerSettings

FOLDER = Path(vpdeploy.server.__file__).parent / "playground"


@pytest.fixture(scope="module")
def guarded(toy_bundle):
    with (
        load(toy_bundle) as session,
        serving(session, ServerSettings(token="secret")) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


def test_every_file_of_the_folder_is_served_and_no_other():
    served = {"index.html" if path == "/" else path.removeprefix("/playground/") for path in PLAYGROUND_PATHS}
    assert served == {file.name for file in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(PLAYGROUND_PATHS))
def test_files_are_checked_for_changes_and_confined(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"

    unchanged = client.get(path, headers={"if-none-match": f'"other", W/{response.headers["etag"]}'})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200

    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))
    assert head.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize("path", ["/playground", "/playground/", "/playground/index.html", "/playground/../app.py"])
def test_there_is_nothing_else(client, path):
    assert client.get(path).status_code == 404


def test_the_files_know_no_other_host_and_make_no_markup():
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_the_page_needs_no_token_and_all_that_it_shows_does(guarded):
    for path in PLAYGROUND_PATHS:
        assert guarded.get(path).status_code == 200
    for path in ("/v1/tasks", "/v1/activity"):
        assert guarded.get(path).status_code == 401
    assert guarded.get("/v1/activity", headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("address", "token", "status"),
    [
        ("http://127.0.0.1", None, 200),
        ("http://[::1]", None, 200),
        ("http://192.0.2.7", None, 403),
        ("http://[2001:db8::7]", None, 403),
        ("http://192.0.2.7", "secret", 200),
    ],
)
def test_without_a_token_the_page_opens_on_this_machine_only(toy_bundle, address, token, status):
    with load(toy_bundle) as session:
        app = create_app(session, ServerSettings(token=token))
        response = TestClient(app, base_url=address).get("/")
        app.state.service.close()
    assert response.status_code == status
    if status == 403:
        assert "VPDEPLOY_TOKEN" in response.json()["error"]


FOREIGN = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "origin": "http://{host}"},
    {"origin": "https://example.org"},
    {"origin": "http://{host}.example.org"},
    {"origin": "null"},
    {"origin": "http://["},
]
OWN = [
    {},
    {"sec-fetch-site": "same-origin", "origin": "http://{host}"},
    {"sec-fetch-site": "none"},
    {"origin": "http://{host}"},
    {"sec-fetch-site": "cross-site", "authorization": "Bearer any"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("path", ["/v1/tasks/rgb:predict", "/v2/models/rgb/infer", "/v1/tasks/rgb:rollback"])
def test_pages_of_other_sites_send_nothing_that_counts(client, headers, path):
    headers = {name: value.format(host=client.base_url.netloc.decode()) for name, value in headers.items()}
    response = client.post(path, content=encoded("red"), headers=headers)
    assert response.status_code == 403
    assert "another site" in response.json()["error"]
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("headers", OWN)
def test_programs_the_own_page_and_who_has_a_token_may(client, headers):
    headers = {name: value.format(host=client.base_url.netloc.decode()) for name, value in headers.items()}
    assert client.post("/v1/tasks/rgb:predict", content=encoded("red"), headers=headers).status_code == 200


def test_no_preflight_lets_a_page_of_another_site_send_a_token(client):
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    response = client.options("/v1/tasks/rgb:predict", headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
