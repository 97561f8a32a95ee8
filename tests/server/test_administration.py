"""The administration: published at once and for all, by those who may, and never half of it."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from server.running import TIMEOUT_S, serving
from server.toy_bundle import TASKS, encoded, prompt_set, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import LayoutMismatchError, MissingExtraError, ParityError, SpecError
from vpdeploy.format.bundle import Bundle
from vpdeploy.server.app import create_app
from vpdeploy.server.recompiling import _failure, _without_places
from vpdeploy.server.settings import ServerSettings

TOKENS = """
[[token]]
name = "keeper"
token = "keeper"
scopes = ["admin"]
[[token]]
name = "florist"
token = "florist"
scopes = ["admin", "infer"]
tasks = ["mine", "rgb"]
[[token]]
name = "user"
token = "user"
scopes = ["infer"]
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("admin") / "zoo").path


@pytest.fixture(scope="module")
def server(zoo):
    token_file = zoo.parent / "tokens.toml"
    token_file.write_text(TOKENS)
    settings = ServerSettings(token_file=token_file, administered=zoo, max_body_bytes=1 << 20)
    with load(zoo) as session, serving(session, settings) as server:
        yield server


@pytest.fixture(scope="module")
def keeper(server):
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": "Bearer keeper"}) as client:
        yield client


@pytest.fixture(scope="module")
def user(server):
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": "Bearer user"}) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_half_written(zoo):
    yield
    for name, entry in Bundle.open(zoo).manifest.tasks.items():
        assert {int(folder.name) for folder in (zoo / "tasks" / name).iterdir()} == set(entry.files)
    assert not list(zoo.rglob("*.partial"))


def files_of(task: str, labels: tuple[str, ...] = ("red", "green"), **options) -> dict[str, bytes]:
    return prompt_set(task, labels, **options).encode()


