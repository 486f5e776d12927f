"""Pictures reach the arguments that a pipeline has for them; what it needs is said before any work is done."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import diffusers
import httpx
import numpy as np
import pytest
from hostile import saved, scene
from http_replies import envelope, pixels
from http_server import CHAT, EDITS, GENERATIONS, Running, serve
from picture_models import SIDE, fill_folder, klein_folder
from PIL import Image

from vllm_omni.engine.describe import picture_inputs
from vllm_omni.engine.interface import ModelInfo, PictureInput
from vllm_omni.entrypoints.openai.generation import match_pictures, plan_images
from vllm_omni.entrypoints.openai.protocol.bodies import Body
from vllm_omni.entrypoints.openai.protocol.errors import ApiError
from vllm_omni.entrypoints.openai.protocol.requests import ImageRequest
from vllm_omni.entrypoints.serve_config import Limits

FIELDS = {"prompt": "red apple", "seed": "3", "steps": "4"}
PICTURE = saved(Image.effect_noise((SIDE, SIDE), 80).convert("RGB"))


def edit(server: Running, *files: tuple[str, bytes], **fields: str) -> httpx.Response:
    parts = [(name, (f"{name}.png", data, "image/png")) for name, data in files]
    return httpx.post(server.url + EDITS, data=FIELDS | fields, files=parts, timeout=60)


def generate(server: Running) -> httpx.Response:
    return httpx.post(server.url + GENERATIONS, json={"prompt": "red apple"}, timeout=60)


def chat(server: Running, *urls: str) -> httpx.Response:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [{"type": "text", "text": "red apple"}, *parts]
    return httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": content}]}, timeout=60)


# ------------------------------------------------------------------------------------------------ a mask that is needed


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """FLUX.1 Fill: repaints where a mask is white."""
    with serve({"model": str(fill_folder(tmp_path_factory.mktemp("models"))), "max_num_seqs": 4}) as running:
        yield running


def left_half(mode: str = "L") -> Image.Image:
    mask = Image.new(mode, (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def test_a_mask_that_is_needed_is_asked_for(filler: Running) -> None:
    envelope(edit(filler, ("image", PICTURE)), 400, "invalid_value", "mask")
    envelope(edit(filler, ("mask", saved(left_half()))), 400, "invalid_value", "image")
    envelope(generate(filler), 400, "invalid_value", "image")
    envelope(chat(filler), 400, "invalid_value", "messages")
    assert filler.app.state.omni.info.pictures == {n: PictureInput(True, False) for n in ("image", "mask_image")}


def test_a_mask_is_read_in_gray_and_in_transparency(filler: Running) -> None:
    """As OpenAI's clients send it, transparent is where to repaint; the same mask in gray gives the same picture."""
    gray = pixels(edit(filler, ("image", PICTURE), ("mask_image", saved(left_half()))))
    see_through = scene("RGBA").resize((SIDE, SIDE))
    see_through.putalpha(Image.eval(left_half(), lambda value: 255 - value))
    np.testing.assert_array_equal(pixels(edit(filler, ("image", PICTURE), ("mask", saved(see_through)))), gray)
    all_of_it = saved(Image.new("L", (SIDE, SIDE), 255))
    assert not np.array_equal(pixels(edit(filler, ("image", PICTURE), ("mask", all_of_it))), gray)


