"""The doctor tells what is wrong and what mends it, and nothing that is broken keeps it from the rest."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from server.running import serving
from server.toy_bundle import write_toy_bundle
from typer.testing import CliRunner

from vpdeploy import load
from vpdeploy.cli.main import build_app
from vpdeploy.inspection import bundle_checks, installation_checks, machine_checks
from vpdeploy.inspection.engines import EngineReport
from vpdeploy.inspection.finding import Finding, run_check
from vpdeploy.machine import Gpu


@pytest.fixture
def zoo(tmp_path):
    return write_toy_bundle(tmp_path / "zoo").path


def packages(**versions):
    return lambda: [
        SimpleNamespace(metadata={"Name": name.replace("_", "-")}, version=number) for name, number in versions.items()
    ]


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_a_check_that_breaks_is_a_finding_and_not_the_end():
    def broken():
        yield Finding(subject="x", status="ok", text="fine")
        raise KeyError("what a driver\nmay do")

    (finding,) = run_check("x", broken)
    assert (finding.status, finding.subject) == ("note", "x")
    assert "\n" not in finding.text


def test_a_sound_machine_and_bundle_end_with_code_0_and_a_damaged_task_is_named_with_its_cure(zoo):
    def doctor(*options):
        return CliRunner().invoke(build_app(), ["doctor", str(zoo), "--port", "0", *options])

    sound = doctor("--json")
    assert sound.exit_code == 0
    assert json.loads(sound.stdout)["healthy"] is True

    with (zoo / "tasks" / "bgr" / "1" / "prompts.safetensors").open("ab") as file:
        file.write(b"x")
    damaged = doctor()
    assert damaged.exit_code == 1
    lines = damaged.stdout.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("wrong")]
    assert "bgr" in lines[at]
    assert f"vpdeploy task rollback {zoo} bgr" in lines[at + 1]


def test_what_does_not_exist_is_wrong_and_the_machine_is_told_all_the_same(tmp_path):
    result = CliRunner().invoke(build_app(), ["doctor", str(tmp_path / "none"), "--port", "0", "--json"])
    assert result.exit_code == 1
    found = {each["subject"]: each["status"] for each in json.loads(result.stdout)["findings"]}
    assert found["none"] == "wrong"
    assert found["processor"] == "ok"


def test_two_packages_of_onnxruntime_are_wrong(monkeypatch):
    both = packages(onnxruntime="1.30", onnxruntime_gpu="1.31", onnxruntime_ep_nv_tensorrt_rtx="1")
    monkeypatch.setattr(installation_checks, "distributions", both)
    finding = next(iter(installation_checks.check_onnxruntime()))
    assert finding.status == "wrong"
    assert finding.mend == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_a_library_that_kills_its_process_does_not_kill_the_doctor(monkeypatch):
    monkeypatch.setattr(installation_checks, "_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(installation_checks, "distributions", packages(onnxruntime="1.30"))
    (finding,) = installation_checks.check_onnxruntime()
    assert (finding.status, finding.mend) == ("wrong", "pip install --force-reinstall onnxruntime")


def test_a_gpu_without_cuda_in_onnxruntime_is_wrong(monkeypatch):
    monkeypatch.setattr(installation_checks, "_PROBE", """print('["1.30", "", ["CPUExecutionProvider"]]')""")
    monkeypatch.setattr(installation_checks, "distributions", packages(onnxruntime="1.30"))
    monkeypatch.setattr(installation_checks, "gpu_obstacle", lambda: None)
    found = by_subject(installation_checks.check_onnxruntime())
    assert found["onnxruntime-cuda"].mend == "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def test_torch_is_never_imported():
    program = (
        "import sys; from vpdeploy.inspection.doctor import examine; found = examine(None, host='127.0.0.1', port=0); "
        "assert found and not {'torch', 'timm', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_port_that_another_program_holds_is_wrong_and_another_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        (finding,) = machine_checks.check_port("127.0.0.1", port)
    assert finding.status == "wrong"
    assert f"vpdeploy serve ... --port {port + 1 if port < 65535 else 0}" in finding.mend


def test_a_port_on_which_a_server_is_live_is_well(zoo):
    with load(zoo) as session, serving(session) as server:
        host, _, port = server.address.partition(":")
        (finding,) = machine_checks.check_port(host, int(port))
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("nonsense", None), ("1 0", None)]
)
def test_the_control_groups_quota_is_read(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert machine_checks.cpu_quota(tmp_path) == cores


def test_a_quota_below_the_cores_is_told_with_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(machine_checks, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(machine_checks, "usable_cores", lambda: 8)
    *_, finding = machine_checks.check_cpu()
    assert finding.mend == "vpdeploy serve ... --threads 1"


def test_memory_is_what_the_control_group_leaves(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine_checks.memory_limit(tmp_path) == 1000000
    assert machine_checks.available_memory(tmp_path) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_checks.memory_limit(tmp_path) is None


def test_an_engine_for_another_gpu_is_wrong_only_where_there_is_a_gpu(monkeypatch, tmp_path):
    engine = EngineReport(file="a.engine", card=None, misfit="built for sm_75, here is sm_89")
    gpu = Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=1, cuda_version="13.0")
    for found, status in ((gpu, "wrong"), (None, "note")):
        monkeypatch.setattr(bundle_checks, "find_gpu", lambda found=found: found)
        (finding,) = bundle_checks._engine_findings([engine], tmp_path)
        assert finding.status == status
        assert (finding.mend is not None) is (status == "wrong")


def test_a_model_that_does_not_fit_into_memory_is_wrong(monkeypatch, zoo):
    monkeypatch.setattr(bundle_checks, "available_memory", lambda: 100)
    assert by_subject(bundle_checks.check_path(zoo))["memory"].status == "wrong"
