"""Pictures that cost more than they weigh: what they take of the front end, and of a neighbour's time."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from hostile import chunk, progressive, raw_png, saved
from http_replies import told
from http_server import EDITS, PROCESS_KEY, Command, command, repaint_folder
from PIL import Image
from waiting import until
from watching import NEIGHBOUR, watched

pytestmark = [pytest.mark.slow, pytest.mark.alone]
AUTH = {"Authorization": f"Bearer {PROCESS_KEY}"}
MEMORY = 1.5 * 2**30  # of the front end, for two bodies at once; half a gigabyte of it is vLLM
DECODERS = 0.8 * 2**30  # of all decoders
SLOWDOWN = 12  # of the slowest edit meanwhile, against a usual one before
LIVE_S, NET_S = 1.0, 5.0
MOST = 5792  # pixels of a side: 32 megapixels


def post(server: Command, pictures: list[bytes], **fields: str) -> httpx.Response:
    files = [("image[]", ("a", picture, "image/png")) for picture in pictures]
    return httpx.post(server.url + EDITS, data=NEIGHBOUR | fields, files=files, headers=AUTH, timeout=120)


def decoders(server: Command) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if one.status() != psutil.STATUS_ZOMBIE and "decoder_process" in " ".join(one.cmdline()):
                found.append(one)
    return found


def peak(number: int) -> int:
    """Bytes that a process held at most."""
    lines = Path(f"/proc/{number}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rows(side: int, bytes_per_pixel: int) -> bytes:
    return bytes(side * (side * bytes_per_pixel + 1))


GRAY = saved(Image.new("L", (64, 64)), "JPEG")
BOMBS = {
    "16 pictures of 64 megapixels": ([raw_png(8192, 8192, rows(8192, 3))] * 16, {}, 400),
    "16 bits of grey": ([raw_png(8192, 8192, rows(8192, 2), depth=16, color=0)] * 16, {}, 400),
    "as large as one may be": ([raw_png(MOST, MOST, rows(MOST, 3))], {}, 200),
    "16 bits of RGBA": ([raw_png(MOST, MOST, rows(MOST, 8), depth=16, color=6)], {}, 200),
    "sent with every picture": ([raw_png(MOST, MOST, rows(MOST, 3))], {"n": "10"}, 400),
    "1,000 scans": ([progressive(4096, 1000)], {}, 400),
    "98 scans": ([progressive(5792, 97)], {}, 200),
    "600,000 chunks": ([raw_png(64, 64, rows(64, 3), more=chunk(b"prVt", b"") * 600_000)], {}, 200),
    "1.8 million markers": ([GRAY[:2] + b"\xff\xfe\0\2" * (7 * 2**18) + GRAY[2:]], {}, 200),
    "WebP": ([saved(Image.new("RGB", (MOST, MOST)), "WEBP", lossless=True, method=0, quality=0)], {}, 200),
}


def attacked(server: Command, pictures: list[bytes], fields: dict[str, str], status: int) -> bool:
    """Two bombs at once; whether the neighbour and the probes were hardly slower than before them."""
    with watched(server, PROCESS_KEY) as watch, ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: post(server, pictures, **fields), range(2)))
    assert [reply.status_code for reply in replies] == [status, status], replies[0].text[:300]
    if status == 400:
        assert told(replies[0])["param"] in ("image[]", "image")
    assert watch.statuses == {200} and max(watch.edits) < NET_S
    print(f"an edit at most {max(watch.edits):.2f} s, {watch.slowdown:.1f} times a quiet one;", end=" ")
    print(f"/health/live at most {max(watch.probes):.2f} s")
    return watch.slowdown < SLOWDOWN and max(watch.probes) < LIVE_S


@pytest.mark.parametrize("name", BOMBS)
def test_two_bombs_take_little_memory_and_no_neighbours_time(editor: Command, name: str) -> None:
    for number in (editor.process.pid, *(one.pid for one in decoders(editor))):
        Path(f"/proc/{number}/clear_refs").write_text("5")  # the peak is now
    assert any(attacked(editor, *BOMBS[name]) for _ in range(3)), "the best of three rounds"
    front, apart = peak(editor.process.pid), sum(peak(one.pid) for one in decoders(editor))
    print(f"{name}: front end {front / 2**20:.0f} MiB, decoders {apart / 2**20:.0f} MiB")
    assert front < MEMORY and apart < DECODERS


def leave(server: Command, body: bytes, kind: str, after_s: float) -> None:
    """Send a whole request, and hang up."""
    place = urlsplit(server.url)
    head = f"POST {EDITS} HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {PROCESS_KEY}\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(after_s)


def large_work(server: Command) -> dict[int, float]:
    """Processor seconds of the decoders of large pictures, by process."""
    found = {}
    for one in decoders(server):
        with suppress(psutil.NoSuchProcess):
            if one.nice() > 0:
                found[one.pid] = sum(one.cpu_times()[:2])
    return found


def work_until_quiet(server: Command) -> float:
    """Processor seconds that they still take until they stand still."""
    spent, before = 0.0, large_work(server)

    def quiet() -> bool:
        nonlocal spent, before
        time.sleep(0.3)
        now = large_work(server)
        more = sum(seconds - before.get(number, 0.0) for number, seconds in now.items())
        spent, before = spent + more, now
        return more == 0

    until(quiet)
    return spent


def test_a_picture_whose_sender_has_left_is_decoded_no_further(editor: Command) -> None:
    picture = progressive(5792, 97)
    made = httpx.Request("POST", editor.url, data=NEIGHBOUR, files={"image": picture})
    body, kind = made.read(), made.headers["content-type"]
    assert post(editor, [picture]).status_code == 200
    before = large_work(editor)
    assert post(editor, [picture]).status_code == 200
    whole = sum(large_work(editor).values()) - sum(before.values())

    def left() -> bool:
        with ThreadPoolExecutor(6) as pool, watched(editor, PROCESS_KEY) as watch:
            list(pool.map(lambda _: leave(editor, body, kind, 0.5), range(6)))
            busy = work_until_quiet(editor)
        slower = median(watch.edits) / median(watch.quiet.edits) if watch.quiet else 0.0
        print(f"decoders busy for {busy:.2f} s, of {whole:.2f} for each; an edit takes {slower:.1f} times as long")
        return busy < 2 * whole and slower < SLOWDOWN / 2 and max(watch.probes) < LIVE_S

    assert any(left() for _ in range(3)), "the best of three rounds"
    large = post(editor, [saved(Image.new("RGB", (2100, 2100)))])
    assert large.status_code == 200, "the lane of large pictures still works"


def test_nothing_large_stays(editor: Command) -> None:
    """Also not in an exception; glibc may keep a little."""
    post(editor, [raw_png(MOST, MOST, rows(MOST, 3))])
    before = editor.status("VmRSS")
    for _ in range(3):
        assert post(editor, [raw_png(8192, 8192, rows(8192, 3))] * 2).status_code == 400
        assert post(editor, [b"x" * 2**25]).status_code == 400
    until(lambda: editor.status("VmRSS") - before < 100 * 2**10, 20)  # KiB
    until(lambda: editor.status("VmRSS") - editor.resting < 200 * 2**10, 20)


def test_a_signal_does_not_wait_for_decoding(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Six are sent, and waiting for them would take as long as each by itself does, six times."""
    model, picture = repaint_folder(tmp_path_factory.mktemp("models")), progressive(5792, 97)
    made = httpx.Request("POST", "http://x", data=NEIGHBOUR, files={"image": picture})
    with command(tmp_path, model, "--api-key", PROCESS_KEY) as server:
        began = time.monotonic()
        assert post(server, [picture]).status_code == 200
        whole = time.monotonic() - began
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: leave(server, made.read(), made.headers["content-type"], 0.5), range(6)))
        children = decoders(server)
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(120) == 0
        took = time.monotonic() - began
        print(f"ended after {took:.1f} s; a picture takes {whole:.1f} s")
        assert took < 5 * whole
        assert children and not any(one.is_running() and one.status() != "zombie" for one in children)
