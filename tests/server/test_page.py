"""The page in a real browser, driven over its debugging socket; reported as skipped if no Chromium is installed."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import Running, serve
from PIL import Image
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOT = os.environ.get("VLLM_OMNI_SCREENSHOT")  # where to keep the picture of the page, e.g. docs/images/ui.png
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it with `apt-get install chromium`")


class Browser:
    """A tab: `js` evaluates an expression in it."""

    def __init__(self, address: str) -> None:
        self.socket = connect(address, max_size=None)
        self.count = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (reply := json.loads(self.socket.recv(60))).get("id") != self.count:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def js(self, expression: str) -> Any:
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str) -> None:
        for _ in range(600):
            if self.js(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"never true: {expression}; status: {self.js('document.body.innerText')}")

    def key(self, name: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **typed)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    profile = tmp_path_factory.mktemp("chromium")
    with serve(ui=True) as server:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(profile)
            (tab,) = [t for t in httpx.get(f"http://127.0.0.1:{port}/json").json() if t["type"] == "page"]
            browser = Browser(tab["webSocketDebuggerUrl"])
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=1000, height=760, deviceScaleFactor=1, mobile=False
            )
            browser.call("Page.navigate", url=server.url + "/ui")
            browser.until("document.getElementById('cache')?.options.length > 3")
            yield browser
            browser.socket.close()
        finally:
            process.terminate()
            process.wait(20)


def _port(profile: Path) -> str:
    for _ in range(300):
        if (file := profile / "DevToolsActivePort").exists() and (lines := file.read_text().splitlines()):
            return lines[0]
        time.sleep(0.1)
    raise AssertionError("Chromium did not start")


@needs_browser
def test_the_keyboard_alone_makes_and_compares_pictures(page: Browser) -> None:
    page.js("document.getElementById('cache').value = 'fast'; document.getElementById('prompt').focus()")
    order = []
    for _ in range(7):
        page.key("Tab", 9)
        order.append(page.js("document.activeElement.id"))
    assert order == ["size", "steps", "cache", "seed", "key", "compare", "go"]
    page.key("Enter", 13, "\r")
    page.until("document.querySelectorAll('figure canvas').length === 1")
    page.until("document.getElementById('status').textContent === 'Done.'")
    strips = page.js(
        "[...document.querySelectorAll('.strip')].map(s => [...s.children].map(c => c.className).join(''))"
    )
    assert "s" in strips[0] and set(strips[1]) == {"c"} and len(strips[0]) == len(strips[1])
    captions = page.js("[...document.querySelectorAll('figcaption')].map(c => c.textContent)")
    assert "skipped" in captions[0] and "PSNR" in captions[2] and "identical" not in captions[2]
    picture = Image.open(io.BytesIO(base64.b64decode(page.call("Page.captureScreenshot")["data"]))).convert("RGB")
    assert len(set(picture.resize((100, 76)).getdata())) > 50, "the pictures are to be seen"
    if SCREENSHOT:
        picture.save(SCREENSHOT, optimize=True)


@needs_browser
def test_every_control_has_an_accessible_name(page: Browser) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "button", "combobox", "spinbutton", "checkbox", "image", "img"}
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if n.get("role")]
    named = [pair for pair in seen if pair[0] in roles]
    assert len(named) >= 11 and all(name for _, name in named), named
    assert page.js("document.getElementById('status').getAttribute('aria-live')") == "polite"


OVERLAPS = """(() => {
  const all = [...document.querySelectorAll('input, select, textarea, button')];
  const boxes = all.map(e => [e.id, e.getBoundingClientRect()]);
  const wide = boxes.filter(([, b]) => b.left < 0 || b.right > innerWidth).map(([id]) => id);
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const pairs = boxes.flatMap(([i, a], k) => boxes.slice(k + 1).filter(([, b]) => meet(a, b)).map(([j]) => i + j));
  return [...wide, ...pairs, ...(document.documentElement.scrollWidth > innerWidth ? ['scrolls'] : [])];
})()"""


@needs_browser
@pytest.mark.parametrize("width", [1000, 700, 400, 320])
def test_no_control_overlaps_or_is_cut_off(page: Browser, width: int) -> None:
    size = {"height": 760, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", width=width, **size)
    assert page.js(OVERLAPS) == []
    page.call("Emulation.setDeviceMetricsOverride", width=1000, **size)


@needs_browser
def test_the_page_shows_errors_and_stops(page: Browser) -> None:
    page.js("document.getElementById('size').value = '63x63'; document.getElementById('form').requestSubmit()")
    page.until("document.getElementById('status').textContent.includes('multiple')")
    page.js("document.getElementById('size').value = 'auto'; document.getElementById('steps').value = 200")
    page.js("document.getElementById('cache').value = 'off'; document.getElementById('form').requestSubmit()")
    page.until("document.getElementById('status').textContent.includes('step')")
    page.js("document.getElementById('stop').click()")
    page.until("document.getElementById('status').textContent === 'Stopped.'")
    assert page.js("getComputedStyle(document.documentElement).colorScheme") == "light dark"


def test_the_page_is_one_file_without_foreign_addresses(server: Running) -> None:
    reply = httpx.get(server.url + "/ui")
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", reply.text)
