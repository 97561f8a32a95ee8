"""NVIDIA's own client, unmodified, against a running server."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton
from server.toy_bundle import COLOURS, SCALE, SIDE, TASKS, encoded, expected_logits, solid
from tritonclient.utils import InferenceServerException


@pytest.fixture
def triton_client(toy_server):
    with triton.InferenceServerClient(toy_server.address) as client:
        yield client


def files_input(colours, *, shape=None, binary=True):
    contents = [encoded(colour) for colour in colours]
    if not binary:
        contents = [base64.b64encode(content) for content in contents]
    array = np.array(contents, dtype=object).reshape(shape or [len(colours)])
    tensor = triton.InferInput("image", list(array.shape), "BYTES")
    return tensor.set_data_from_numpy(array, binary_data=binary)


def pixels_input(colours, *, binary=True):
    array = np.stack([solid(colour) for colour in colours])
    tensor = triton.InferInput("image", list(array.shape), "UINT8")
    return tensor.set_data_from_numpy(array, binary_data=binary)


def test_health_and_readiness(triton_client):
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready("rgb")
    assert triton_client.is_model_ready("rgb", "1")
    assert not triton_client.is_model_ready("rgb", "2")
    assert not triton_client.is_model_ready("nowhere")


def test_server_metadata_names_the_extensions(triton_client):
    metadata = triton_client.get_server_metadata()
    assert metadata["name"] == "vpdeploy"
    assert {"binary_tensor_data", "classification"} <= set(metadata["extensions"])


def test_model_metadata_describes_inputs_outputs_and_labels(triton_client):
    metadata = triton_client.get_model_metadata("warm")
    assert metadata["name"] == "warm"
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}]
    assert metadata["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ]
    assert metadata["parameters"]["labels"] == ["red", "blue"]


def test_model_config_tells_the_batch_size(triton_client):
    config = triton_client.get_model_config("rgb")
    assert config["max_batch_size"] == 32
    assert config["input"][0]["dims"] == [SIDE, SIDE, 3]


def test_repository_index_lists_every_task(triton_client):
    index = triton_client.get_model_repository_index()
    assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [
        (task, "1", "READY") for task in (*TASKS, "@bundle")
    ]


@pytest.mark.parametrize("shape", [[2], [2, 1]])
@pytest.mark.parametrize("binary", [True, False])
def test_encoded_files(triton_client, shape, binary):
    result = triton_client.infer("rgb", [files_input(["green", "blue"], shape=shape, binary=binary)])
    assert result.as_numpy("label").tolist() == [b"green", b"blue"]
    expected = [expected_logits(colour, TASKS["rgb"]) for colour in ("green", "blue")]
    np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)
    assert result.as_numpy("logits").dtype == np.float32


@pytest.mark.parametrize("binary", [True, False])
def test_pixels(triton_client, binary):
    result = triton_client.infer("warm", [pixels_input(["blue", "red", "blue"], binary=binary)])
    assert result.as_numpy("label").tolist() == [b"blue", b"red", b"blue"]
    low = 1 / (1 + np.exp(SCALE))
    expected = [[low, 1 - low], [1 - low, low], [low, 1 - low]]
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_only_the_outputs_asked_for_in_the_order_asked(triton_client, binary):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "logits")]
    result = triton_client.infer("bgr", [pixels_input(["red"])], outputs=outputs)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["label", "logits"]
    assert result.as_numpy("probabilities") is None
    np.testing.assert_allclose(result.as_numpy("logits"), [expected_logits("red", TASKS["bgr"])], atol=1e-5)
    label = result.as_numpy("label").tolist()[0]
    assert label in (b"red", "red")


def test_binary_and_json_outputs_in_one_response(triton_client):
    outputs = [
        triton.InferRequestedOutput("logits", binary_data=True),
        triton.InferRequestedOutput("probabilities", binary_data=False),
        triton.InferRequestedOutput("label", binary_data=True),
    ]
    result = triton_client.infer("rgb", [pixels_input(["green", "red"])], outputs=outputs)
    assert result.as_numpy("logits").argmax(axis=1).tolist() == [1, 0]
    assert result.as_numpy("probabilities").argmax(axis=1).tolist() == [1, 0]
    assert result.as_numpy("label").tolist() == [b"green", b"red"]


def test_the_request_id_is_echoed(triton_client):
    result = triton_client.infer("rgb", [pixels_input(["red"])], request_id="number-7")
    assert result.get_response()["id"] == "number-7"
    assert "id" not in triton_client.infer("rgb", [pixels_input(["red"])]).get_response()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compressed_requests_and_responses(triton_client, algorithm, binary):
    colours = list(COLOURS) * 30
    result = triton_client.infer(
        "rgb",
        [pixels_input(colours, binary=binary)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert [label.decode() for label in result.as_numpy("label")] == colours


@pytest.mark.parametrize("binary", [True, False])
def test_classification_returns_value_index_and_label(triton_client, binary):
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary, class_count=2)]
    result = triton_client.infer("bgr", [pixels_input(["red", "green"])], outputs=outputs)
    rows = result.as_numpy("logits")
    assert rows.shape == (2, 2)
    best = [row[0].decode() if isinstance(row[0], bytes) else row[0] for row in rows]
    assert best == ["10.000000:2:red", "10.000000:1:green"]


def test_a_version_that_is_not_served_is_not_found(triton_client):
    assert triton_client.infer("rgb", [pixels_input(["red"])], model_version="1").as_numpy("label") == [b"red"]
    with pytest.raises(InferenceServerException, match="has no version 9") as refused:
        triton_client.infer("rgb", [pixels_input(["red"])], model_version="9")
    assert refused.value.status() == "404"


def test_errors_reach_the_client_with_status_and_text(triton_client):
    with pytest.raises(InferenceServerException, match="no task 'nowhere'") as refused:
        triton_client.infer("nowhere", [pixels_input(["red"])])
    assert refused.value.status() == "404"
    wrong = triton.InferInput("image", [1, 3], "UINT8").set_data_from_numpy(np.zeros((1, 3), np.uint8))
    with pytest.raises(InferenceServerException, match="should have shape") as refused:
        triton_client.infer("rgb", [wrong])
    assert refused.value.status() == "400"


def test_asynchronous_requests(triton_client):
    pending = [triton_client.async_infer("rgb", [pixels_input([colour])]) for colour in COLOURS]
    assert [each.get_result().as_numpy("label")[0].decode() for each in pending] == list(COLOURS)


def test_concurrent_clients_with_mixed_tasks_each_get_their_own_answers(toy_server):
    def ask(seed: int) -> int:
        rng = np.random.default_rng(seed)
        wrong = 0
        with triton.InferenceServerClient(toy_server.address) as own:
            for _ in range(25):
                task = list(TASKS)[rng.integers(len(TASKS))]
                colours = [TASKS[task][rng.integers(len(TASKS[task]))] for _ in range(rng.integers(1, 5))]
                tensor = files_input(colours) if rng.random() < 0.5 else pixels_input(colours)
                labels = own.infer(task, [tensor]).as_numpy("label")
                wrong += [label.decode() for label in labels] != colours
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [0] * 8
