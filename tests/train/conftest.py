from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported, and by processes that tests start

import huggingface_hub
import pytest
from train.toys import write_colours, write_weights

import vpdeploy_train.data.dataset as dataset_module


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test that asks for the network fail instead of depending on it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test asked for a network connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Where another test imported the client first.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 42 images of three classes, which their colour tells apart; no test changes it."""
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def toy_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the toy backbone; no test changes them."""
    return write_weights(tmp_path_factory.mktemp("weights") / "toy.safetensors")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources that data sets decode from here on, in order."""
    sources: list[Any] = []
    decode = dataset_module.decode_image

    def count(source: Any, **options: Any) -> Any:
        sources.append(source)
        return decode(source, **options)

    monkeypatch.setattr(dataset_module, "decode_image", count)
    return sources
