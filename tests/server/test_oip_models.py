"""Statistics, loading and unloading, and reserved parameters: alike over HTTP and gRPC."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from server.running import serving
from server.toy_bundle import TASKS, solid, write_toy_bundle
from tritonclient.utils import InferenceServerException

from vpdeploy import load
from vpdeploy.server.settings import ServerSettings

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


def admin():
    """Headers of the administrator; the client writes into what it is given."""
    return {"authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    zoo = write_toy_bundle(tmp_path_factory.mktemp("models") / "zoo").path
    settings = ServerSettings(token="user", admin_token="admin", administered=zoo)
    with load(zoo) as session, serving(session, settings, with_grpc=True) as server:
        yield server


@pytest.fixture(params=PROTOCOLS)
def triton(request):
    return PROTOCOLS[request.param]


@pytest.fixture
def client(server, triton):
    address = server.grpc_address if triton is tritonclient.grpc else server.address
    with triton.InferenceServerClient(address) as client:
        yield client


def ask(triton, client, task="rgb", **options):
    tensor = triton.InferInput("image", [1, 16, 16, 3], "UINT8").set_data_from_numpy(solid("red")[np.newaxis])
    return client.infer(task, [tensor], headers=admin(), **options)


def statistics(client, *task):
    answer = client.get_inference_statistics(*task, headers=admin())
    if isinstance(answer, dict):
        return answer["model_stats"]
    return client.get_inference_statistics(*task, headers=admin(), as_json=True)["model_stats"]


def test_statistics_have_tritons_fields_and_count_what_was_asked(triton, client):
    before = int(statistics(client, "warm", "1")[0].get("inference_count", 0))
    for _ in range(3):
        ask(triton, client, "warm")
    (stats,) = statistics(client, "warm")
    assert (stats["name"], stats["version"]) == ("warm", "1")
    assert int(stats["inference_count"]) == before + 3
    times = stats["inference_stats"]
    assert int(times["success"]["count"]) == before + 3
    parts = sum(int(times[part].get("ns", 0)) for part in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert 0 < parts <= int(times["success"]["ns"])
    assert sum(int(each["compute_infer"]["count"]) for each in stats["batch_stats"]) == int(stats["execution_count"])
    assert {each["name"] for each in statistics(client)} == set(TASKS)


def test_statistics_of_what_is_not_served_are_not_found(client):
    for task in (("nowhere",), ("rgb", "9")):
        with pytest.raises(InferenceServerException, match=r"no task|no version '?9'?"):
            statistics(client, *task)


def test_tasks_are_unloaded_and_loaded_by_those_who_may(triton, client):
    for headers in ({"authorization": "Bearer user"}, None):
        with pytest.raises(InferenceServerException, match=r"scope|Authorization"):
            client.unload_model("bgr", headers=headers)
    client.unload_model("bgr", headers=admin())
    assert not client.is_model_ready("bgr", headers=admin())
    with pytest.raises(InferenceServerException, match="no task 'bgr'"):
        ask(triton, client, "bgr")
    index = client.get_model_repository_index(headers=admin())
    models = index if isinstance(index, list) else [{"name": m.name, "reason": m.reason} for m in index.models]
    assert [model["reason"] for model in models if model["name"] == "bgr"] == ["unloaded"]
    client.load_model("bgr", headers=admin())
    assert ask(triton, client, "bgr").as_numpy("label").tolist() == [b"red"]
    with pytest.raises(InferenceServerException, match="no task 'nowhere'"):
        client.load_model("nowhere", headers=admin())


def test_an_unloaded_task_stays_away_when_the_bundle_changes(server):
    server.session.unload_task("bgr")
    server.session.sync()
    assert "bgr" not in server.session.tasks
    server.session.load_task("bgr")
    assert "bgr" in server.session.tasks


def test_without_the_administration_nothing_is_loaded_or_unloaded(toy_server):
    for verb in ("load", "unload"):
        refused = httpx.post(f"{toy_server.url}/v2/repository/models/rgb/{verb}", json={})
        assert refused.status_code == 403
        assert "--admin" in refused.json()["error"]


@pytest.mark.parametrize(
    "options", [{"sequence_id": 5}, {"sequence_id": "five", "sequence_start": True}, {"parameters": {"mine": 1}}]
)
def test_sequences_are_refused_and_own_parameters_are_not(triton, client, options):
    if "parameters" in options:
        assert ask(triton, client, **options).as_numpy("label").tolist() == [b"red"]
        return
    with pytest.raises(InferenceServerException, match="sequences are not supported"):
        ask(triton, client, **options)


def mixed(triton, tasks, colours):
    pixels = np.stack([solid(colour) for colour in colours])
    names = np.array([task.encode() for task in tasks], dtype=object)
    return [
        triton.InferInput("image", list(pixels.shape), "UINT8").set_data_from_numpy(pixels),
        triton.InferInput("task", [len(tasks)], "BYTES").set_data_from_numpy(names),
    ]


def test_a_request_to_the_bundle_mixes_tasks_and_pads_their_rows(triton, client):
    result = client.infer("@bundle", mixed(triton, ["rgb", "warm", "bgr"], ["green", "red", "red"]), headers=admin())
    assert result.as_numpy("label").tolist() == [b"green", b"red", b"red"]
    expected = [[0, 10, 0], [10, 0, -30000], [0, 0, 10]]
    np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)
    assert result.as_numpy("probabilities")[1, 2] == 0
    outputs = [triton.InferRequestedOutput("logits", class_count=3)]
    ranked = client.infer("@bundle", mixed(triton, ["warm", "rgb"], ["red", "blue"]), outputs=outputs, headers=admin())
    assert ranked.as_numpy("logits")[0].tolist() == [b"10.000000:0:red", b"0.000000:1:blue", b""]


def test_the_bundle_describes_itself(triton, client):
    metadata = client.get_model_metadata("@bundle", headers=admin())
    inputs = metadata["inputs"] if isinstance(metadata, dict) else metadata.inputs
    assert [each["name"] if isinstance(each, dict) else each.name for each in inputs] == ["image", "task"]
    assert client.is_model_ready("@bundle", headers=admin())
    assert client.get_model_config("@bundle", headers=admin())
    before = int(statistics(client, "@bundle")[0].get("inference_count", 0))
    client.infer("@bundle", mixed(triton, ["rgb", "warm"], ["green", "red"]), headers=admin())
    (stats,) = statistics(client, "@bundle")
    assert int(stats["inference_count"]) == before + 2
    assert "@bundle" not in {each["name"] for each in statistics(client)}


@pytest.mark.parametrize(
    ("tasks", "text"),
    [(["rgb", "nowhere"], "no task 'nowhere'"), (["rgb"], "one name for each image"), (["rgb", "\xff"], "no task")],
)
def test_tasks_that_cannot_be_asked_refuse_the_whole_request(triton, client, tasks, text):
    with pytest.raises(InferenceServerException, match=text):
        client.infer("@bundle", mixed(triton, tasks, ["red", "red"]), headers=admin())
    with pytest.raises(InferenceServerException, match="expected the inputs 'image', 'task'"):
        ask(triton, client, "@bundle")


def test_names_in_json_are_text(server):
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": solid("red").ravel().tolist()}
    names = {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["warm"]}
    url = f"{server.url}/v2/models/@bundle/infer"
    answer = httpx.post(url, json={"inputs": [pixels, names]}, headers=admin()).json()
    assert (answer["model_name"], answer["outputs"][2]["data"]) == ("@bundle", ["red"])


def test_priority_is_a_level_from_1_on(triton, client):
    for priority in (1, 2, 3, 1000):
        assert ask(triton, client, priority=priority).as_numpy("label").tolist() == [b"red"]


def test_a_negative_priority_is_refused(server):
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": solid("red").ravel().tolist()}
    document = {"inputs": [pixels], "parameters": {"priority": -1}}
    assert httpx.post(f"{server.url}/v2/models/rgb/infer", json=document, headers=admin()).status_code == 400


def test_reserved_parameters_are_refused(server):
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": solid("red").ravel().tolist()}
    for name, status in (("triton_x", 400), ("triton_enable_empty_final_response", 200)):
        document = {"inputs": [pixels], "parameters": {name: True}}
        answer = httpx.post(f"{server.url}/v2/models/rgb/infer", json=document, headers=admin())
        assert answer.status_code == status
