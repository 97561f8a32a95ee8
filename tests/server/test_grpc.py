"""NVIDIA's own gRPC client, unmodified, and raw calls, against a running server."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import COLOURS, SIDE, TASKS, encoded, expected_logits, solid
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.server import grpc_messages
from vpdeploy.server.grpc_server import GrpcServer
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings

SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def server(toy_bundle):
    with load(toy_bundle) as session, serving(session, with_grpc=True) as server:
        yield server


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.grpc_address) as client:
        yield client


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


def call(channel, method, message=b"", *, service=SERVICE, **options):
    return channel.unary_unary(f"{service}/{method}")(message, timeout=TIMEOUT_S, **options)


def pixels_input(colours):
    array = np.stack([solid(colour) for colour in colours])
    return triton.InferInput("image", list(array.shape), "UINT8").set_data_from_numpy(array)


def files_input(colours):
    array = np.array([encoded(colour) for colour in colours], dtype=object)
    return triton.InferInput("image", [len(colours)], "BYTES").set_data_from_numpy(array)


def request(**fields):
    message = service_pb2.ModelInferRequest(model_name="rgb")
    tensor = message.inputs.add(**{"name": "image", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], **fields})
    return message, tensor


def pixels_request():
    message, _ = request()
    message.raw_input_contents.append(solid("green").tobytes())
    return message


def settings(**fields):
    return ServerSettings(batching=BatchSettings(max_batch_size=8, max_delay_ms=0, **fields))


def test_every_declared_field_is_tritons():
    kinds = {**model_config_pb2.DESCRIPTOR.message_types_by_name, **service_pb2.DESCRIPTOR.message_types_by_name}
    for name in grpc_messages.MESSAGES["inference"]:
        outer, _, inner = name.rpartition(".")
        theirs = kinds[outer].nested_types_by_name[inner] if outer else kinds[name]
        for field in grpc_messages.message_class(name).DESCRIPTOR.fields:
            their = theirs.fields_by_name[field.name]
            assert (field.number, field.type) == (their.number, their.type), f"{name}.{field.name}"
            assert field.is_repeated == their.is_repeated
    ours = grpc_messages.message_class("ModelInput").DESCRIPTOR.fields_by_name["data_type"].enum_type
    for value in ours.values:
        assert model_config_pb2.DataType.Value(value.name) == value.number


def test_health_and_readiness(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("rgb")
    assert client.is_model_ready("rgb", "1")
    assert not client.is_model_ready("rgb", "2")
    assert not client.is_model_ready("nowhere")


def test_kubernetes_probes_get_the_standard_answer(channel):
    assert call(channel, "Check", service="/grpc.health.v1.Health") == b"\x08\x01"
    named = b"\x0a\x1e" + b"inference.GRPCInferenceService"
    assert call(channel, "Check", named, service="/grpc.health.v1.Health") == b"\x08\x01"
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "Check", b"\x0a\x01x", service="/grpc.health.v1.Health")
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_metadata_and_configuration(client):
    assert client.get_server_metadata().name == "vpdeploy"
    metadata = client.get_model_metadata("warm", as_json=True)
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", str(SIDE), str(SIDE), "3"]}]
    assert [output["name"] for output in metadata["outputs"]] == ["logits", "probabilities", "label"]
    config = client.get_model_config("rgb").config
    assert config.max_batch_size == 32
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert list(config.input[0].dims) == [SIDE, SIDE, 3]


def test_repository_index_lists_every_task(client):
    index = client.get_model_repository_index().models
    assert [(model.name, model.version, model.state) for model in index] == [
        (task, "1", "READY") for task in (*TASKS, "@bundle")
    ]


@pytest.mark.parametrize("make", [pixels_input, files_input])
def test_images_are_classified(client, make):
    result = client.infer("rgb", [make(["green", "blue"])], request_id="number-7")
    assert result.as_numpy("label").tolist() == [b"green", b"blue"]
    expected = [expected_logits(colour, TASKS["rgb"]) for colour in ("green", "blue")]
    np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)
    assert result.get_response().id == "number-7"


def test_classification_and_only_the_outputs_asked_for(client):
    outputs = [triton.InferRequestedOutput("logits", class_count=2), triton.InferRequestedOutput("label")]
    result = client.infer("bgr", [pixels_input(["red"])], outputs=outputs)
    assert result.as_numpy("logits").tolist() == [[b"10.000000:2:red", b"0.000000:0:blue"]]
    assert [output.name for output in result.get_response().outputs] == ["logits", "label"]


def test_the_asyncio_client(server):
    async def ask():
        async with triton_aio.InferenceServerClient(server.grpc_address) as client:
            return await asyncio.gather(*[client.infer("rgb", [pixels_input([colour])]) for colour in COLOURS])

    answers = asyncio.run(ask())
    assert [answer.as_numpy("label")[0].decode() for answer in answers] == list(COLOURS)


def test_streams_answer_in_order_and_errors_keep_the_stream(client):
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("rgb", [pixels_input(["red"])], request_id="a")
    client.async_stream_infer("nowhere", [pixels_input(["red"])], request_id="b")
    client.async_stream_infer("rgb", [files_input(["blue"])], request_id="c")
    first, second, third = (answers.get(timeout=TIMEOUT_S) for _ in range(3))
    client.stop_stream()
    assert (first[0].get_response().id, first[0].as_numpy("label").tolist()) == ("a", [b"red"])
    assert "no task 'nowhere'" in str(second[1])
    assert (third[0].get_response().id, third[0].as_numpy("label").tolist()) == ("c", [b"blue"])


def test_an_error_in_a_stream_says_whose_it_is(channel):
    message = pixels_request()
    message.model_name, message.id = "nowhere", "number-8"
    replies = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter([message.SerializeToString()]))
    reply = service_pb2.ModelStreamInferResponse.FromString(next(replies))
    assert "nowhere" in reply.error_message
    assert reply.infer_response.id == "number-8"


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        (lambda c: c.infer("nowhere", [pixels_input(["red"])]), "NOT_FOUND", "no task 'nowhere'"),
        (lambda c: c.infer("rgb", [pixels_input(["red"])], model_version="9"), "NOT_FOUND", "has no version 9"),
        (lambda c: c.get_model_metadata("nowhere"), "NOT_FOUND", "no task 'nowhere'"),
        (lambda c: c.infer("rgb", [triton.InferInput("x", [1], "BYTES")]), "INVALID_ARGUMENT", "exactly one input"),
    ],
)
def test_errors_have_the_code_and_the_text_of_http(client, ask, code, text):
    with pytest.raises(InferenceServerException, match=text) as refused:
        ask(client)
    assert refused.value.status() == f"StatusCode.{code}"


def numbers(values, **fields):
    message, tensor = request(**fields)
    tensor.contents.uint_contents.extend(values)
    return message


def mixed():
    message = numbers([0] * 768)
    message.raw_input_contents.append(bytes(768))
    return message


def two_raw():
    message = pixels_request()
    message.raw_input_contents.append(b"")
    return message


def other_contents():
    message, tensor = request()
    tensor.contents.fp32_contents.extend([1.0])
    return message


BAD_REQUESTS = {
    "contents and raw contents": (mixed, "has both contents and raw_input_contents"),
    "more raw contents than inputs": (two_raw, "should hold 1 tensors"),
    "contents of another type": (other_contents, "should be uint_contents, found fp32_contents"),
    "numbers out of range": (lambda: numbers([256] * 768), r"integers in \[0, 255\]"),
    "huge numbers": (lambda: numbers([2**32 - 1] * 768), r"integers in \[0, 255\]"),
    "too few numbers": (lambda: numbers([1] * 767), "should have 768 bytes, found 767"),
    "a negative batch": (lambda: request(shape=[-1, SIDE, SIDE, 3])[0], "at least one image"),
    "an overflowing batch": (lambda: request(shape=[2**63 - 1, SIDE, SIDE, 3])[0], "at most 128 images"),
    "a thousand dimensions": (lambda: request(shape=[1] * 1000)[0], "at most 8 dimensions"),
    "another datatype": (lambda: request(datatype="FP32")[0], "found 'FP32'"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_requests_that_cannot_be_used(channel, name):
    make, text = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError, match=text) as refused:
        call(channel, "ModelInfer", make().SerializeToString())
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 40,
        b"\x0b\x0c",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x02\xff\xfe",
        b"\x08\x01",
        b"\x0a\x03rgb" + b"\x22\x04\x12\x02\x22\x00",
        b"\x2a\x00" * 100_000,
        b"\x2a\x02\x0a\x00" * 100_000,
        b"\x3a\x00" * 100_000,
        pixels_request().SerializeToString()[:-1],
    ],
)
def test_bytes_that_are_no_request(channel, message):
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "ModelInfer", message)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in refused.value.details()


def test_unsigned_contents_are_read_as_they_are_packed(channel):
    reply = call(channel, "ModelInfer", numbers(solid("blue").ravel().tolist()).SerializeToString())
    response = service_pb2.ModelInferResponse.FromString(reply)
    assert response.raw_output_contents[2][4:] == b"blue"


def test_the_token_is_asked_for_in_metadata(toy_bundle):
    with (
        load(toy_bundle) as session,
        serving(session, ServerSettings(token="secret"), with_grpc=True) as server,
        triton.InferenceServerClient(server.grpc_address) as client,
    ):
        assert client.is_server_ready()
        for headers in (None, {"authorization": "Bearer wrong"}):
            with pytest.raises(InferenceServerException, match="Authorization: Bearer") as refused:
                client.infer("rgb", [pixels_input(["red"])], headers=headers)
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        known = {"authorization": "Bearer secret"}
        assert client.infer("rgb", [pixels_input(["red"])], headers=known).as_numpy("label") == [b"red"]


def test_a_full_queue_a_passed_deadline_and_a_client_that_leaves(toy_bundle):
    with (
        serving_gated(toy_bundle, settings(max_queue_size=1), with_grpc=True) as (server, gate),
        triton.InferenceServerClient(server.grpc_address) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(client.infer, "rgb", [pixels_input(["red"])])
        gate.wait_until_running()
        for own in ({"timeout": 20_000}, {"client_timeout": 0.05}):
            with pytest.raises(InferenceServerException) as late:
                client.infer("rgb", [pixels_input(["red"])], **own)
            assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"
            until(lambda: server.metric("vpdeploy_queue_images") == 0)

        leaving = client.async_infer("rgb", [pixels_input(["red"])], lambda result, error: None)
        until(lambda: server.metric("vpdeploy_queue_images") == 1)
        with pytest.raises(InferenceServerException, match="images wait already") as refused:
            client.infer("rgb", [pixels_input(["red"])])
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        leaving.cancel()
        until(lambda: server.metric("vpdeploy_queue_images") == 0)

        gate.permit(10)
        assert first.result().as_numpy("label") == [b"red"]
        assert gate.batch_sizes == [1]
        until(lambda: server.metric("vpdeploy_requests_total", task="rgb", status="499") >= 1)
        assert server.metric("vpdeploy_body_bytes") == 0


def test_messages_and_streams_take_places_of_which_no_client_has_all(toy_bundle):
    limits = ServerSettings(max_message_bytes=1000, max_buffered_bytes=8000, max_client_bytes=4000)
    with (
        load(toy_bundle) as session,
        serving(session, limits, with_grpc=True) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, "ModelInfer", bytes(2000))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

        stall: queue.Queue = queue.Queue()
        streams = [channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter(stall.get, None)) for _ in range(2)]
        streams_open = server.grpc_server._streams._taken
        until(lambda: sum(streams_open.values()) == 2)
        third = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter([b""]))
        with pytest.raises(grpc.RpcError, match="as many streams open") as refused:
            next(third)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(channel, "ServerLive") == b"\x08\x01"
        for stream in streams:
            stream.cancel()
            stall.put(None)
        until(lambda: not streams_open)


def test_accepted_calls_are_answered_at_the_end_and_later_ones_are_unavailable(toy_bundle):
    with (
        serving_gated(toy_bundle, settings(), with_grpc=True) as (server, gate),
        triton.InferenceServerClient(server.grpc_address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.infer, "rgb", [pixels_input(["red"])])
        gate.wait_until_running()
        server.stop()

        def is_refused():
            with grpc.insecure_channel(server.grpc_address) as late:
                try:
                    call(late, "ServerReady")
                except grpc.RpcError as error:
                    return error.code() == grpc.StatusCode.UNAVAILABLE
                return False

        until(is_refused)
        gate.permit(10)
        assert first.result().as_numpy("label") == [b"red"]
        server.join()


def test_a_message_that_does_not_arrive_ends_its_call_and_an_idle_stream_does_not_hold_up_the_end(toy_bundle):
    limits = ServerSettings(body_timeout_s=0.1)
    with (
        load(toy_bundle) as session,
        serving(session, limits, with_grpc=True) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        never: queue.Queue = queue.Queue()
        with pytest.raises(grpc.RpcError) as ended:
            channel.stream_unary(f"{SERVICE}/ModelInfer")(iter(never.get, None))
        assert ended.value.code() == grpc.StatusCode.CANCELLED
        stream = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter(never.get, None))
        until(lambda: server.grpc_server._streams._taken)
        server.stop()
        server.join()
        with pytest.raises(grpc.RpcError):
            next(stream)
        for _ in range(2):
            never.put(None)


def test_an_address_in_use_is_refused_in_one_line(server):
    port = int(server.grpc_address.rpartition(":")[2])
    with pytest.raises(SpecError, match=r"cannot listen on .* choose another --host or --grpc-port"):
        GrpcServer("127.0.0.1", port, ServerSettings())
