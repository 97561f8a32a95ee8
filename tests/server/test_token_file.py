"""The token file: what it may hold, what each token may do, and that changes count while the server runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import httpx
import pytest
from server.running import serving
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.server.access import Scope
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import ForbiddenError, UnauthorizedError
from vpdeploy.server.tokens import TokenFile, read_access

ENTRY = '[[token]]\nname = "{name}"\ntoken = "{token}"\nscopes = {scopes}\n'


def entry(name: str, *scopes: str, tasks: list[str] | None = None) -> str:
    text = ENTRY.format(name=name, token=f"{name}-token", scopes=list(scopes))
    return text if tasks is None else f"{text}tasks = {tasks}\n"


def old(path: Path) -> Path:
    """Make a file old enough that its time of change tells."""
    path_time = path.stat().st_mtime - 60
    os.utime(path, (path_time, path_time))
    return path


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(entry("shop", "infer", tasks=["rgb", "warm"]) + entry("ops", "metrics") + entry("all", "infer"))
    return path


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-token"}


@pytest.fixture(scope="module")
def served(toy_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text(
        entry("shop", "infer", tasks=["rgb", "warm"])
        + entry("ops", "metrics")
        + entry("keeper", "admin", tasks=["bgr"])
        + entry("nobody", "infer", tasks=["none"])
    )
    with (
        load(toy_bundle) as session,
        serving(session, ServerSettings(token_file=path, token="plain")) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


def test_a_token_limited_to_tasks_sees_no_others(served):
    headers = bearer("shop")
    listed = served.get("/v1/tasks", headers=headers).json()["tasks"]
    assert [each["task"] for each in listed] == ["rgb", "warm"]
    index = served.post("/v2/repository/index", headers=headers).json()
    assert [each["name"] for each in index] == ["rgb", "warm", "@bundle"]
    assert served.post("/v1/tasks/rgb:predict", content=encoded("red"), headers=headers).status_code == 200
    fan_out = served.post("/v1/predict", content=encoded("red"), headers=headers).json()["tasks"]
    assert [each["task"] for each in fan_out] == ["rgb", "warm"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/tasks/{task}"),
        ("POST", "/v1/tasks/{task}:predict"),
        ("POST", "/v1/predict?tasks=rgb,{task}"),
        ("GET", "/v2/models/{task}"),
        ("GET", "/v2/models/{task}/config"),
        ("GET", "/v2/models/{task}/ready"),
        ("GET", "/v2/models/{task}/versions/1"),
        ("POST", "/v2/models/{task}/infer"),
    ],
)
def test_other_tasks_look_as_if_they_were_not_there(served, method, path):
    content = encoded("red") if method == "POST" else None
    there, not_there = (
        served.request(method, path.format(task=task), content=content, headers=bearer("shop"))
        for task in ("bgr", "nowhere")
    )
    assert there.status_code == 404
    assert there.content == not_there.content
    assert "bgr" not in there.text
    assert "rgb, warm" in there.text


def test_a_token_without_the_scope_is_told_which_one_it_lacks(served):
    refused = served.post("/v1/tasks/rgb:predict", content=encoded("red"), headers=bearer("ops"))
    assert refused.status_code == 403
    assert "needs the scope infer, the token has metrics" in refused.json()["error"]
    for path in ("/v1/tasks", "/v2/models/rgb"):
        assert served.get(path, headers=bearer("ops")).status_code == 403
    assert served.get("/metrics", headers=bearer("ops")).status_code == 200
    assert served.get("/metrics", headers=bearer("shop")).status_code == 403
    assert served.get("/v1/tasks", headers=bearer("keeper")).json()["tasks"][0]["task"] == "bgr"
    assert served.post("/v1/tasks/bgr:predict", content=encoded("red"), headers=bearer("keeper")).status_code == 403


def test_a_token_for_tasks_of_which_none_is_loaded_sees_none(served):
    assert served.get("/v1/tasks", headers=bearer("nobody")).json()["tasks"] == []
    refused = served.post("/v1/predict", content=encoded("red"), headers=bearer("nobody"))
    assert refused.status_code == 400


def test_the_single_token_is_good_beside_the_file(served):
    headers = {"authorization": "Bearer plain"}
    assert len(served.get("/v1/tasks", headers=headers).json()["tasks"]) == 3
    assert served.get("/metrics", headers=headers).status_code == 200


def test_a_token_may_be_given_as_its_digest(tmp_path):
    path = tmp_path / "tokens.toml"
    digest = hashlib.sha256(b"secret").hexdigest()
    path.write_text(f'[[token]]\nname = "a"\nsha256 = "{digest.upper()}"\nscopes = ["infer", "admin"]\n')
    access = read_access(token=None, admin_token=None, token_file=path)
    assert access.grant(b"Bearer secret").scopes == {Scope.INFER, Scope.ADMIN}
    with pytest.raises(UnauthorizedError):
        access.grant(f"Bearer {digest}".encode())


def test_the_single_tokens_scopes():
    access = read_access(token="one", admin_token="two", token_file=None)
    with pytest.raises(ForbiddenError):
        access.grant(b"Bearer one").require(Scope.ADMIN)
    access.grant(b"Bearer two").require(Scope.ADMIN)
    with pytest.raises(SpecError, match="the same"):
        read_access(token="one", admin_token="one", token_file=None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no token"),
        ("token = 3", "holds no token"),
        ("[[token]", "not valid TOML"),
        ("[[token]]\ntoken = secret-word", "not valid TOML, line 2"),
        ('[[tokens]]\nname = "a"', "unknown entry 'tokens'"),
        ('[[token]]\ntoken = "a"\nscopes = ["infer"]', "'name' should be"),
        ('[[token]]\nname = "a"\nscopes = ["infer"]', "one of 'token' and 'sha256'"),
        ('[[token]]\nname = "a"\ntoken = "b"\nsha256 = "c"\nscopes = ["infer"]', "one of 'token' and 'sha256'"),
        ('[[token]]\nname = "a"\nsha256 = "c"\nscopes = ["infer"]', "64 hexadecimal digits"),
        ('[[token]]\nname = "a"\ntoken = ""\nscopes = ["infer"]', "printable ASCII"),
        ('[[token]]\nname = "a"\ntoken = "a b"\nscopes = ["infer"]', "printable ASCII"),
        ('[[token]]\nname = "a"\ntoken = 7\nscopes = ["infer"]', "'token' should be text"),
        ('[[token]]\nname = "a"\ntoken = "b"', "'scopes' should be a list"),
        ('[[token]]\nname = "a"\ntoken = "b"\nscopes = []', "'scopes' should be a list"),
        ('[[token]]\nname = "a"\ntoken = "b"\nscopes = ["infr"]', "unknown scope 'infr'; did you mean 'infer'?"),
        ('[[token]]\nname = "a"\ntoken = "b"\nscope = ["infer"]', "unknown key 'scope'; did you mean 'scopes'?"),
        ('[[token]]\nname = "a"\ntoken = "b"\nscopes = ["infer"]\ntasks = ["../x"]', "cannot name a task"),
        ('[[token]]\nname = "a"\ntoken = "b"\nscopes = ["infer", "metrics"]\ntasks = ["x"]', "tell of all tasks"),
        (entry("a", "infer") + entry("a", "infer").replace("a-token", "b"), "has the name of another"),
        (entry("a", "infer") + entry("b", "infer").replace("b-token", "a-token"), "has the token of another"),
        ("#" * (257 << 10), "at most"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_tells_no_token(tmp_path, text, complaint):
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as refused:
        TokenFile(path)
    assert complaint in str(refused.value)
    assert str(path) in str(refused.value)
    assert "secret-word" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        TokenFile(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="cannot be read"):
        TokenFile(tmp_path)


def test_a_token_of_the_file_that_is_an_option_too_is_refused(file):
    with pytest.raises(SpecError, match="given as an option too"):
        read_access(token="shop-token", admin_token=None, token_file=file)


def names(tokens: TokenFile) -> set[str]:
    return {grant.name for grant in tokens.grants().values()}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += 1.5


def test_changes_of_the_file_count_within_a_second_and_wrong_ones_change_nothing(file, caplog):
    caplog.set_level("INFO", logger="vpdeploy")
    clock = Clock()
    tokens = TokenFile(old(file), clock=clock)
    assert names(tokens) == {"shop", "ops", "all"}

    file.write_text(entry("new", "infer"))
    assert names(tokens) == {"shop", "ops", "all"}  # it was looked at a moment ago
    clock.advance()
    assert names(tokens) == {"new"}

    caplog.clear()
    for broken in ("[[token", "[[token", ""):
        file.write_text(broken)
        clock.advance()
        assert names(tokens) == {"new"}
    file.unlink()
    for _ in range(3):
        clock.advance()
        assert names(tokens) == {"new"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3  # one for each different complaint
    assert all("the tokens stay as they were" in line for line in lines)

    file.write_text(entry("newer", "infer"))
    clock.advance()
    assert names(tokens) == {"newer"}


def test_a_change_within_the_resolution_of_the_files_time_is_seen(file):
    clock = Clock()
    tokens = TokenFile(file, clock=clock)
    status = file.stat()
    file.write_text(file.read_text().replace("shop", "shed"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    clock.advance()
    assert names(tokens) == {"shed", "ops", "all"}


def test_a_withdrawn_token_is_refused_while_the_server_runs(toy_bundle, file):
    with (
        load(toy_bundle) as session,
        serving(session, ServerSettings(token_file=file)) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        assert client.get("/v1/tasks", headers=bearer("all")).status_code == 200
        file.write_text(entry("shop", "infer"))
        server.service.access._source._looked_at -= 10  # a second passes
        assert client.get("/v1/tasks", headers=bearer("all")).status_code == 401
        assert client.get("/v1/tasks", headers=bearer("shop")).status_code == 200
