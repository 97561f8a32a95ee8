"""The plain image API."""

from __future__ import annotations

import math

import pytest
from server.toy_bundle import SCALE, TASKS, encoded


def test_a_raw_image_body(client):
    response = client.post(
        "/v1/tasks/rgb:predict", params={"top": 2}, content=encoded("green"), headers={"content-type": "image/png"}
    )
    assert response.status_code == 200
    answer = response.json()
    assert (answer["task"], answer["version"]) == ("rgb", 1)
    best, second = answer["predictions"]
    assert (best["label"], best["index"]) == ("green", 1)
    assert best["probability"] == pytest.approx(1 / (1 + 2 * math.exp(-SCALE)), abs=1e-5)
    assert second["probability"] == pytest.approx(math.exp(-SCALE), abs=1e-5)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_image_formats_without_a_content_type(client, file_format):
    response = client.post("/v1/tasks/bgr:predict", content=encoded("blue", file_format=file_format))
    assert response.json()["predictions"][0]["label"] == "blue"


def test_top_is_cut_to_the_classes_there_are(client):
    response = client.post("/v1/tasks/warm:predict?top=100", content=encoded("red"))
    assert [each["label"] for each in response.json()["predictions"]] == ["red", "blue"]


def test_a_form_with_one_file_answers_like_a_raw_body(client):
    response = client.post("/v1/tasks/rgb:predict", files={"image": ("a.png", encoded("blue"))})
    assert response.json() == client.post("/v1/tasks/rgb:predict", content=encoded("blue")).json()


def test_a_form_with_several_files_answers_for_each_in_order(client):
    files = [("image", (f"{colour}.png", encoded(colour))) for colour in ("red", "blue", "green")]
    answer = client.post("/v1/tasks/rgb:predict", files=files).json()
    assert [each["name"] for each in answer["images"]] == ["red.png", "blue.png", "green.png"]
    assert [each["predictions"][0]["label"] for each in answer["images"]] == ["red", "blue", "green"]


def test_a_large_file_in_a_form(client):
    image = encoded("red", side=800, file_format="BMP")
    assert len(image) > 1 << 20
    answer = client.post("/v1/tasks/rgb:predict", files={"image": ("a.bmp", image)}).json()
    assert answer["predictions"][0]["label"] == "red"


def test_fan_out_asks_the_named_tasks_once_each(client):
    answer = client.post("/v1/predict?tasks=warm,rgb,warm&top=1", content=encoded("blue")).json()
    assert [(each["task"], each["predictions"][0]["index"]) for each in answer["tasks"]] == [("warm", 1), ("rgb", 2)]


def test_fan_out_asks_all_tasks_if_none_is_named(client):
    answer = client.post("/v1/predict", content=encoded("red")).json()
    assert [each["task"] for each in answer["tasks"]] == list(TASKS)


def test_fan_out_takes_one_image(client):
    files = [("image", ("a.png", encoded("red")))] * 2
    response = client.post("/v1/predict", files=files)
    assert (response.status_code, response.json()["error"]) == (
        400,
        "expected one image for several tasks, found 2; send one at a time",
    )


def test_tasks_are_listed_and_shown(client):
    assert client.get("/v1/tasks").json() == {
        "tasks": [
            {
                "task": task,
                "version": 1,
                "classes": len(labels),
                "val_accuracy": None,
                # Two columns of prefix with keys, values and biases, and a head of three channels and a bias.
                "size_bytes": 4 * (2 * (3 + 3 + 1) + (3 + 1) * len(labels)),
            }
            for task, labels in TASKS.items()
        ],
        "failed": [],
        "administered": False,
    }
    shown = client.get("/v1/tasks/bgr").json()
    assert shown == {
        "task": "bgr",
        "version": 1,
        "method": "e2vpt",
        "backbone": "toy",
        "labels": ["blue", "green", "red"],
    }


@pytest.mark.parametrize("url", ["/v1/tasks/nowhere:predict", "/v1/predict?tasks=rgb,nowhere"])
def test_an_unknown_task_is_not_found(client, url):
    response = client.post(url, content=encoded("red"))
    assert response.status_code == 404
    assert response.json() == {"error": "no task 'nowhere'; loaded: rgb, bgr, warm"}


@pytest.mark.parametrize("query", ["top=0", "top=-1", "top=x", "top=1.5", "top=٣", "deadline_ms=0", "deadline_ms=nan"])
def test_bad_query_values_are_named(client, query):
    response = client.post(f"/v1/tasks/rgb:predict?{query}", content=encoded("red"))
    assert response.status_code == 400
    assert query.partition("=")[0] in response.json()["error"]


def test_an_empty_body_is_refused(client):
    assert client.post("/v1/tasks/rgb:predict").status_code == 400


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense"),
        (
            "multipart/form-data; boundary=x; charset=hex",
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nno file\r\n--x--\r\n',
        ),
    ],
)
def test_broken_forms_are_refused(client, content_type, body):
    response = client.post("/v1/tasks/rgb:predict", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert response.json()["error"]


def test_unknown_paths_and_methods_answer_in_the_same_form(client):
    assert client.get("/v3").json() == {"error": "Not Found"}
    assert client.get("/v1/predict").status_code == 405


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/tasks/rgb:predict",
        "/v1/tasks/nowhere:predict",
        "/v1/predict",
        "/v2/models/rgb/infer",
        "/v2/models/rgb/versions/1/infer",
        "/v2/repository/index",
    ],
)
def test_what_is_only_posted_to_names_that_method_to_all_others(client, path, method):
    response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.headers["content-type"] == "application/json"
    assert response.text == ("" if method == "HEAD" else '{"error": "Method Not Allowed"}')


@pytest.mark.parametrize(
    "path",
    ["/v1/tasks", "/v1/tasks/rgb", "/v2/models/rgb", "/v2/models/rgb/ready", "/v2/health/live", "/metrics"],
)
def test_what_is_only_read_is_not_posted_to(client, path):
    response = client.post(path, content=encoded("red"))
    assert (response.status_code, response.headers["allow"]) == (405, "GET")


def test_what_no_task_can_do_is_not_found(client):
    for method in ("GET", "POST"):
        response = client.request(method, "/v1/tasks/rgb:explain")
        assert (response.status_code, response.json()) == (404, {"error": "Not Found"})


def test_the_api_describes_itself(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/tasks/{task}:predict", "/v1/predict", "/v2/models/{task}/infer", "/metrics"} <= set(paths)
