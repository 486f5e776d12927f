"""`/v1/videos` as the official client speaks it: one store, and servers of a tiny Wan on it, one after the other."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import imageio.v3 as imageio
import numpy as np
import pytest
from hostile import (
    REFUSAL,
    VIDEO_NUMBERS,
    as_quick,
    wrong_numbers,
)
from http_replies import told
from http_server import AUTH, KEY, Running, serve, video_folder
from openai import (
    APIStatusError,
    OpenAI,
)
from paths import EXAMPLES
from PIL import Image
from starlette.routing import Route
from waiting import until

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy
from vllm_omni.entrypoints.openai.store import EXPIRES_S, VideoStore
from vllm_omni.errors import InvalidValueError

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled")
CURVE = list(FluxMagCacheStrategy.FLUX_MAG_RATIOS)
VIDEO = {"num_inference_steps": 10, "guidance_scale": 3.0, "seed": 5}
CODEC_LOSS = 6.0  # mean difference of H.264 with chroma at half the size, on 256 shades
SLOW = {"num_inference_steps": 400, "num_frames": 17, "cache": "off"}  # a second or more
LONG = SLOW | {"size": "128x128", "num_frames": 65}  # seconds on every machine; nobody waits for the end


class Server:
    """A server that can be stopped and started again on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.model, self.store = video_folder(folder), folder / "store"
        self.running: Running
        self._stack = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        engine = {"model": str(self.model), "max_num_seqs": 4, "max_inference_steps": 1000}
        engine |= {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}
        settings: dict[str, Any] = {"api_key": (KEY,), "max_queued_requests": 2, "max_frames": 65, "max_steps": 400}
        self.running = self._stack.enter_context(serve(engine, store_dir=self.store, **settings))

    def stop(self) -> None:
        self._stack.close()

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.running.url + "/v1", api_key=KEY, max_retries=0)

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.running.url + path, **{"headers": AUTH, "timeout": 60} | options)

    def stats(self) -> Any:
        return self.running.do(self.running.engine.stats())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("videos"))
    yield started
    started.stop()


def frames_of(mp4: bytes) -> np.ndarray:
    return np.asarray(imageio.imread(mp4, plugin="FFMPEG", extension=".mp4"))


def test_a_video_is_made_polled_and_downloaded(server: Server) -> None:
    client = server.client
    done = client.videos.create_and_poll(
        prompt="red apple",
        seconds="1",  # type: ignore[arg-type]
        size="32x32",  # type: ignore[arg-type]
        extra_body=VIDEO,
        poll_interval_ms=50,
    )
    assert (done.status, done.progress, done.seconds, done.size, done.model) == ("completed", 100, "1", "32x32", "wan")
    assert done.completed_at and done.expires_at == done.completed_at + EXPIRES_S and done.error is None
    assert client.videos.retrieve(done.id) == done
    facts = done.model_extra["omni"]  # type: ignore[index]
    assert facts["seed"] == 5 and facts["num_frames"] == 17 and facts["fps"] == 16  # 4k + 1, nearest to 16
    assert facts["skipped_steps"] > 0 and facts["computed_steps"] + facts["skipped_steps"] == 10
    mp4 = client.videos.download_content(done.id).content
    meta = imageio.immeta(mp4, plugin="FFMPEG", extension=".mp4")
    assert meta["fps"] == 16 and meta["codec"] == "h264" and meta["size"] == (32, 32)
    with Omni(str(server.model), cache_backend="magcache", cache_config={"mag_ratios": CURVE}) as omni:
        parameters = Params(height=32, width=32, num_frames=17, **VIDEO)
        (wanted,) = omni.generate("red apple", parameters, use_tqdm=False)[0].videos
    told = frames_of(mp4)
    expected = np.stack([np.asarray(frame) for frame in wanted])
    assert told.shape == expected.shape == (17, 32, 32, 3)
    assert np.abs(told.astype(int) - expected).mean() < CODEC_LOSS
    assert np.abs(told[::-1].astype(int) - expected).mean() > 2 * CODEC_LOSS  # so little would not be chance