def tar_of(files: dict[str, bytes], *, mode: str = "w:gz", **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def in_folder(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"{folder}{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    "pack",
    [
        tar_of,
        lambda files: tar_of(files, mode="w"),
        lambda files: tar_of(files, mode="w", format=tarfile.USTAR_FORMAT),
        lambda files: tar_of(in_folder(files, "./"), format=tarfile.GNU_FORMAT),
        lambda files: tar_of(in_folder(files, "./")),
        lambda files: tar_with(change_to(name=".", type=tarfile.DIRTYPE), in_folder(files, "./")),
        lambda files: tar_of(in_folder({**files, "plots/a.png": b"x"}, "run/")),
        zip_of,
        lambda files: zip_of(in_folder(files, "1/"), compression=zipfile.ZIP_STORED),
    ],
)
def test_an_archive_of_a_prompt_set_is_served_at_once(keeper, user, pack):
    published = keeper.put("/v1/tasks/new", content=pack(files_of("new")))
    assert published.status_code == 200, published.text
    version = published.json()["version"]
    assert published.headers["etag"] == f'"{version}"'
    answer = user.post("/v1/tasks/new:predict?top=1", content=encoded("green")).json()
    assert (answer["version"], answer["predictions"][0]["label"]) == (version, "green")
    assert user.get("/v1/tasks/new").headers["etag"] == f'"{version}"'


def test_versions_are_listed_rolled_back_and_withdrawn(keeper, user):
    for labels in (("red", "green"), ("blue", "green", "red")):
        assert keeper.put("/v1/tasks/tour", content=tar_of(files_of("tour", labels))).status_code == 200
    listed = {each["task"]: each["versions"] for each in keeper.get("/v1/versions").json()["tasks"]}
    first, second = listed["tour"]
    assert (first["classes"], second["classes"]) == (2, 3)
    assert (first["served"], second["served"]) == (False, True)
    assert first["size_bytes"] == prompt_set("tour", ("red", "green")).size_bytes
    assert set(TASKS) <= set(listed)

    back = keeper.post("/v1/tasks/tour:rollback")
    assert back.json() == {"task": "tour", "version": first["version"]}
    assert user.get("/v1/tasks/tour").json()["labels"] == ["red", "green"]
    refused = keeper.post("/v1/tasks/tour:rollback")
    assert refused.status_code == 400
    assert "nothing to roll back to" in refused.json()["error"]

    gone = keeper.delete("/v1/tasks/tour")
    assert gone.json() == {"task": "tour", "versions": [first["version"], second["version"]]}
    assert user.get("/v1/tasks/tour").status_code == 404
    assert keeper.delete("/v1/tasks/tour").status_code == 404


def test_a_change_is_made_only_to_the_version_it_was_meant_for(keeper, zoo):
    archive = tar_of(files_of("tagged"))

    def put(**headers):
        return keeper.put("/v1/tasks/tagged", content=archive, headers=headers)

    assert put(**{"if-match": "*"}).status_code == 412
    created = put(**{"if-none-match": "*"})
    assert created.status_code == 200
    assert put(**{"if-none-match": "*"}).status_code == 412
    tag = created.headers["etag"]
    missed = put(**{"if-match": '"999"'})
    assert missed.status_code == 412
    assert f"is at version {created.json()['version']}" in missed.json()["error"]
    second = put(**{"if-match": f'"999", {tag}'})
    assert second.status_code == 200
    assert keeper.delete("/v1/tasks/tagged", headers={"if-match": tag}).status_code == 412
    assert keeper.post("/v1/tasks/tagged:rollback", headers={"if-match": tag}).status_code == 412
    assert Bundle.open(zoo).versions["tagged"] == second.json()["version"]
    for wrong in ("x", '"1', "", '"1" "2"', '"1",x', "-1", 'W/"1"'):
        assert put(**{"if-match": wrong}).status_code == 400
    assert put(**{"if-none-match": '"1"'}).status_code == 400
    assert keeper.delete("/v1/tasks/tagged", headers={"if-match": "*"}).status_code == 200


def test_of_two_who_saw_the_same_version_one_wins(keeper):
    tag = keeper.put("/v1/tasks/race", content=tar_of(files_of("race"))).headers["etag"]
    archive, start = tar_of(files_of("race", ("blue", "red"))), threading.Barrier(6)

    def put(_: int) -> int:
        start.wait(TIMEOUT_S)
        return keeper.put("/v1/tasks/race", content=archive, headers={"if-match": tag}).status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(put, range(6))) == [200, 412, 412, 412, 412, 412]


def test_who_may_change_what(server, keeper, user, zoo):
    before = (zoo / "manifest.json").read_bytes()
    archive = tar_of(files_of("bgr"))
    for method, path in (("PUT", "/v1/tasks/bgr"), ("DELETE", "/v1/tasks/bgr"), ("POST", "/v1/tasks/bgr:rollback")):
        refused = user.request(method, path, content=archive)
        assert refused.status_code == 403
        assert "needs the scope admin" in refused.json()["error"]
        limited = keeper.request(method, path, content=archive, headers={"authorization": "Bearer florist"})
        assert limited.status_code == 404
    assert user.get("/v1/versions").status_code == 403
    assert (zoo / "manifest.json").read_bytes() == before

    florist = {"authorization": "Bearer florist"}
    assert keeper.put("/v1/tasks/mine", content=tar_of(files_of("mine")), headers=florist).status_code == 200
    listed = keeper.get("/v1/versions", headers=florist).json()["tasks"]
    assert {each["task"] for each in listed} == {"mine", "rgb"}


