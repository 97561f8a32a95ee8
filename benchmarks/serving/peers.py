"""vpdeploy against plain FastAPI and LitServe with an ONNX session a task: throughput, latency and memory.

    python -m benchmarks.serving.peers results.jsonl --rounds 3 --seconds 8
    python -m benchmarks.serving.peers results.jsonl --report

Every server of a round gets the same model, threads, connections and images, one server after the other, every other
round backwards. A piece that stands in the file is not measured again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serving.load import (
    PAYLOADS,
    LoadResult,
    Payload,
    jpeg_payload,
    json_payload,
    pixels_payload,
    put_load,
)
from vpdeploy.machine import cpu_name, usable_cores

MODELS = {"small": "vit_mini_patch8_64", "vit-s": "vit_small_patch16_224"}
SIDES = {"small": 64, "vit-s": 224}
TASKS = {"small": (1, 8, 32), "vit-s": (1, 8)}
SERVERS = ("vpdeploy", "fastapi", "litserve")
_PEERS = {"fastapi": "plain_fastapi.py", "litserve": "lit_server.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file of JSON lines; what it holds is not measured again")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vpdeploy-peers"), help="where the models are made")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--servers", nargs="*", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of one ONNX Runtime session")
    parser.add_argument("--report", action="store_true", help="print the table of what was measured, and draw it")
    options = parser.parse_args()
    if options.report:
        _report(options.results)
        return
    done = {(piece["model"], piece["tasks"], piece["server"], piece["round"]) for piece in _pieces(options.results)}
    for model in options.models:
        for tasks in TASKS[model]:
            zoo, folded = _model_files(options.folder, model, tasks)
            for number in range(options.rounds):
                for server in options.servers[:: 1 if number % 2 == 0 else -1]:
                    if (model, tasks, server, number) in done:
                        continue
                    piece = {"model": model, "tasks": tasks, "server": server, "round": number, "cpu": cpu_name()}
                    piece |= {"connections": options.connections, "threads": options.threads, "cores": usable_cores()}
                    piece |= _measure(server, zoo, folded, model, tasks, options)
                    with options.results.open("a") as file:
                        file.write(json.dumps(piece) + "\n")
                    print(json.dumps(piece), flush=True)


def _measure(
    server: str, zoo: Path, folded: Path, model: str, tasks: int, options: argparse.Namespace
) -> dict[str, Any]:
    names = tuple(path.stem for path in sorted(folded.glob("*.onnx")))
    assert len(names) == tasks
    found: dict[str, Any] = {}
    with _serving(server, zoo, folded, options.threads) as (pid, address):
        for kind in PAYLOADS:
            payload = _payload(server, kind, SIDES[model])
            _until_served(address, payload, names)
            put_load(address, payload, names, connections=options.connections, seconds=options.seconds / 4)
            result = put_load(address, payload, names, connections=options.connections, seconds=options.seconds)
            found[kind] = _figures(result)
        found["pss_mib"] = round(_pss_bytes(pid) / 2**20, 1)
    return found


def _payload(server: str, kind: str, side: int) -> Payload:
    if server == "vpdeploy":
        return PAYLOADS[kind](side)
    plain = jpeg_payload(side) if kind == "jpeg" else pixels_payload(side)
    return json_payload(plain) if server == "litserve" else plain


def _figures(result: LoadResult) -> dict[str, float]:
    ordered = sorted(result.latencies)
    return {
        "images_per_s": round(result.answers / result.seconds, 2),
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 2),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
    }


@contextlib.contextmanager
def _serving(server: str, zoo: Path, folded: Path, threads: int) -> Iterator[tuple[int, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if server == "vpdeploy":
        main = "from vpdeploy.cli.main import main; main()"
        command = ["-c", main, "serve", str(zoo), "--port", str(port), "--threads", str(threads)]
    else:
        command = [str(Path(__file__).with_name(_PEERS[server])), str(folded), str(port), str(threads)]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process.pid, f"127.0.0.1:{port}"
    finally:
        for pid in reversed(_family(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_served(address: str, payload: Payload, names: tuple[str, ...], patience_s: float = 120.0) -> None:
    """Wait until every task has answered once."""
    deadline = time.monotonic() + patience_s
    for name in names:
        while True:
            try:
                put_load(address, payload, (name,), connections=1, seconds=30, requests=1)
                break
            except (OSError, RuntimeError, EOFError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants; Linux only."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found


def _pss_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants; what they share counts once."""
    total = 0
    for each in _family(pid):
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def _model_files(folder: Path, model: str, tasks: int) -> tuple[Path, Path]:
    """Return a bundle of so many tasks, and a folder with as many folded models; both are made once."""
    zoo, folded = folder / f"{model}-{tasks}" / "zoo", folder / f"{model}-{tasks}" / "folded"
    if (folder / f"{model}-{tasks}" / "complete").exists():
        return zoo, folded
    import torch

    from benchmarks.models import prompted_model, random_vit, trained
    from vpdeploy.format.bundle import Bundle, publish_task
    from vpdeploy_export import Folded, Switchable, export_model

    shutil.rmtree(folder / f"{model}-{tasks}", ignore_errors=True)
    folded.mkdir(parents=True)
    torch.manual_seed(0)
    first = trained(prompted_model(random_vit(MODELS[model]), 10), "task-00", backbone=MODELS[model])
    export_model([first], zoo, target=Switchable())
    export_model([first], folded / "task-00.onnx", target=Folded())
    prompt_set = Bundle.open(zoo).read_task("task-00")
    for number in range(1, tasks):  # time and memory depend on sizes, not on what the numbers are
        name = f"task-{number:02}"
        publish_task(zoo, replace(prompt_set, card=replace(prompt_set.card, name=name)))
        shutil.copy(folded / "task-00.onnx", folded / f"{name}.onnx")
    (folder / f"{model}-{tasks}" / "complete").touch()
    return zoo, folded