def test_a_video_has_a_thumbnail_a_spritesheet_and_ranges(server: Server) -> None:
    client = server.client
    done = client.videos.create_and_poll(
        prompt="x", extra_body={"num_frames": 9, "steps": 2, "fps": 8, "width": 48, "height": 32}, poll_interval_ms=50
    )
    assert (done.size, done.seconds) == ("48x32", "1.125")
    content = client.videos.download_content
    thumbnail = content(done.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (48, 32)
    sheet = Image.open(io.BytesIO(content(done.id, variant="spritesheet").content))
    assert sheet.format == "JPEG" and sheet.size == (3 * 48, 3 * 32)
    middle = frames_of(content(done.id, variant="video").content)[4].astype(int)
    assert np.abs(np.asarray(sheet.crop((48, 32, 96, 64)), dtype=int) - middle).mean() < CODEC_LOSS
    head = server.http("HEAD", f"/v1/videos/{done.id}/content")
    assert (head.status_code, head.content) == (200, b"") and int(head.headers["content-length"]) > 100
    part = server.http("GET", f"/v1/videos/{done.id}/content", headers=AUTH | {"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert server.http("GET", f"/v1/videos/{done.id}/content?variant=gif").status_code == 400


def test_videos_are_listed_in_pages(server: Server) -> None:
    client = server.client
    made = [client.videos.create(prompt=f"{i}", extra_body={"num_frames": 1, "steps": 1}).id for i in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:3] == made[::-1]
    page = client.videos.list(limit=2, order="asc", after=made[0])
    assert [video.id for video in page.data] == made[1:] and not page.has_next_page()
    for video_id in made:
        client.videos.poll(video_id, poll_interval_ms=50)
    deleted = [client.videos.delete(video.id).id for video in client.videos.list(limit=2)]  # page after page
    assert deleted[:3] == made[::-1] and not list(client.videos.list())
    assert server.http("GET", f"/v1/videos?after={made[0]}").json()["data"] == []
    assert server.http("GET", "/v1/videos?after=video_x").json()["error"]["param"] == "after"
    assert server.http("GET", "/v1/videos?limit=101").json()["error"]["param"] == "limit"


def test_files_removed_behind_the_stores_back_cost_one_video_alone(server: Server) -> None:
    """What is left of it is served, what is gone is a 404, and it can be deleted; other jobs are as they were."""
    gone, kept = (make(server) for _ in range(2))
    folder = server.store / gone
    (folder / "video.mp4").unlink()
    reply = server.http("GET", f"/v1/videos/{gone}/content")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "video_gone"
    assert server.http("GET", f"/v1/videos/{gone}/content?variant=thumbnail").status_code == 200
    shutil.rmtree(folder)
    for variant in ("video", "thumbnail", "spritesheet"):
        reply = server.http("GET", f"/v1/videos/{gone}/content?variant={variant}")
        assert reply.status_code == 404 and reply.json()["error"]["code"] == "video_gone"
    folder.mkdir()
    (folder / "video.mp4").mkdir()  # nor is a folder a file
    assert server.http("GET", f"/v1/videos/{gone}/content").json()["error"]["code"] == "video_gone"
    assert server.http("GET", f"/v1/videos/{gone}").json()["status"] == "completed"
    assert server.http("DELETE", f"/v1/videos/{gone}").status_code == 200
    assert server.http("GET", f"/v1/videos/{gone}").json()["error"]["code"] == "not_found"
    assert server.http("GET", f"/v1/videos/{kept}/content").status_code == 200
    server.http("DELETE", f"/v1/videos/{kept}")


def make(server: Server) -> str:
    """The id of a video that is there."""
    made = server.http("POST", "/v1/videos", json={"prompt": "x", "num_inference_steps": 2, "cache": "off"}).json()
    until(lambda: server.http("GET", f"/v1/videos/{made['id']}").json()["status"] == "completed")
    return str(made["id"])


def test_delete_ends_a_running_video(server: Server) -> None:
    client = server.client
    aborted = server.stats().requests.get("aborted", 0)
    reply = client.videos.with_raw_response.create(prompt="x", extra_body=LONG)
    assert int(reply.headers["openai-poll-after-ms"]) > 0
    video = reply.parse()
    until(lambda: client.videos.retrieve(video.id).progress > 0)
    assert client.videos.retrieve(video.id).status == "in_progress"
    assert server.http("GET", f"/v1/videos/{video.id}/content").json()["error"]["code"] == "video_not_ready"
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    until(lambda: server.stats().requests.get("aborted", 0) == aborted + 1)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        missing = server.http(method, f"/v1/videos/{video.id}{path}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert not (server.store / video.id).exists()


def test_a_full_queue_refuses_a_video_at_once(server: Server) -> None:
    client = server.client
    taken = [client.videos.create(prompt="x", extra_body=LONG).id for _ in range(6)]  # four run, two wait
    with pytest.raises(APIStatusError) as caught:
        client.videos.create(prompt="x", extra_body=LONG)
    assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert {client.videos.retrieve(video_id).status for video_id in taken} == {"in_progress", "queued"}
    assert len(list(client.videos.list(limit=100, after=taken[-1], order="asc"))) == 0  # the refused left none
    for video_id in taken:
        client.videos.delete(video_id)
    until(lambda: not server.stats().running and not server.stats().waiting)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"seconds": "0"}, "seconds", "invalid_value"),
        ({"seconds": "long"}, "seconds", "invalid_value"),
        ({"seconds": "12"}, "seconds", "invalid_value"),  # 193 frames
        ({"num_frames": "69"}, "num_frames", "invalid_value"),
        ({"num_frames": "8"}, "num_frames", "invalid_value"),
        ({"fps": "0.5"}, "fps", "invalid_value"),
        ({"size": "40x32"}, "size", "invalid_value"),  # 16 pixels a token
        ({"size": "4096x4096"}, "size", "invalid_value"),
        ({"size": "2048x2048", "num_frames": "49"}, "size", "invalid_value"),
        ({"steps": "401"}, "steps", "invalid_value"),
        ({"n": "2"}, "n", "unknown_parameter"),
        ({"sede": "2"}, "sede", "unknown_parameter"),
        ({"strength": "0.5"}, "strength", "unknown_parameter"),
        ({"guidance_scale_2": "3"}, "guidance_scale_2", "unsupported_parameter"),
        ({"cache[treshold]": "0.5"}, "treshold", "unknown_parameter"),  # the engine says so
        ({"model": "sora-2"}, "model", "model_not_found"),
        ({"input_reference[image_url]": "data:image/png;base64,AAAA"}, "input_reference", "unsupported_parameter"),
    ],
)
def test_an_error_names_the_wrong_field_of_a_video(
    server: Server, fields: dict[str, str], param: str, code: str
) -> None:
    before = server.http("GET", "/v1/videos").json()
    reply = server.http("POST", "/v1/videos", files={k: (None, v) for k, v in ({"prompt": "x"} | fields).items()})
    assert reply.status_code == (404 if code == "model_not_found" else 400), reply.text
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert server.http("GET", "/v1/videos").json() == before


