"""The files in deploy/ fit the program: commands, ports, probes and the names of metrics."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families
from server.running import TIMEOUT_S, serving
from server.toy_bundle import encoded, write_toy_bundle

from vpdeploy import load
from vpdeploy.cli.main import build_app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "container").glob("*.Dockerfile"))
UNIT = DEPLOY / "systemd" / "vpdeploy.service"

_ADDED_BY_PROMETHEUS = {"job", "instance"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    zoo = write_toy_bundle(tmp_path_factory.mktemp("deploy") / "zoo").path
    with load(zoo) as session, serving(session) as server:
        httpx.post(f"{server.url}/v1/tasks/rgb:predict", content=encoded("red"), timeout=TIMEOUT_S)
        yield server


@pytest.fixture(scope="module")
def exposed(server) -> set[str]:
    """Every name of a sample, as Prometheus stores it."""
    text = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    assert list(text_string_to_metric_families(text))
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.fixture(scope="module")
def serve():
    """Parses a command line of ``vpdeploy serve``, and returns what it says."""
    command = typer.main.get_command(build_app(["serve"])).commands["serve"]

    def parse(arguments: list[str]) -> dict[str, object]:
        assert arguments[0] == "serve"
        return command.make_context("serve", list(arguments[1:])).params

    return parse


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def documents() -> dict[str, dict]:
    text = (DEPLOY / "kubernetes" / "vpdeploy.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def container() -> dict:
    (only,) = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def unit_options(path: Path) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            options.setdefault(name, []).append(value)
    return options


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_built_in_stages_and_runs_as_nobody_in_particular(path, serve):
    found = instructions(path)
    assert [name for name, _ in found].count("FROM") == 2
    last = found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]
    final = dict(last)
    assert final["USER"] == "10001:10001"
    assert "pip" not in " ".join(text for name, text in last if name == "RUN")
    params = serve(json.loads(final["CMD"]))
    assert json.loads(final["ENTRYPOINT"]) == ["vpdeploy"]
    assert final["EXPOSE"].split() == [str(params["port"]), str(params["grpc_port"])]
    assert params["host"] == "0.0.0.0"
    assert f"http://127.0.0.1:{params['port']}/v2/health/ready" in final["HEALTHCHECK"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_there_and_not_ignored(path):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, text in instructions(path):
        if name == "COPY" and not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in allowed


def test_the_health_check_of_an_image_works(server):
    text = dict(instructions(DOCKERFILES[0]))["HEALTHCHECK"]
    program = json.loads(text[text.index("CMD") + 3 :])[2]
    program = program.replace("127.0.0.1:8000", server.address)
    exec(compile(program, "HEALTHCHECK", "exec"), {})  # its exit code is that of an error that nobody catches


def test_the_unit_calls_the_program_as_it_is_called(serve):
    options = unit_options(UNIT)
    program, *arguments = shlex.split(options["ExecStart"][0])
    params = serve(arguments)
    assert program.endswith("/bin/vpdeploy")
    assert str(params["path"]).startswith(f"/var/lib/{options['StateDirectory'][0]}/")
    assert options["Type"] == ["notify"]
    # Lame duck, draining and closing must fit.
    assert int(options["TimeoutStopSec"][0]) >= 45


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("with_gpu", [False, True])
def test_systemd_understands_the_unit_and_finds_little_exposed(tmp_path, with_gpu):
    # The program and its user are not here.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M)
    unit = tmp_path / "vpdeploy.service"
    unit.write_text(re.sub(r"^(User|Group)=.*", r"\1=root", text, flags=re.M))
    if with_gpu:
        (tmp_path / "vpdeploy.service.d").mkdir()
        shutil.copy(DEPLOY / "systemd" / "gpu.conf", tmp_path / "vpdeploy.service.d")
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    if not with_gpu:
        unit.write_text(text)
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit)]
        rated = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "not supported" not in rated.stderr and "unrecognized" not in rated.stderr:
            assert rated.returncode == 0, rated.stdout[-300:]


def test_kubernetes_asks_what_the_server_answers(server, serve):
    asked = container()
    ports = {port["name"]: port["containerPort"] for port in asked["ports"]}
    params = serve(asked["args"])
    assert (ports["http"], ports["grpc"]) == (params["port"], params["grpc_port"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = asked[probe]["httpGet"]
        assert get["port"] in ports
        assert httpx.get(f"{server.url}{get['path']}", timeout=TIMEOUT_S).status_code == 200
    for port in documents()["Service"]["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]]


def test_kubernetes_waits_for_the_last_answer_and_gives_nothing_away():
    pod = documents()["Deployment"]["spec"]["template"]
    wait = int(re.search(r"sleep\((\d+)\)", container()["lifecycle"]["preStop"]["exec"]["command"][-1])[1])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= wait + 45
    labels = pod["metadata"]["labels"]
    assert documents()["Service"]["spec"]["selector"].items() <= labels.items()
    assert documents()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    mounts = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


def metric_names(expression: str) -> set[str]:
    """Return the names of metrics in a query."""
    return set(re.findall(r"\b(?:vpdeploy|nv)_[a-z_]+\b", expression))


def test_alerts_and_charts_ask_for_metrics_that_there_are(exposed):
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana" / "vpdeploy.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [rule["expr"] for rule in rules]
    queries += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    asked = set().union(*map(metric_names, queries))
    assert len(asked) >= 15
    assert asked - exposed == set()
    for query in queries:
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules)


def test_queries_use_labels_that_there_are(server):
    text = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    labels = {
        label for family in text_string_to_metric_families(text) for sample in family.samples for label in sample.labels
    }
    board = json.loads((DEPLOY / "grafana" / "vpdeploy.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            for grouped in re.findall(r"by \(([a-z, ]+)\)", target["expr"]):
                assert set(grouped.split(", ")) <= labels | _ADDED_BY_PROMETHEUS