def test_pictures_and_masks_in_json_or_numbered_are_those_of_a_form(filler: Running, klein: Running) -> None:
    def url(data: bytes) -> dict[str, str]:
        return {"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}

    mask, other = saved(left_half()), saved(scene().resize((SIDE, SIDE)))
    numbers = {"prompt": FIELDS["prompt"], "seed": 3, "steps": 4}
    wanted = pixels(edit(filler, ("image", PICTURE), ("mask", mask)))
    for parts in ((("image[0]", PICTURE), ("mask[0]", mask)), (("image[]", PICTURE), ("mask[]", mask))):
        np.testing.assert_array_equal(pixels(edit(filler, *parts)), wanted)
    body = numbers | {"images": [url(PICTURE)], "mask": url(mask)}
    np.testing.assert_array_equal(pixels(httpx.post(filler.url + EDITS, json=body, timeout=60)), wanted)
    two = pixels(edit(klein, ("image[0]", PICTURE), ("image[1]", other)))
    body = numbers | {"images": [url(PICTURE), url(other)]}
    np.testing.assert_array_equal(pixels(httpx.post(klein.url + EDITS, json=body, timeout=60)), two)
    too_many = numbers | {"images": [url(PICTURE)] * 40}
    envelope(httpx.post(klein.url + EDITS, json=too_many, timeout=60), 400, "invalid_value", "images")


def test_a_mask_of_another_size_is_refused(filler: Running) -> None:
    envelope(edit(filler, ("image", PICTURE), ("mask", saved(scene()))), 400, "invalid_value", "mask")


# -------------------------------------------------------------------------------------------- pictures that may be sent


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """FLUX.2 klein: draws from text, and from text and one picture or several."""
    with serve({"model": str(klein_folder(tmp_path_factory.mktemp("models"))), "max_num_seqs": 4}) as running:
        yield running


def test_an_optional_picture_is_optional(klein: Running) -> None:
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    assert generate(klein).status_code == chat(klein).status_code == chat(klein, url).status_code == 200
    one, two = (
        edit(klein, ("image", PICTURE)),
        edit(klein, ("image[]", PICTURE), ("image[]", saved(scene().resize((SIDE, SIDE))))),
    )
    assert not np.array_equal(pixels(one), pixels(two))
    envelope(httpx.post(klein.url + EDITS, data=FIELDS, files={"steps": (None, "4")}), 400, "invalid_value", "steps")
    envelope(httpx.post(klein.url + EDITS, data=FIELDS), 400, "invalid_value", "image")


def test_what_the_pipeline_refuses_itself_is_a_mistake_of_the_client(klein: Running) -> None:
    """Its own check of the picture: no 500, its words, and the name that the client gave the picture."""
    url = "data:image/png;base64," + base64.b64encode(saved(scene())).decode()
    for reply, name in ((edit(klein, ("image", saved(scene()))), "image"), (chat(klein, url), "messages"),
                        (edit(klein, ("image", PICTURE), url=url), "image")):  # fmt: skip
        envelope(reply, 400, "invalid_value", name)
        assert "too small: 64×48" in reply.json()["error"]["message"]


def test_the_model_says_what_it_takes(klein: Running) -> None:
    capable = httpx.get(klein.url + "/v1/models").json()["data"][0]["omni"]["capabilities"]
    assert capable["generations"] and capable["edits"] and capable["pictures"] == {"image": "optional"}


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_one_picture_too_many_is_named(repainter: Running) -> None:
    envelope(edit(repainter, ("image[]", PICTURE), ("image[]", PICTURE)), 400, "invalid_value", "image")
    url = "data:image/png;base64,AAAA"
    envelope(chat(repainter, url, url), 400, "invalid_value", "messages")


def test_parts_of_a_chat_may_be_short(repainter: Running) -> None:
    """As vllm-omni's examples send them."""
    text, b64 = {"text": "red apple"}, base64.b64encode(PICTURE).decode()
    url = f"data:image/png;base64,{b64}"
    full = [{"type": "text", **text}, {"type": "image_url", "image_url": {"url": url}}]

    def drawn(content: list[dict[str, Any]]) -> Any:
        body = {"messages": [{"role": "user", "content": content}], "seed": 1, "steps": 3}
        reply = httpx.post(repainter.url + CHAT, json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    wanted = drawn(full)
    assert drawn([text, {"image": b64}]) == drawn([text, {"type": "image", "image": url}]) == wanted
    for wrong in ({"image": 5}, {"image": b64, **text}, {"images": b64}, {}):
        body = {"messages": [{"role": "user", "content": [*full, wrong]}]}
        envelope(httpx.post(repainter.url + CHAT, json=body, timeout=60), 400, "invalid_value", "messages")


@pytest.mark.parametrize("name", ["mask", "mask_image", "control_image"])
def test_a_picture_without_an_argument_is_named(repainter: Running, name: str) -> None:
    reply = edit(repainter, ("image", PICTURE), (name, PICTURE))
    envelope(reply, 400, "unsupported_parameter", name)


def test_strength_without_effect_is_named(repainter: Running) -> None:
    envelope(edit(repainter, ("image", PICTURE), strength="0"), 400, "invalid_value", "strength")


def test_a_photo_is_scaled_to_the_models_pixels(repainter: Running) -> None:
    """64 by 64 are the model's own; a smaller one is rounded to its multiples, and a size that is asked for counts."""
    photo = saved(Image.effect_noise((400, 200), 80).convert("RGB"))
    told = edit(repainter, ("image", photo)).json()
    width, height = map(int, told["size"].split("x"))
    assert 0.8 * SIDE**2 < width * height < 1.2 * SIDE**2 and width / height == pytest.approx(2, rel=0.15)
    assert edit(repainter, ("image", photo), size="96x48").json()["size"] == "96x48"
    assert edit(repainter, ("image", saved(scene()))).json()["size"] == "64x48"


def test_a_size_that_was_never_sent_is_not_blamed(repainter: Running) -> None:
    """More pixels than the server allows, by the model's own size: the field that mends it is named."""
    info, few = repainter.app.state.omni.info, Limits(max_pixels=100)
    for given, wanted in (
        ({}, "size"),
        ({"size": "64x64"}, "size"),
        ({"width": 64}, "width"),
        ({"height": 8}, "height"),
    ):
        with pytest.raises(ApiError) as caught:
            plan_images(ImageRequest(prompt="x", **given), info, few)
        assert caught.value.param == wanted, given


# ----------------------------------------------------------------------------------------------- which model takes what

TAKES = {
    "FluxPipeline": {}, "FluxImg2ImgPipeline": {"image": "needed"}, "FluxKontextPipeline": {"image": "optional"},
    "Flux2Pipeline": {"image": "optional, several"}, "Flux2KleinPipeline": {"image": "optional, several"},
    "QwenImageEditPipeline": {"image": "needed"}, "QwenImageEditPlusPipeline": {"image": "needed, several"},
    "FluxFillPipeline": {"image": "needed", "mask_image": "needed"},
    "QwenImageInpaintPipeline": {"image": "needed", "mask_image": "needed"},
    "FluxControlPipeline": {"control_image": "needed"}, "FluxControlNetPipeline": {"control_image": "needed"},
    "StableDiffusion3ControlNetInpaintingPipeline": {"control_image": "needed", "control_mask": "needed"},
    "WanPipeline": {}, "WanImageToVideoPipeline": {"image": "needed"}, "LTXConditionPipeline": {"image": "optional"},
    "JoyImageEditPlusPipeline": {"images": "optional, several"}, "WanVACEPipeline": {},
    "LTXI2VLongMultiPromptPipeline": {"cond_image": "optional"}, "StableAudio3InpaintPipeline": {},
    "LTXImageToVideoPipeline": {"image": "needed"}, "Kandinsky5I2VPipeline": {"image": "needed"},
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES)
def test_what_a_pipeline_takes_is_read_from_its_call(name: str) -> None:
    found = picture_inputs(vars(diffusers)[name] if name in vars(diffusers) else getattr(diffusers, name))
    told = {
        argument: ("needed" if one.needed else "optional") + (", several" if one.several else "")
        for argument, one in found.items()
    }
    assert told == TAKES[name]


def info_of(**pictures: PictureInput) -> ModelInfo:
    return ModelInfo("m", "P", {}, {}, (), 16, 1 / 256, {}, False, pictures)


def test_a_picture_may_have_another_name_in_the_pipeline() -> None:
    one = ("image", b"")
    for argument, several in (("images", True), ("cond_image", False)):
        info = info_of(**{argument: PictureInput(False, several)})
        assert match_pictures(Body({}, sources=[one]), info, "image") == {argument: [one]}
        planned = plan_images(ImageRequest(prompt="x"), info, Limits(), {argument: (Image.new("RGB", (32, 32)),)})
        assert isinstance(planned.prompt["multi_modal_data"][argument], list) == several


def test_a_control_picture_may_be_sent_as_the_picture() -> None:
    """The official client can send nothing but `image` and `mask`."""
    control = info_of(control_image=PictureInput(True, False))
    one, named = ("image", b""), ("control_image", b"")
    assert match_pictures(Body({}, sources=[one]), control, "image") == {"control_image": [one]}
    assert match_pictures(Body({}, sources=[named]), control, "image") == {"control_image": [named]}
    both = info_of(image=PictureInput(True, False), control_image=PictureInput(True, False))
    with pytest.raises(ApiError, match="control image") as caught:
        match_pictures(Body({}, sources=[one]), both, "image")
    assert caught.value.param == "control_image"