def test_seconds_are_a_number_that_a_video_can_have_and_ignored_beside_frames(server: Server) -> None:
    def ask(fields: str) -> httpx.Response:
        kind = {"Content-Type": "Application/JSON; charset=utf-8"}
        return server.http(
            "POST", "/v1/videos", content=f'{{"prompt": "x", "steps": 1, {fields}}}', headers=AUTH | kind
        )

    for number in (10**400, -(10**400), "1e300", '"\\ud800"'):
        assert told(ask(f'"seconds": {number}'))["param"] == "seconds", number
    for ignored in ('"9999"', '"\\ud800"', 10**400):
        made = ask(f'"num_frames": 17, "fps": 17, "seconds": {ignored}')
        assert made.status_code == 200 and made.json()["seconds"] == "1", made.text
        assert made.json()["omni"]["warnings"] == ["seconds was ignored: num_frames says how long"]
        server.http("DELETE", f"/v1/videos/{made.json()['id']}")


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO_NUMBERS)
def test_numbers_outside_a_video_fields_limits_are_refused(server: Server, name: str) -> None:
    """What is no value of the field is refused at once and named, as JSON and as a form; nothing is queued."""
    before = server.http("GET", "/v1/videos").json()
    with httpx.Client(base_url=server.running.url, headers=AUTH) as http:
        for value in wrong_numbers(name, VIDEO_NUMBERS):

            def as_json(value: str = value) -> httpx.Response:
                text = f'{{"prompt": "x", "{name}": {value}}}'
                return http.post("/v1/videos", content=text, headers={"Content-Type": "application/json"})

            def as_form(value: str = value) -> httpx.Response:
                return http.post("/v1/videos", files={"prompt": (None, "x"), name: (None, value)})

            for ask in (as_json, as_form):
                reply = ask()
                assert reply.status_code == 400 and len(reply.content) < 4096, (value, reply.text)
                assert reply.json()["error"]["param"] == name, (value, reply.text)
        for ask in (as_json, as_form):
            assert as_quick(ask, lambda: http.get("/v1/models"), REFUSAL)
    assert server.http("GET", "/v1/videos").json() == before


