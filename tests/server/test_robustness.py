"""What no client may bring the server to: every bad request is refused in one line, and the server lives on."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import random
import socket
import struct
import zlib

import httpx
import pytest
from server.running import RunningServer, serving, until
from server.toy_bundle import SIDE, encoded, solid

from vpdeploy import load
from vpdeploy.server.settings import ServerSettings

INFER = "/v2/models/rgb/infer"
HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def strict_server(toy_bundle):
    """A server with limits that small requests reach."""
    settings = ServerSettings(
        max_body_bytes=100_000, max_json_bytes=20_000, max_images=4, max_pixels=10_000, max_buffered_bytes=150_000
    )
    with load(toy_bundle) as session, serving(session, settings) as server:
        yield server


@pytest.fixture
def strict(strict_server):
    with httpx.Client(base_url=strict_server.url, timeout=30) as client:
        yield client


def tensor(**fields):
    return {"name": "image", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], **fields}


def binary_request(document: dict, raw: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(document).encode()
    return text + raw, {HEADER: str(len(text))}


def pixels_request() -> tuple[bytes, dict[str, str]]:
    raw = solid("red").tobytes()
    return binary_request({"inputs": [tensor(parameters={"binary_data_size": len(raw)})]}, raw)


def files_request(*files: bytes) -> tuple[bytes, dict[str, str]]:
    raw = b"".join(struct.pack("<I", len(file)) + file for file in files)
    entry = tensor(datatype="BYTES", shape=[len(files)], parameters={"binary_data_size": len(raw)})
    return binary_request({"inputs": [entry]}, raw)


def assert_refused(response: httpx.Response, status: int = 400, text: str = "") -> None:
    assert response.status_code == status, response.text
    message = response.json()["error"]
    assert text in message
    assert "\n" not in message
    assert "Traceback" not in message


BAD_DOCUMENTS = {
    "no inputs": ({}, "exactly one input"),
    "inputs of another type": ({"inputs": "image"}, "'inputs' should be list"),
    "two inputs": ({"inputs": [tensor(), tensor()]}, "exactly one input"),
    "another input": ({"inputs": [tensor(name="pixels")]}, "found 'pixels'"),
    "an input that is a number": ({"inputs": [1]}, "exactly one input"),
    "a name that is a list": ({"inputs": [tensor(name=[])]}, "exactly one input"),
    "another datatype": ({"inputs": [tensor(datatype="FP32")]}, "found 'FP32'"),
    "a datatype that is a number": ({"inputs": [tensor(datatype=8)]}, "'datatype' should be str"),
    "no shape": ({"inputs": [{"name": "image", "datatype": "UINT8"}]}, "should have shape"),
    "a scalar shape": ({"inputs": [tensor(shape=[])]}, "should have shape"),
    "another size": ({"inputs": [tensor(shape=[1, SIDE, SIDE, 4])]}, "should have shape"),
    "a negative batch": ({"inputs": [tensor(shape=[-1, SIDE, SIDE, 3])]}, "at least one image"),
    "an empty batch": ({"inputs": [tensor(shape=[0, SIDE, SIDE, 3])]}, "at least one image"),
    "a fractional batch": ({"inputs": [tensor(shape=[1.0, SIDE, SIDE, 3])]}, "list of integers"),
    "a true batch": ({"inputs": [tensor(shape=[True, SIDE, SIDE, 3])]}, "list of integers"),
    "no data": ({"inputs": [tensor()]}, "should have 768 bytes, found 0"),
    "too little data": ({"inputs": [tensor(data=[0] * 767)]}, "should have 768 bytes, found 767"),
    "data out of range": ({"inputs": [tensor(data=[256] * 768)]}, "integers in [0, 255]"),
    "negative data": ({"inputs": [tensor(data=[-1] * 768)]}, "integers in [0, 255]"),
    "fractions": ({"inputs": [tensor(data=[0.5] * 768)]}, "integers in [0, 255]"),
    "strings as pixels": ({"inputs": [tensor(data=["a"] * 768)]}, "integers in [0, 255]"),
    "one long string among pixels": ({"inputs": [tensor(data=["a" * 5000] + [1] * 3000)]}, "integers in [0, 255]"),
    "ragged data": ({"inputs": [tensor(data=[[1, 2], 3])]}, "nested unevenly"),
    "objects as data": ({"inputs": [tensor(data=[{}] * 768)]}, "integers in [0, 255]"),
    "data that is a number": ({"inputs": [tensor(data=5)]}, "'data' should be list"),
    "text that is no base64": ({"inputs": [tensor(datatype="BYTES", shape=[1], data=["not base64!"])]}, "base64"),
    "text beyond ASCII": ({"inputs": [tensor(datatype="BYTES", shape=[1], data=["é\ud800"])]}, "base64"),
    "too few strings": ({"inputs": [tensor(datatype="BYTES", shape=[2], data=["AAAA"])]}, "expected 2 encoded files"),
    "numbers as files": ({"inputs": [tensor(datatype="BYTES", shape=[1], data=[1])]}, "should be strings"),
    "shared memory": ({"inputs": [tensor(parameters={"shared_memory_region": "x"})]}, "not supported"),
    "a binary size without bytes": ({"inputs": [tensor(parameters={"binary_data_size": 768})]}, "0 bytes follow"),
    "a negative binary size": ({"inputs": [tensor(parameters={"binary_data_size": -1})]}, "0 bytes follow"),
    "a huge binary size": ({"inputs": [tensor(parameters={"binary_data_size": 10**30})]}, "0 bytes follow"),
    "both kinds of data": ({"inputs": [tensor(data=[], parameters={"binary_data_size": 0})]}, "send one of them"),
    "parameters that are a list": ({"inputs": [tensor()], "parameters": []}, "'parameters' should be dict"),
    "an id that is a number": ({"id": 5, "inputs": [tensor(data=[0] * 768)]}, "'id' should be str"),
    "a negative timeout": ({"inputs": [tensor(data=[0] * 768)], "parameters": {"timeout": -1}}, "timeout"),
    "an endless timeout": ({"inputs": [tensor(data=[0] * 768)], "parameters": {"timeout": 10**40}}, "timeout"),
    "another output": ({"inputs": [tensor(data=[0] * 768)], "outputs": [{"name": "x"}]}, "outputs are logits"),
    "an output that is a list": ({"inputs": [tensor(data=[0] * 768)], "outputs": [[]]}, "outputs are logits"),
    "an output twice": ({"inputs": [tensor(data=[0] * 768)], "outputs": [{"name": "label"}] * 2}, "asked for twice"),
    "classes of labels": (
        {
            "inputs": [tensor(data=[0] * 768)],
            "outputs": [{"name": "label", "parameters": {"classification": 1}}],
        },
        "classification",
    ),
    "a negative class count": (
        {
            "inputs": [tensor(data=[0] * 768)],
            "outputs": [{"name": "logits", "parameters": {"classification": -1}}],
        },
        "classification",
    ),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_documents_that_are_no_request(client, name):
    document, text = BAD_DOCUMENTS[name]
    assert_refused(client.post(INFER, content=json.dumps(document)), 400, text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe{\x00}\x00",
        b'{"id": "\xff"}',
        b"[" * 15_000,
        b'{"a":' * 3000,
        b'{"inputs": NaN}',
        b"1" * 5000,
        b"{} trailing",
    ],
)
def test_bodies_that_are_no_json_object(client, body):
    assert_refused(client.post(INFER, content=body))


@pytest.mark.parametrize("length", ["-1", "0", "1", "999999999", "9" * 30, "ten", "1e2", "٣", "", "5 5"])
def test_wrong_header_lengths(client, length):
    body, _ = pixels_request()
    assert_refused(client.post(INFER, content=body, headers=[(HEADER.encode(), length.encode())]))


def test_bytes_that_no_input_claims(client):
    body, headers = binary_request({"inputs": [tensor(data=[0] * 768)]}, b"more")
    assert_refused(client.post(INFER, content=body, headers=headers), 400, "4 bytes follow the JSON")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x00", "should hold 1 elements, found 0"),
        (b"\xff\xff\xff\xff", "should have 4294967295 bytes, 0 are left"),
        (struct.pack("<I", 2) + b"abc", "1 more bytes"),
        (b"", "should hold 1 elements"),
    ],
)
def test_binary_elements_that_do_not_fit(client, raw, text):
    entry = tensor(datatype="BYTES", shape=[1], parameters={"binary_data_size": len(raw)})
    body, headers = binary_request({"inputs": [entry]}, raw)
    assert_refused(client.post(INFER, content=body, headers=headers), 400, text)


@pytest.mark.parametrize("cut", [0, 1, 20, 200, -40])
def test_damaged_images_name_no_internals(client, cut):
    image = encoded("red", side=300, file_format="JPEG")[:cut]
    body, headers = files_request(encoded("red"), image)
    assert_refused(client.post(INFER, content=body, headers=headers), 400, "not a readable image")


def test_one_damaged_image_fails_its_own_request_only(client):
    assert_refused(client.post("/v1/tasks/rgb:predict", content=b"GIF89a nonsense"), 400, "not a readable image")
    assert client.post("/v1/tasks/rgb:predict", content=encoded("red")).status_code == 200


def test_a_file_that_names_a_path_is_not_opened(client):
    assert_refused(client.post("/v1/tasks/rgb:predict", content=b"/etc/passwd"), 400, "not in a known image format")


@pytest.mark.parametrize(
    "name", ["..", "../manifest.json", "%2e%2e%2fmanifest.json", "rgb%00", "a" * 5000, "(unknown)"]
)
def test_task_names_reach_no_files(client, name):
    response = client.post(f"/v2/models/{name}/infer", content=b"{}")
    assert response.status_code in (404, 405)


def test_too_many_pixels(strict):
    assert_refused(strict.post("/v1/tasks/rgb:predict", content=encoded("red", side=101)), 400, "10000 pixels")
    assert strict.post("/v1/tasks/rgb:predict", content=encoded("red", side=100)).status_code == 200


def test_too_many_images(strict):
    body, headers = files_request(*[encoded("red")] * 5)
    assert_refused(strict.post(INFER, content=body, headers=headers), 413, "at most 4 images")
    files = [("image", ("a.png", encoded("red")))] * 5
    assert_refused(strict.post("/v1/tasks/rgb:predict", files=files), 400, "Too many files")


def test_too_much_json(strict):
    text = base64.b64encode(b"x" * 20_000).decode()
    document = {"inputs": [tensor(datatype="BYTES", shape=[1], data=[text])]}
    assert_refused(strict.post(INFER, content=json.dumps(document)), 413, "send images as binary data")


def test_a_body_that_says_it_is_too_large(strict):
    assert_refused(strict.post(INFER, content=bytes(100_001)), 413, "100000 bytes")


def test_a_body_that_turns_out_too_large(strict):
    def chunks():
        for _ in range(40):
            yield bytes(10_000)

    assert_refused(strict.post(INFER, content=chunks()), 413, "100000 bytes")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_decompression_bomb(strict, encoding):
    compressor = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    bomb = compressor(bytes(50_000_000))
    assert len(bomb) < 100_000
    assert_refused(strict.post(INFER, content=bomb, headers={"content-encoding": encoding}), 413, "100000 bytes")


@pytest.mark.parametrize(
    ("encoding", "content", "text"),
    [
        ("gzip", b"no gzip", "not valid gzip"),
        ("deflate", b"no deflate", "not valid deflate"),
        ("gzip", gzip.compress(b"{}" * 500, mtime=0)[:-9], "truncated"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", "overlong"),
        ("gzip", b"", "truncated"),
        ("br", b"{}", "expected gzip or deflate"),
        ("gzip, gzip", b"{}", "expected gzip or deflate"),
    ],
)
def test_bad_compression(client, encoding, content, text):
    assert_refused(client.post(INFER, content=content, headers={"content-encoding": encoding}), 400, text)


def test_all_bodies_together_are_bounded(strict_server):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n".encode()
    with (
        socket.create_connection(strict_server.address.split(":"), timeout=30) as first,
        httpx.Client(base_url=strict_server.url, timeout=30) as client,
    ):
        first.sendall(head + bytes(89_000))
        until(lambda: strict_server.metric("vpdeploy_body_bytes") == 89_000)
        response = client.post(INFER, content=bytes(90_000))
        assert_refused(response, 429, "150000 bytes")
        assert response.headers["retry-after"] == "1"
        first.sendall(bytes(1000))
        assert first.recv(100).startswith(b"HTTP/1.1 413")  # 90000 bytes of JSON are too many, but were read
    until(lambda: strict_server.metric("vpdeploy_body_bytes") == 0)


def mutate(rng: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(5)
        position = rng.randrange(len(data) + 1) if rng.random() < 0.3 else rng.randrange(min(len(data), 200) + 1)
        if kind == 0 and position < len(data):
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[position : position + rng.randint(1, 20)] = b""
        elif kind == 2:
            data[position:position] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            data[position : position + 1] = rng.choice(
                [b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"\x00", b"9" * 30]
            )
        else:
            del data[position:]
        data = data or bytearray(b"0")
    return bytes(data)


def test_mutated_requests_never_break_the_server(toy_server: RunningServer):
    rng = random.Random(20261121)
    seeds = [pixels_request(), files_request(encoded("red")), files_request(encoded("blue", file_format="JPEG"))]
    outputs = [{"name": "logits", "parameters": {"binary_data": True, "classification": 2}}, {"name": "label"}]
    document = {
        "id": "7",
        "parameters": {"timeout": 5_000_000, "binary_data_output": True},
        "inputs": [tensor(shape=[1], datatype="BYTES", data=[base64.b64encode(encoded("green")).decode()])],
        "outputs": outputs,
    }
    seeds.append((json.dumps(document).encode(), {}))
    statuses = []
    with httpx.Client(base_url=toy_server.url, timeout=30) as client:
        for _ in range(600):
            body, headers = rng.choice(seeds)
            if headers and rng.random() < 0.1:
                headers = {HEADER: str(rng.randint(-5, len(body) + 5))}
            response = client.post(INFER, content=mutate(rng, body), headers=headers)
            statuses.append(response.status_code)
            if response.status_code != 200:
                assert "\n" not in response.json()["error"]
        assert set(statuses) <= {200, 400, 413, 504}
        assert statuses.count(400) > 300
        body, headers = pixels_request()
        assert client.post(INFER, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v2/models/rgb/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2/models/rgb/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_http_leaves_the_server_alive(toy_server, client, raw):
    with (
        contextlib.suppress(OSError),  # the server may hang up while we are still sending
        socket.create_connection(toy_server.address.split(":"), timeout=30) as connection,
    ):
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)
    assert client.get("/v2/health/live").status_code == 200
