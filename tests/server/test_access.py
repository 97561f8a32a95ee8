"""The bearer token, and what /metrics tells."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.running import serving
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.server.settings import ServerSettings


@pytest.fixture(scope="module")
def guarded(toy_bundle):
    settings = ServerSettings(token="secret")
    with (
        load(toy_bundle) as session,
        serving(session, settings) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
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
        assert server.metric("vpdeploy_request_seconds_count") == 103
        assert server.metric("vpdeploy_queue_images") == 0
        assert server.metric("vpdeploy_tasks") == 3
        assert server.metric("vpdeploy_table_bytes") > 0
