"""A headless Chromium, driven through its DevTools protocol: pages are looked at and used as a person would.

Needs an installed Chromium (Debian: ``apt-get install chromium``) and websockets, which uvicorn brings.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S = 30.0
_POLL_S = 0.02
_ANNOUNCEMENT = "DevTools listening on "
_SHIFT = 8
_KEYS: dict[str, tuple[int, str]] = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
"""Windows' numbers of the keys that are pressed here, and the text that they write."""


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser did not start, a page raised an error, or what was waited for did not happen."""


class Browser:
    """A running Chromium with one page. Use it as a context manager.

    Attributes:
        complaints: What the page wrote to the console as a warning or an error, and what its policy blocked.
        requested: URLs that the page asked for.

    Args:
        program: The browser's path, from ``find_chromium``.

    Raises:
        BrowserError: It did not start.
    """

    def __init__(self, program: str) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="vpdeploy-browser-", ignore_cleanup_errors=True)
        self._numbers = itertools.count(1)
        self._closing = contextlib.ExitStack()
        self._session: str | None = None
        options = [
            "--headless=new",
            "--no-sandbox",  # it runs as root in containers, and sees our own pages only
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self._socket = self._closing.enter_context(connect(self._address(), max_size=None, compression=None))
            targets = self._call("Target.getTargets")["targetInfos"]
            page = next(each["targetId"] for each in targets if each["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=page, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol on the page.

        Raises:
            BrowserError: The browser refused it, or did not answer.
        """
        return self._call(method, **parameters)

    def open(self, url: str) -> None:
        """Open a page, and forget what was requested and complained about before."""
        self.complaints.clear()
        self.requested.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression; promises are awaited.

        Raises:
            BrowserError: It threw.
        """
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            BrowserError: It did not become true.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if self.evaluate(f"Boolean({condition})"):
                    return
            except BrowserError:
                pass  # while a page is being replaced there is nothing to ask
            time.sleep(_POLL_S)
        raise BrowserError(f"it did not happen within {_TIMEOUT_S:.0f} s: {condition}; complaints: {self.complaints}")

    def text(self, selector: str) -> str:
        """Return the visible text of the first element that a CSS selector names; nothing if there is none."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input, as its dialog does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys one after the other."""
        for key in keys:
            number, text = _KEYS[key]
            shared = {"key": key, "code": key, "windowsVirtualKeyCode": number, "modifiers": _SHIFT if shift else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", **shared, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def write(self, text: str) -> None:
        """Write text where the focus is."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        """Give the page a size in CSS pixels, and the device's pixels in one of them."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark`` pages."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """Return what is seen, as a PNG file."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser."""
        self._end()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _address(self) -> str:
        assert self._process.stderr is not None
        said: list[str] = []
        for line in self._process.stderr:
            if line.startswith(_ANNOUNCEMENT):
                return line.removeprefix(_ANNOUNCEMENT).strip()
            said.append(line.strip())
        raise BrowserError(f"the browser did not start: {' '.join(said[-3:])}")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            try:
                answer: dict[str, Any] = json.loads(self._socket.recv(timeout=_TIMEOUT_S))
            except TimeoutError:
                raise BrowserError(f"the browser did not answer {method} within {_TIMEOUT_S:.0f} s") from None
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(details["request"]["url"])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("warning", "error"):
            self.complaints.append(f"{details['entry']['text']} {details['entry'].get('url', '')}".strip())
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(details["exceptionDetails"].get("exception", {}).get("description")))
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("warning", "error"):
            self.complaints.append(" ".join(str(each.get("value")) for each in details["args"]))

    def _end(self) -> None:
        self._closing.close()
        self._process.terminate()
        try:
            self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._profile.cleanup()