def tar_with(change, files=None) -> bytes:
    """A tar file with one more member, changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (files_of("evil") if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("more")
        change(member)
        archive.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return buffer.getvalue()


def change_to(**fields):
    def change(member):
        for name, value in fields.items():
            setattr(member, name, value)

    return change


def zip_with_link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("task.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def zip_twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files_of("evil").items():
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("task.json", b"{}")
    return buffer.getvalue()


def card_with(**fields) -> bytes:
    files = files_of("evil")
    return tar_of({**files, "task.json": json.dumps({**json.loads(files["task.json"]), **fields}).encode()})


SPARSE = ("GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize")

HOSTILE = {
    "nothing": lambda: b"",
    "garbage": lambda: b"no archive" * 100,
    "an image": lambda: encoded("red"),
    "zeros": lambda: bytes(10240),
    "gzip of garbage": lambda: __import__("gzip").compress(b"garbage"),
    "truncated gzip": lambda: tar_of(files_of("evil"))[:-20],
    "truncated tar": lambda: tar_of(files_of("evil"), mode="w")[:1500],
    "truncated zip": lambda: zip_of(files_of("evil"))[:-10],
    "damaged zip": lambda: zip_of(files_of("evil")).replace(b"PK\x01\x02", b"PK\x01\x09"),
    "a path up": lambda: tar_with(change_to(name="../../evil", size=1)),
    "a path up inside": lambda: tar_with(change_to(name="a/../../evil", size=1)),
    "an absolute path": lambda: tar_with(change_to(name="/etc/evil", size=1)),
    "a path of Windows": lambda: tar_with(change_to(name="..\\evil", size=1)),
    "a drive": lambda: tar_with(change_to(name="c:evil", size=1)),
    "a control character": lambda: tar_with(change_to(name="a\nb", size=1)),
    "a file without a name": lambda: tar_with(change_to(name=".", size=1)),
    "a folder up": lambda: tar_with(change_to(name="../evil", type=tarfile.DIRTYPE)),
    "a link": lambda: tar_with(change_to(type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": lambda: tar_with(change_to(type=tarfile.LNKTYPE, linkname="task.json")),
    "a device": lambda: tar_with(change_to(type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a pipe": lambda: tar_with(change_to(type=tarfile.FIFOTYPE)),
    "a sparse file": lambda: tar_with(change_to(type=tarfile.GNUTYPE_SPARSE)),
    "a sparse file by header": lambda: tar_with(
        change_to(size=1, pax_headers=dict(zip(SPARSE, ("1", "0", "9" * 12), strict=True)))
    ),
    "a size by header": lambda: tar_with(change_to(size=1, pax_headers={"size": "9" * 15})),
    "a long header": lambda: tar_with(change_to(size=1, pax_headers={"comment": "1" * 4000})),
    "a name twice": lambda: tar_with(change_to(name="task.json", size=1)),
    "a name twice, spelt otherwise": lambda: tar_with(change_to(name="./task.json", size=1)),
    "a name twice in a zip": zip_twice,
    "a link in a zip": zip_with_link,
    "a path up in a zip": lambda: zip_of(in_folder(files_of("evil"), "../")),
    "thousands of files": lambda: tar_of({f"{index}": b"" for index in range(1500)}),
    "thousands of files in a zip": lambda: zip_of({f"{index}": b"" for index in range(1500)}),
    "another packing": lambda: zip_of(files_of("evil"), compression=zipfile.ZIP_BZIP2),
    "no card": lambda: tar_of({"prompts.safetensors": b"x"}),
    "two cards": lambda: tar_of({**in_folder(files_of("evil"), "a/"), **in_folder(files_of("evil"), "b/")}),
    "no tensors": lambda: tar_of({"task.json": files_of("evil")["task.json"]}),
    "a card that is no JSON": lambda: tar_of({**files_of("evil"), "task.json": b"{"}),
    "a card that is deep": lambda: tar_of({**files_of("evil"), "task.json": b"[" * 100_000}),
    "a card of another format": lambda: card_with(format="vpdeploy.bundle"),
    "a card of another version": lambda: card_with(format_version=99),
    "another task": lambda: tar_of(files_of("other")),
    "a run of another task": lambda: card_with(format="vpdeploy.run", task={"name": "other"}),
    "a run that is none": lambda: card_with(format="vpdeploy.run", task={"name": 3}),
    "damaged tensors": lambda: tar_of({**files_of("evil"), "prompts.safetensors": b"\xff" * 100}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_one_line_and_change_nothing(keeper, zoo, name):
    before = (zoo / "manifest.json").read_bytes()
    refused = keeper.put("/v1/tasks/evil", content=HOSTILE[name]())
    assert refused.status_code == 400, refused.text
    assert "\n" not in refused.json()["error"]
    assert str(zoo) not in refused.text
    assert "Traceback" not in refused.text
    assert (zoo / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_bombs_are_not_unpacked(server, keeper, pack):
    bomb = pack({**files_of("evil"), "zeros": bytes(8 << 20)})
    assert len(bomb) < 100_000
    assert keeper.put("/v1/tasks/evil", content=bomb).status_code == 413
    assert keeper.put("/v1/tasks/evil", content=bytes(2 << 20)).status_code == 413
    assert server.service.budget.held_bytes == 0


def test_a_prompt_set_that_does_not_fit_is_refused(keeper):
    alien = prompt_set("alien", ("red", "green"))
    alien = replace(alien, card=replace(alien.card, backbone=replace(alien.card.backbone, sha256="0" * 64)))
    refused = keeper.put("/v1/tasks/alien", content=tar_of(alien.encode()))
    assert refused.status_code == 409
    assert "belongs to backbone" in refused.json()["error"]


def test_values_that_are_not_finite_are_refused(keeper):
    broken = prompt_set("broken", ("red", "green"))
    head = np.full_like(broken.tensors["head_weight"], np.nan)
    broken = replace(broken, tensors={**broken.tensors, "head_weight": head})
    refused = keeper.put("/v1/tasks/broken", content=tar_of(broken.encode()))
    assert refused.status_code == 400
    assert "not finite" in refused.json()["error"]


def test_a_full_disk_is_507_and_changes_nothing(keeper, user, zoo, monkeypatch):
    before = (zoo / "manifest.json").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vpdeploy.format.bundle.write_atomically", full)
    refused = keeper.put("/v1/tasks/full", content=tar_of(files_of("full")))
    assert refused.status_code == 507
    assert "the disk is full" in refused.json()["error"]
    monkeypatch.undo()
    assert (zoo / "manifest.json").read_bytes() == before
    assert user.get("/v1/tasks/full").status_code == 404


@pytest.mark.parametrize("task", ["a%20b", "%2e%2e", "..%2f..%2fx", "-x", "x" * 65])
def test_names_that_are_none_are_refused(keeper, zoo, task):
    assert keeper.put(f"/v1/tasks/{task}", content=tar_of(files_of("evil"))).status_code in (400, 404, 405)
    assert {path.name for path in zoo.parent.iterdir()} <= {"tokens.toml", "zoo", "zoo.graph.onnx"}


def test_without_a_token_for_it_the_administration_is_not_offered(zoo):
    for settings in (ServerSettings(administered=zoo), ServerSettings(administered=zoo, token="user")):
        with pytest.raises(SpecError, match="needs a token of its own"):
            create_app(None, settings)


def test_unless_enabled_nothing_can_be_changed(client):
    assert client.put("/v1/tasks/rgb", content=b"x").status_code == 405
    assert client.delete("/v1/tasks/rgb").status_code == 405
    assert client.post("/v1/tasks/rgb:rollback").status_code == 404
    assert client.get("/v1/versions").status_code == 404


def test_a_run_names_no_files_of_the_server():
    files = {"own.safetensors": b"", "task.json": b""}
    for weights, kept in (
        ("/etc/passwd", None),
        ("../x.pth", None),
        ("own.safetensors", "own.safetensors"),
        (None, None),
    ):
        card = json.dumps({"weights": weights, "data": {"spec": "hf:someone/something", "seed": 1}, "task": {}})
        fields = json.loads(_without_places(card.encode(), files))
        assert fields == {"weights": kept, "data": {"spec": None, "seed": 1}, "task": {}}


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("ParityError", "too far", ParityError),
        ("LayoutMismatchError", "does not fit", LayoutMismatchError),
        ("MissingExtraError", "'torch' is not installed", MissingExtraError),
        ("UsageError", "No such command 'add'.", MissingExtraError),
    ],
)
def test_what_the_compiler_says_keeps_its_kind(kind, message, error, tmp_path):
    told = _failure({"error": {"kind": kind, "message": message}}, "", tmp_path)
    assert type(told) is error
