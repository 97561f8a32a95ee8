"""The page at / in a real browser: headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import re
from pathlib import Path

import pytest
from server.running import serving, serving_gated
from server.toy_bundle import encoded, prompt_set, solid, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import QueueFullError
from vpdeploy.format.bundle import publish_task, withdraw_task
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "red-<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
REVERSED = "red-\u202etxet"
LONG = "blue-" + "ünreadable " * 400
CARD = "document.querySelector('.card[data-task=\"{task}\"]')"


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("websockets", reason="needs the serve extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from tools.browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "red.png").write_bytes(encoded("red"))
    (folder / "blue.png").write_bytes(encoded("blue"))
    (folder / "broken.png").write_bytes(b"this is no image")
    (folder / "large.png").write_bytes(encoded("red") + bytes(70_000))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    tasks = {"rgb": ("red", "green", "blue"), "hostile": (HOSTILE, LONG, REVERSED)}
    return write_toy_bundle(tmp_path_factory.mktemp("page") / "zoo", tasks).path


@pytest.fixture(scope="module")
def server(zoo):
    settings = ServerSettings(watch=zoo, watch_interval_s=0.05, max_body_bytes=60_000)
    with load(zoo) as session, serving(session, settings) as server:
        yield server


@pytest.fixture
def page(browser, server):
    browser.resize(1280, 860)
    browser.open(server.url)
    browser.wait("document.querySelectorAll('.card').length === 2")
    yield browser
    assert [each for each in browser.complaints if "status of 4" not in each] == []
    hosts = {re.sub(r"^(blob:)?https?://([^/]*).*", r"\2", url) for url in browser.requested}
    assert hosts == {server.address}  # no request leaves the server


def card(task: str) -> str:
    return CARD.format(task=task)


def put(page, picture: Path) -> None:
    page.choose_file("#file", picture)
    page.wait("document.querySelector('.card.answered, .card.failed') && !document.querySelector('.card.asking')")


def labels(page, task: str) -> list[str]:
    return page.evaluate(f"[...{card(task)}.querySelectorAll('.label')].map((each) => each.textContent)")


def test_an_image_is_put_to_all_tasks_and_their_answers_stand_side_by_side(page, pictures):
    page.wait("document.querySelector('#status').textContent === 'Ready'")
    put(page, pictures / "red.png")
    assert labels(page, "rgb")[0] == "red"
    assert set(labels(page, "rgb")) == {"red", "green", "blue"}
    # e^10 / (e^10 + 2) of the toy's logits 10, 0, 0
    assert page.evaluate(f"{card('rgb')}.querySelector('.percent').textContent") == "100.0 %"
    assert re.fullmatch(r"[\d.]+ m?s", page.evaluate(f"{card('rgb')}.querySelector('.time').textContent"))
    assert re.fullmatch(r"2 tasks answered in [\d.]+ m?s, one request\.", page.text("#summary"))
    assert page.text("#spoken") == page.text("#summary")
    assert page.text("#caption").startswith("red.png · ")
    assert "48 × 48" in page.text("#caption")
    put(page, pictures / "blue.png")
    page.wait(f"{card('rgb')}.querySelector('.label').textContent === 'blue'")


def test_labels_are_text_and_long_ones_are_cut(page, pictures):
    put(page, pictures / "red.png")
    shown = labels(page, "hostile")
    assert set(shown) == {HOSTILE, f"{LONG[:160]}…", "red- txet"}
    assert page.evaluate("document.querySelectorAll('.card script, .card img').length") == 0
    assert page.evaluate("document.title") == "vpdeploy playground"
    titles = page.evaluate(f"[...{card('hostile')}.querySelectorAll('.label')].map((each) => each.title.length)")
    assert max(titles) == 1000
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


@pytest.mark.parametrize(
    "event",
    [
        "new DragEvent('drop', {dataTransfer: held, bubbles: true, cancelable: true})",
        "new ClipboardEvent('paste', {clipboardData: held, bubbles: true, cancelable: true})",
    ],
)
def test_an_image_may_be_dropped_or_pasted_anywhere(page, event):
    data = base64.b64encode(encoded("blue")).decode()
    page.evaluate(
        "(() => { const held = new DataTransfer();"
        f" const bytes = Uint8Array.from(atob('{data}'), (each) => each.charCodeAt(0));"
        f" held.items.add(new File([bytes], 'blue.png', {{type: 'image/png'}})); document.body.dispatchEvent({event});"
        " })()"
    )
    page.wait("document.querySelector('.card.answered') && !document.querySelector('.card.asking')")
    assert labels(page, "rgb")[0] == "blue"


def test_one_task_is_asked_alone(page, pictures):
    page.evaluate(
        "(() => { const one = document.querySelector('#target'); one.value = 'rgb';"
        " one.dispatchEvent(new Event('change')); })()"
    )
    put(page, pictures / "red.png")
    assert page.evaluate("document.querySelectorAll('.card').length") == 1
    assert page.text("#summary").startswith("1 task answered")
    assert page.text("#spoken").endswith("red, 100 percent.")
    assert f"{page.evaluate('location.origin')}/v1/tasks/rgb:predict?top=5" in page.requested


def test_a_task_that_is_published_appears_and_is_asked_and_one_that_is_withdrawn_leaves(page, pictures, zoo):
    put(page, pictures / "red.png")
    publish_task(zoo, prompt_set("fresh", ("red", "blue")))
    try:
        page.wait(f"{card('fresh')}?.classList.contains('answered')")
        assert labels(page, "fresh")[0] == "red"
        assert page.text("#task-count") == "3"
    finally:
        withdraw_task(zoo, "fresh")
    page.wait(f"{card('fresh')} === null")
    page.wait("document.querySelector('#spoken').textContent === 'Removed: fresh.'")


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("broken.png", "This image cannot be used: not a readable image"),
        ("large.png", "This image is too large: "),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(page, pictures, picture, sentence):
    page.choose_file("#file", pictures / picture)
    page.wait("!document.querySelector('#alert').hidden")
    assert page.text("#alert-text").startswith(sentence)
    page.evaluate("document.querySelector('#alert-close').click()")
    assert page.evaluate("document.querySelector('#alert').hidden")


def test_the_table_tells_versions_classes_and_sizes(page, server):
    page.evaluate("document.querySelector('#tasks-tab').click()")
    cells = page.evaluate("[...document.querySelectorAll('#rows tr')[0].children].map((each) => each.innerText.trim())")
    size_bytes = server.session.lease("rgb").size_bytes
    assert cells == ["rgb", "1", "3", "–", f"{size_bytes} B", "Ask"]
    assert page.evaluate("document.querySelector('#answers').hidden")


def test_everything_can_be_done_with_the_keyboard(page, pictures):
    put(page, pictures / "red.png")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(10):
        page.press("Tab")
        # What has the focus is seen, and what a screen reader calls it.
        reached.append(
            page.evaluate(
                "(() => { const a = document.activeElement;"
                " return a.id || a.getAttribute('aria-label') || a.textContent; })()"
            )
        )
    expected = ["Skip to the answers", "file", "target", "top", "ask", "answers-tab", "filter", "Ask rgb alone"]
    assert [each for each in reached if each in expected] == expected

    page.evaluate("document.querySelector('#answers-tab').focus()")
    page.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tasks-tab"
    assert not page.evaluate("document.querySelector('#tasks').hidden")
    page.press("Home", "Tab")
    page.write("host")
    page.wait("document.querySelectorAll('.card').length === 1")
    page.press("Tab", "Enter")
    page.wait("document.querySelector('#summary').textContent.startsWith('1 task answered')")


def test_it_follows_the_dark_preference(page):
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.prefer("light")
    light = ground()
    page.prefer("dark")
    dark = ground()
    page.prefer("light")
    assert (light, dark) == ("rgb(244, 245, 248)", "rgb(14, 17, 22)")


def test_it_fits_a_phone(page, pictures):
    put(page, pictures / "red.png")
    page.resize(360, 740)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_batches_are_drawn(page, pictures):
    put(page, pictures / "red.png")
    page.wait("document.querySelectorAll('.legend li').length >= 2")
    assert page.evaluate("document.querySelectorAll('#charts rect').length") >= 3
    name = page.evaluate("document.querySelectorAll('#charts svg')[1].getAttribute('aria-label')")
    assert name.startswith("Batch size, images in a batch: now ")


def test_a_token_is_asked_for_kept_in_the_tab_and_sent_as_a_header(browser, toy_bundle, pictures):
    with load(toy_bundle) as session, serving(session, ServerSettings(token="secret")) as server:
        browser.open(server.url)
        browser.wait("document.querySelector('#token-dialog').open")
        assert browser.evaluate("document.activeElement.id") == "token-input"
        browser.write("wrong")
        browser.press("Enter")
        browser.wait("document.querySelector('#token-error').textContent === 'That token was refused.'")
        browser.write("secret")
        browser.press("Enter")
        browser.wait("document.querySelectorAll('.card').length === 3")
        put(browser, pictures / "red.png")
        assert labels(browser, "rgb")[0] == "red"
        assert not [url for url in browser.requested if "secret" in url]

        browser.open(server.url)  # the tab knows it still
        browser.wait("document.querySelectorAll('.card').length === 3")
        assert not browser.evaluate("document.querySelector('#token-dialog').open")
        browser.evaluate("document.querySelector('#token-button').click()")
        browser.wait("document.querySelector('#status').textContent === 'Token needed'")
        assert browser.evaluate("document.querySelectorAll('.card').length + sessionStorage.length") == 0

        browser.open(server.url)
        browser.wait("document.querySelector('#token-dialog').open")
        browser.press("Escape")
        browser.wait("document.querySelector('#token-button').textContent === 'Enter token'")


def test_a_task_is_rolled_back_with_the_admin_token_where_administration_is_enabled(browser, tmp_path):
    zoo = write_toy_bundle(tmp_path / "zoo", {"rgb": ("red", "green", "blue")}).path
    publish_task(zoo, prompt_set("rgb", ("red-2", "green-2", "blue-2")))
    version = "document.querySelector('#rows td').textContent"
    settings = ServerSettings(token="secret", admin_token="chief", administered=zoo)
    with load(zoo) as session, serving(session, settings) as server:
        browser.open(server.url)
        browser.wait("document.querySelector('#token-dialog').open")
        browser.write("secret")
        browser.press("Enter")
        browser.wait("document.querySelectorAll('#rows tr').length === 1")
        assert browser.evaluate(version) == "2"
        browser.evaluate("document.querySelector('#tasks-tab').click()")
        browser.evaluate("document.querySelector('[aria-label=\"Roll rgb back\"]').click()")
        browser.wait("document.querySelector('#confirm-dialog').open")
        browser.press("Enter")
        browser.wait("document.querySelector('#token-title').textContent.startsWith('Administration')")
        browser.write("chief")
        browser.press("Enter")
        browser.wait(f"{version} === '1'")
        browser.wait("document.querySelector('#spoken').textContent === 'rgb is at version 1 again.'")
        assert "chief" not in browser.evaluate("JSON.stringify(sessionStorage)")
        assert browser.evaluate("document.querySelector('[aria-label=\"Roll rgb back\"]')") is None


def test_a_full_queue_and_a_server_that_is_gone_are_told(browser, toy_bundle, pictures):
    settings = ServerSettings(batching=BatchSettings(max_batch_size=1, max_queue_size=3, max_delay_ms=0))
    with serving_gated(toy_bundle, settings) as (server, _):
        browser.open(server.url)
        browser.wait("document.querySelectorAll('.card').length === 3")
        for task in ("rgb", "bgr", "warm"):
            with contextlib.suppress(QueueFullError):
                while True:
                    server.service.batcher.submit(solid("red"), task)
        browser.choose_file("#file", pictures / "red.png")
        browser.wait("!document.querySelector('#alert').hidden")
        assert browser.text("#alert-text").startswith("The server is busy; try again in a moment: ")
        assert browser.text("#summary") == "No task answered."
    browser.wait("document.querySelector('#status').textContent === 'Not reachable'")
    assert browser.text("#alert-text") == "The server cannot be reached; this page keeps trying."