def _pieces(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _report(results: Path) -> None:
    pieces = _pieces(results)
    rows: dict[tuple[str, int, str], dict[str, float]] = {}
    for model, tasks in sorted({(piece["model"], piece["tasks"]) for piece in pieces}):
        rounds: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if (piece["model"], piece["tasks"]) == (model, tasks):
                rounds.setdefault(piece["round"], {})[piece["server"]] = piece
        for kind in PAYLOADS:
            line = f"{model}, {tasks} tasks, {kind}:"
            for server in SERVERS:
                found = [each[server] for each in rounds.values() if server in each]
                if not found:
                    continue
                rate = statistics.median(each[kind]["images_per_s"] for each in found)
                p50 = statistics.median(each[kind]["p50_ms"] for each in found)
                rows.setdefault((model, tasks, kind), {})[server] = rate
                line += (
                    f" {server} {rate:.1f}/s p50 {p50:.0f} ms {statistics.median(e['pss_mib'] for e in found):.0f} MiB"
                )
                both = [each for each in rounds.values() if server in each and "vpdeploy" in each]
                if server != "vpdeploy" and both:
                    ratios = [e["vpdeploy"][kind]["images_per_s"] / e[server][kind]["images_per_s"] for e in both]
                    line += f" (vpdeploy/{server} {statistics.median(ratios):.2f}, {min(ratios):.2f}-{max(ratios):.2f})"
                line += ";"
            print(line)
    _draw(rows, results.with_suffix(".png"))


def _draw(rows: dict[tuple[str, int, str], dict[str, float]], path: Path) -> None:
    """Draw images per second over plain FastAPI's, which is 1."""
    from matplotlib.figure import Figure

    names = [f"{model}\n{tasks} {kind}" for model, tasks, kind in rows]
    figure = Figure(figsize=(1.1 * max(4, len(rows)), 4), layout="constrained")
    axes = figure.subplots()
    for index, server in enumerate(SERVERS):
        heights = [each.get(server, 0.0) / each.get("fastapi", float("inf")) for each in rows.values()]
        axes.bar([place + 0.27 * (index - 1) for place in range(len(rows))], heights, 0.25, label=server)
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("images/s over plain FastAPI's")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
