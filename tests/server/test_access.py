"""The bearer token, and what /metrics tells."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.running import serving
from server.toy_bundle import encoded, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.server.playground_routes import PLAYGROUND_PATHS
from vpdeploy.server.settings import ServerSettings

TOKENS = """
[[token]]
name = "monitor"
token = "metrics-token"
scopes = ["metrics"]
[[token]]
name = "keeper"
token = "admin-token"
scopes = ["admin"]
"""


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    zoo, token_file = write_toy_bundle(folder / "zoo").path, folder / "tokens.toml"
    token_file.write_text(TOKENS)
    settings = ServerSettings(token="secret", token_file=token_file, administered=zoo)
    with load(zoo) as session, serving(session, settings) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(guarded_server):
    with httpx.Client(base_url=guarded_server.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_needs_no_token(guarded, path):
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/models/rgb", "/v1/tasks", "/metrics", "/openapi.json", "/v2/health/live/", "/nothing"]
)
def test_everything_else_does(guarded, path):
    refused = guarded.get(path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "Authorization" in refused.json()["error"]
    allowed = guarded.get(path, headers={"authorization": "Bearer secret"}, follow_redirects=True)
    assert allowed.status_code == (404 if path == "/nothing" else 200)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
HEALTH = {"/v2/health/live", "/v2/health/ready"}
OPEN = HEALTH | PLAYGROUND_PATHS


def paths_of(app: Any) -> dict[str, set[str]]:
    """Every path of an app, filled in, with the methods it is declared for."""
    filled: dict[str, set[str]] = {}
    for route in app.routes:
        path = re.sub(r"{task(:task)?}", "warm", re.sub(r"{version(:\w+)?}", "1", route.path))
        filled.setdefault(path, set()).update(getattr(route, "methods", None) or {"GET"})
    return filled


def test_no_path_and_no_method_answers_without_a_token(guarded, guarded_server):
    """Every path of the app with every method, and some that there are not."""
    paths = set(paths_of(guarded_server.app))
    assert {"/v2/models/warm/infer", "/v1/tasks/warm:predict", "/metrics", "/openapi.json"} | HEALTH <= paths
    unknown = {
        "/nothing",
        "/docs",
        "//v2/health/live",
        "/v2/health/live/",
        "/V2/health/live",
        "/v2/health/live%2f",
        "/playground",
        "/playground/",
    }
    answered = [
        (method, path, status)
        for path in sorted((paths | unknown) - OPEN)
        for method in METHODS
        if (status := guarded.request(method, path).status_code) != 401
    ]
    assert answered == []


@pytest.mark.parametrize(
    ("scope", "good_for"),
    [
        ("metrics", {"/metrics", "/v1/activity", "/openapi.json", "/v2"}),
        (
            "admin",
            {
                "/openapi.json",
                "/v[12]",
                "/v1/tasks*",
                "/v1/versions",
                "/v2/models/warm*",
                "/v2/models/stats",
                "/v2/repository/*",
            },
        ),
    ],
)
def test_no_path_answers_a_token_that_lacks_its_scope(guarded, guarded_server, scope, good_for):
    headers = {"authorization": f"Bearer {scope}-token"}
    answered = {
        path
        for path, methods in paths_of(guarded_server.app).items()
        for method in methods
        if guarded.request(method, path, headers=headers).status_code != 403
    }
    surplus = {path for path in answered - OPEN if not any(fnmatch(path, each) for each in good_for)}
    assert surplus == set()
    assert not any(path.endswith(("/infer", ":predict")) for path in answered)


@pytest.mark.parametrize("value", ["", "secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret"])
def test_wrong_tokens_are_refused(guarded, value):
    response = guarded.post("/v1/tasks/rgb:predict", content=encoded("red"), headers={"authorization": value})
    assert response.status_code == 401


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "bEARer"])
def test_the_schemes_case_does_not_matter(guarded, scheme):
    assert guarded.get("/v2", headers={"authorization": f"{scheme} secret"}).status_code == 200
    assert guarded.get("/v2", headers={"authorization": f"{scheme} SECRET"}).status_code == 401


def test_a_token_beyond_ascii_is_refused(guarded):
    assert guarded.get("/v2", headers=[(b"authorization", b"Bearer \xff\xfe")]).status_code == 401


def test_the_token_is_not_shown():
    assert "secret" not in repr(ServerSettings(token="secret"))


@pytest.mark.parametrize("token", ["", "two\nlines", "schlüssel"])
def test_tokens_that_no_header_can_carry_are_refused(token):
    with pytest.raises(SpecError, match="printable ASCII"):
        ServerSettings(token=token)


def test_metrics_count_requests_batches_and_images(toy_bundle):
    with (
        load(toy_bundle) as session,
        serving(session) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        files = [("image", ("a.png", encoded("red")))]
        assert client.post("/v1/tasks/rgb:predict", files=files * 3).status_code == 200
        assert client.post("/v1/tasks/rgb:predict", content=b"no image").status_code == 400
        assert client.post("/v1/predict?tasks=bgr,warm", files=files).status_code == 200
        for index in range(50):
            client.post(f"/v1/tasks/made-up-{index}:predict", content=b"x")
            client.post(f"/v2/models/made-up-{index}/infer", content=b"{}")
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        requests = {
            (sample.labels["task"], sample.labels["status"]): sample.value
            for sample in families["vpdeploy_requests"].samples
            if sample.name == "vpdeploy_requests_total"
        }
        assert requests == {
            ("rgb", "200"): 1,
            ("rgb", "400"): 1,
            ("(several)", "200"): 1,
            ("(unknown)", "404"): 100,
        }
        assert server.metric("vpdeploy_images_total", task="rgb") == 3
        assert server.metric("vpdeploy_images_total", task="warm") == 1
        assert server.metric("vpdeploy_batch_size_sum") == 5
        assert server.metric("vpdeploy_queue_seconds_count") == 5
        assert server.metric("vpdeploy_request_seconds_count", task="rgb") == 2
        assert server.metric("vpdeploy_request_seconds_count", task="(unknown)") == 100
        assert server.metric("vpdeploy_decode_seconds_count") == 4
        assert server.metric("vpdeploy_table_slots") == server.metric("vpdeploy_table_slots_used") == 3
        assert server.metric("vpdeploy_queue_images") == 0
        assert server.metric("vpdeploy_tasks") == 3
        assert server.metric("vpdeploy_table_bytes") > 0
