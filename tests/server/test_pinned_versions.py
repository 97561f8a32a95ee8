"""Versions that are asked for by number while another one is served."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from server.running import serving, until
from server.toy_bundle import encoded, prompt_set, solid, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import TaskNotFoundError
from vpdeploy.format.bundle import publish_task, roll_back_task, withdraw_task
from vpdeploy.server.settings import ServerSettings
from vpdeploy.session.session import MOST_PINNED

TOKENS = '[[token]]\nname = "a"\ntoken = "all"\nscopes = ["infer"]\n[[token]]\nname = "b"\ntoken = "few"\n'


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Task "many" in eight versions, each with its number in its labels."""
    path = write_toy_bundle(tmp_path_factory.mktemp("versions") / "zoo").path
    for number in range(1, 9):
        publish_task(path, prompt_set("many", (f"red-{number}", f"green-{number}"), prefix=number))
    return path


@pytest.fixture(scope="module")
def server(zoo):
    token_file = zoo.parent / "tokens.toml"
    token_file.write_text(f'{TOKENS}scopes = ["infer"]\ntasks = ["rgb"]\n')
    with load(zoo) as session, serving(session, ServerSettings(token_file=token_file)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": "Bearer all"}) as client:
        yield client


def best(answer: dict) -> tuple[int, str]:
    return answer["version"], answer["predictions"][0]["label"]


@pytest.mark.parametrize("version", [1, 5, 8])
def test_a_version_is_asked_by_every_protocol(server, client, version):
    for path in (f"/v1/tasks/many/versions/{version}:predict", f"/v1/tasks/many@{version}:predict"):
        assert best(client.post(path, content=encoded("green")).json()) == (version, f"green-{version}")
    assert client.get(f"/v2/models/many/versions/{version}").json()["versions"] == [str(version)]
    assert client.get(f"/v2/models/many/versions/{version}/ready").status_code == 200
    image = triton.InferInput("image", [1, 16, 16, 3], "UINT8").set_data_from_numpy(solid("red")[None])
    asked = triton.InferenceServerClient(server.address)
    answer = asked.infer("many", [image], model_version=str(version), headers={"authorization": "Bearer all"})
    assert answer.as_numpy("label")[0] == f"red-{version}".encode()
    assert answer.get_response()["model_version"] == str(version)
    asked.close()
    assert best(client.post("/v1/tasks/many:predict", content=encoded("green")).json()) == (8, "green-8")


def test_one_image_is_put_to_several_versions(client):
    answers = client.post("/v1/predict?tasks=many@2,many,many@7,rgb", content=encoded("red")).json()["tasks"]
    assert [best(each) for each in answers] == [(2, "red-2"), (8, "red-8"), (7, "red-7"), (1, "red")]


def test_a_few_versions_stay_loaded(server, client):
    for version in (1, 2, 3, 4, 5, 6, 7, 1, 2):
        answer = client.post(f"/v1/tasks/many@{version}:predict", content=encoded("red")).json()
        assert best(answer) == (version, f"red-{version}")
    assert server.session._directory.pinned == ("many@6", "many@7", "many@1", "many@2")
    assert server.session.describe().slots_used == len(server.session.tasks) + MOST_PINNED
    assert "many" in server.session.tasks
    assert not any("@" in task for task in server.session.tasks)


@pytest.mark.parametrize("version", ["9", "0", "x", "1.0", "99999999999", "²", "-1", "1@2"])
def test_versions_that_there_are_not(client, version):
    for path in (f"/v1/tasks/many@{version}:predict", f"/v1/tasks/many/versions/{version}:predict"):
        assert client.post(path, content=encoded("red")).status_code == 404
    assert client.get(f"/v2/models/many/versions/{version}").status_code == 404


def test_a_version_of_a_task_that_is_not_there_for_a_token(client):
    headers = {"authorization": "Bearer few"}
    there, not_there = (
        client.post(f"/v1/tasks/{task}:predict", content=encoded("red"), headers=headers)
        for task in ("many@1", "nowhere@1")
    )
    assert there.status_code == 404
    assert there.content == not_there.content
    assert client.get("/v2/models/many/versions/1", headers=headers).status_code == 404
    assert client.post("/v1/tasks/rgb@1:predict", content=encoded("red"), headers=headers).status_code == 200


def run(session, reference: str) -> float:
    with session.lease(reference) as lease:
        logits = session.run(solid("red")[None], np.array([lease.slot], np.int32))
    return float(logits[0, 0])


def test_versions_follow_the_bundle(tmp_path):
    zoo = write_toy_bundle(tmp_path / "zoo").path
    for scale in (1.0, 2.0, 3.0):
        publish_task(zoo, prompt_set("task", ("red", "green"), scale=scale))
    with load(zoo) as session:
        session.load_version("task", 1)
        session.load_version("task", 1)
        assert (run(session, "task@1"), run(session, "task"), run(session, "task@3")) == pytest.approx((1, 3, 3))
        used = session.describe().slots_used

        # A roll-back serves a version that was loaded beside: it takes one slot, not two.
        roll_back_task(zoo, "task")
        session.sync()
        session.load_version("task", 3)
        assert (run(session, "task"), run(session, "task@3"), run(session, "task@1")) == pytest.approx((2, 3, 1))
        roll_back_task(zoo, "task")
        session.sync()
        assert run(session, "task") == pytest.approx(1)
        assert session.describe().slots_used == used

        # A lease outlives its version.
        lease = session.lease("task@3")
        withdraw_task(zoo, "task")
        session.sync()
        assert session.run(solid("red")[None], np.array([lease.slot], np.int32))[0, 0] == pytest.approx(3)
        lease.release()
        for reference in ("task", "task@1", "task@3"):
            with pytest.raises(TaskNotFoundError):
                session.lease(reference)
        with pytest.raises(TaskNotFoundError):
            session.load_version("task", 1)
        assert session.describe().slots_used == len(session.tasks)


def test_who_stays_with_a_version_is_answered_by_it_while_others_are_published(tmp_path):
    zoo = write_toy_bundle(tmp_path / "zoo").path
    settings = ServerSettings(watch=zoo, watch_interval_s=0.01)
    stop, wrong, answered = threading.Event(), [], []

    def ask(version: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                answer = client.post(f"/v1/tasks/rgb@{version}:predict", content=encoded("red"))
                answered.append(version)
                if answer.status_code != 200 or best(answer.json()) != (
                    version,
                    f"red-{version}" if version > 1 else "red",
                ):
                    wrong.append((version, answer.text))

    with load(zoo) as session, serving(session, settings) as server, ThreadPoolExecutor(4) as pool:
        asking = []
        try:
            for version in range(1, 5):
                asking.append(pool.submit(ask, version))
                until(lambda version=version: answered.count(version) > 5)
                publish_task(zoo, prompt_set("rgb", (f"red-{version + 1}", "green")))
                until(lambda version=version: session._directory.versions()["rgb"] == version + 1)
        finally:
            stop.set()
        for each in asking:
            each.result(60)
    assert wrong == []
    assert set(answered) == {1, 2, 3, 4}
