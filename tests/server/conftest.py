from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server.running import RunningServer, serving
from server.toy_bundle import write_toy_bundle

from vpdeploy import load


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "zoo").path


@pytest.fixture(scope="session")
def toy_server(toy_bundle: Path) -> Iterator[RunningServer]:
    """One server with default settings for all tests that only ask it things."""
    with load(toy_bundle) as session, serving(session) as server:
        yield server


@pytest.fixture
def client(toy_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=toy_server.url, timeout=30) as client:
        yield client