def test_a_picture_is_refused_by_a_text_to_video_model(server: Server) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    with pytest.raises(APIStatusError) as caught:
        server.client.videos.create(prompt="x", input_reference=("../../evil.png", buffer.getvalue(), "image/png"))
    assert (caught.value.status_code, caught.value.code) == (400, "unsupported_parameter")
    assert not list(server.store.parent.rglob("evil*"))


def test_picture_routes_are_refused_by_a_video_model(server: Server) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"):
        reply = server.http("POST", path, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_model"), path
        assert "/v1/videos" in reply.json()["error"]["message"]


def test_a_video_in_json_reports_its_failure(server: Server) -> None:
    body = {"prompt": "x", "timeout_s": 0.6} | LONG
    made = server.http("POST", "/v1/videos", json=body)
    assert made.status_code == 200, made.text
    done = server.client.videos.poll(made.json()["id"], poll_interval_ms=50)  # a failed job is a 200 too
    assert done.status == "failed" and done.error and done.error.code == "deadline_exceeded"
    assert server.http("POST", "/v1/videos", json={"prompt": "x", "steps": "2"}).status_code == 400
    half = server.http("POST", "/v1/videos", json={"prompt": "x", "steps": 1, "seconds": 0.5})
    assert half.status_code == 200 and half.json()["seconds"] == "0.5", half.text
    made = server.client.videos.poll(half.json()["id"], poll_interval_ms=50)
    assert made.model_extra["omni"]["num_frames"] == 9  # type: ignore[index]


FEW: dict[str, Any] = {"prompt": "red apple", "num_frames": 9, "num_inference_steps": 3, "seed": 5}


@pytest.mark.parametrize("sent", ["json", "data", "files"])
def test_a_video_without_a_job_is_the_one_of_a_job(server: Server, sent: str) -> None:
    """As JSON, as a urlencoded and as a multipart form; nothing is kept of it."""
    job = server.client.videos.create_and_poll(prompt="red apple", extra_body=FEW | {"prompt": "red apple"})
    wanted = server.client.videos.download_content(job.id).content
    before = server.http("GET", "/v1/videos").json()
    fields = {name: (None, str(value)) for name, value in FEW.items()} if sent == "files" else FEW
    reply = server.http("POST", "/v1/videos/sync", **{sent: fields})  # type: ignore[arg-type]
    assert reply.status_code == 200 and reply.headers["content-type"] == "video/mp4", reply.text
    assert reply.content == wanted and server.http("GET", "/v1/videos").json() == before
    assert json.loads(reply.headers["x-omni"])["seed"] == 5 and float(reply.headers["x-inference-time-s"]) > 0


def test_leaving_a_video_without_a_job_ends_it(server: Server) -> None:
    aborted = server.stats().requests.get("aborted", 0)
    with pytest.raises(httpx.ReadTimeout):
        server.http("POST", "/v1/videos/sync", json={"prompt": "x", **LONG}, timeout=0.4)
    until(lambda: server.stats().requests.get("aborted", 0) == aborted + 1)
    late = server.http("POST", "/v1/videos/sync", json={"prompt": "x", "timeout_s": 0.3, **LONG})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_form_without_a_file_and_fields_of_other_servers(server: Server) -> None:
    """An aiohttp form is urlencoded if it holds no file; what has no meaning here is named, a mistake is refused."""
    fields = FEW | {"generator_device": "cuda", "flow_shift": 5.0, "quality": "lossless", "extra_params": "{}"}
    reply = server.http("POST", "/v1/videos", data=fields)
    assert reply.status_code == 200, reply.text
    ignored = [warning.split()[0] for warning in reply.json()["omni"]["warnings"]]
    assert sorted(ignored) == ["flow_shift", "generator_device"]
    done = server.client.videos.poll(reply.json()["id"], poll_interval_ms=50)
    assert done.status == "completed" and done.model_extra["omni"]["skipped_steps"] == 0  # type: ignore[index]
    for more, param in (({"boundary_ratio": "0.5"}, "boundary_ratio"), ({"fpss": "1"}, "fpss"),
                        ({"steps": "9" * 5}, "steps"),
                        ({"image_reference": "data:image/png;base64,AAAA"}, "image_reference")):  # fmt: skip
        asked = FEW | more if "steps" not in more else {"prompt": "x", **more}
        assert server.http("POST", "/v1/videos", data=asked).json()["error"]["param"] == param


def test_no_video_route_answers_without_the_key(server: Server) -> None:
    routes = [r for r in server.running.app.routes if isinstance(r, Route) and r.path.startswith("/v1/videos")]
    assert len(routes) == 6
    for route in routes:
        for method in sorted(route.methods or ()):
            assert server.http(method, route.path, headers={}).status_code == 401, (method, route.path)


@pytest.mark.slow
def test_the_video_example_runs(server: Server, tmp_path: Path) -> None:
    script = EXAMPLES / "serving" / "video.py"
    assert len(script.read_text().splitlines()) <= 40
    env = os.environ | {"OPENAI_BASE_URL": server.running.url + "/v1", "OPENAI_API_KEY": KEY}
    command = [sys.executable, str(script), "a rocket", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (mp4,) = tmp_path.glob("video_*.mp4")
    assert frames_of(mp4.read_bytes()).shape == (9, 32, 32, 3)


@pytest.mark.slow
def test_jobs_survive_a_restart(server: Server) -> None:
    short = {"num_frames": 9, "steps": 4, "seed": 11}
    finished = server.client.videos.create_and_poll(prompt="kept", extra_body=short, poll_interval_ms=50)
    mp4 = server.client.videos.download_content(finished.id).content
    slow = server.client.videos.create(prompt="kept", extra_body=SLOW | {"seed": 11})
    until(lambda: server.client.videos.retrieve(slow.id).progress > 0)
    began = server.client.videos.retrieve(slow.id)
    server.stop()
    server.start()
    client = server.client
    assert client.videos.retrieve(finished.id) == finished
    assert client.videos.download_content(finished.id).content == mp4
    done = client.videos.poll(slow.id, poll_interval_ms=50)
    assert done.status == "completed" and done.created_at == began.created_at
    again = client.videos.create_and_poll(prompt="kept", extra_body=SLOW | {"seed": 11}, poll_interval_ms=50)
    assert client.videos.download_content(again.id).content == client.videos.download_content(done.id).content
    with pytest.raises(InvalidValueError, match="of this server alone"):
        VideoStore(server.store)
