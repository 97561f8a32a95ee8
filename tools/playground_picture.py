"""Draw docs/playground.png: ``python -m tools.playground_picture http://127.0.0.1:8000 digit.png docs/playground.png``.

The server must be running; it is asked for twenty seconds, so that there is something to see in the charts.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from tools.browser import Browser, BrowserError, find_chromium

_WIDTH, _HEIGHT = 1280, 840
_LOAD_S = 20
_CLIENTS = 6


def draw_page(url: str, picture: Path) -> bytes:
    """Return what the playground of a running server shows, as a PNG file.

    Args:
        url: The server.
        picture: An image to ask all tasks about.

    Raises:
        BrowserError: There is no Chromium, or the page did not answer.
    """
    program = find_chromium()
    if program is None:
        raise BrowserError("no Chromium is installed; on Debian: apt-get install chromium")
    _ask_for_a_while(url, picture.read_bytes())
    with Browser(program) as browser:
        browser.resize(_WIDTH, _HEIGHT)
        browser.open(url)
        browser.wait("document.querySelector('.legend li')")
        browser.choose_file("#file", picture)
        browser.wait("document.querySelector('.card.answered') && !document.querySelector('.card.asking')")
        return browser.screenshot()


def _ask_for_a_while(url: str, picture: bytes) -> None:
    """Let a few clients ask tasks at random, now more and now less."""
    with urllib.request.urlopen(f"{url}/v1/tasks") as answer:
        tasks = [task["task"] for task in json.load(answer)["tasks"]]
    ends_at = time.monotonic() + _LOAD_S

    def ask(client: int) -> None:
        chance = random.Random(client)
        for turn in itertools.count():
            if time.monotonic() > ends_at:
                return
            request = urllib.request.Request(f"{url}/v1/tasks/{chance.choice(tasks)}:predict", data=picture)
            urllib.request.urlopen(request).close()
            time.sleep(chance.random() * (0.02 if turn // 40 % 2 else 0.3))

    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(ask, range(_CLIENTS)))


def main() -> None:
    """Read the command line and write the picture."""
    url, picture, out = sys.argv[1:]
    Image.open(io.BytesIO(draw_page(url.rstrip("/"), Path(picture)))).convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    main()
