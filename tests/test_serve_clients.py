"""Clients of other tools over a live server with the bundled model: IOPaint, Krita, OpenAI, web UIs, probes."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from lgnet_fast import Inpainter, Session, create_model

from .serve_support import (
    GOOD,
    HOLE,
    MASK,
    PICTURE,
    base64_of,
    data_url,
    file_of,
    live_server,
    open_picture,
    photo,
    pixels_of,
    result_of_the_pipeline,
    rubbed_out,
)

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return result_of_the_pipeline()


# The body that IOPaint's page sends, with two misspelt names.
IOPAINT_PAGE = {
    "ldm_steps": 30, "ldm_sampler": "ddim", "zits_wireframe": True, "cv2_flag": "INPAINT_NS", "cv2_radius": 5,
    "hd_strategy": "Crop", "hd_strategy_crop_triger_size": 640, "hd_strategy_crop_margin": 128,
    "hd_trategy_resize_imit": 2048, "prompt": "", "negative_prompt": "", "use_croper": False, "croper_x": 0,
    "croper_y": 0, "croper_height": 512, "croper_width": 512, "use_extender": False, "extender_x": 0, "extender_y": 0,
    "extender_height": 640, "extender_width": 640, "sd_mask_blur": 12, "sd_strength": 1.0, "sd_steps": 50,
    "sd_guidance_scale": 7.5, "sd_sampler": "DPM++ 2M", "sd_seed": 7, "sd_match_histograms": False,
    "sd_lcm_lora": False, "enable_controlnet": False, "controlnet_method": "", "controlnet_conditioning_scale": 0.4,
    "enable_brushnet": False, "brushnet_method": "", "brushnet_conditioning_scale": 1.0,
    "enable_powerpaint_v2": False, "powerpaint_task": "text-guided",
    "paint_by_example_example_image": None, "p2p_image_guidance_scale": 1.5,
    "sd_keep_unmasked_area": True, "sd_scale": 1.0,
}  # fmt: skip


def test_iopaints_page(client, expected):
    body = {**IOPAINT_PAGE, "image": data_url(file_of(PICTURE)), "mask": data_url(file_of(HOLE))}
    answer = client.post("/api/v1/inpaint", json=body)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["x-strategy"] == "crop"
    assert "fill;dur=" in answer.headers["server-timing"]
    np.testing.assert_array_equal(pixels_of(answer.content), expected)


def test_krita_iopaint(client):
    rgba = np.dstack([PICTURE, photo(seed=3)[..., 0]])
    soft = np.where(HOLE, np.uint8(255), np.uint8(0))
    soft[29, 40:70] = 127  # below the threshold
    body = {"image": data_url(file_of(rgba)), "mask": data_url(file_of(soft))}
    answer = client.post("/api/v1/inpaint", json=body)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "42"
    result = pixels_of(answer.content)
    np.testing.assert_array_equal(result[..., 3], rgba[..., 3])
    np.testing.assert_array_equal(result[~HOLE], rgba[~HOLE])
    assert (result[HOLE] != rgba[HOLE]).any()


def test_bare_base64_and_octet_stream_urls(client, expected):
    body = {
        "image": base64_of(file_of(PICTURE)),
        "mask": data_url(file_of(HOLE), "application/octet-stream"),
        "something": {"new": 1},
    }
    np.testing.assert_array_equal(pixels_of(client.post("/api/v1/inpaint", json=body).content), expected)


@pytest.mark.parametrize("path", ["/api/v1/inpaint", "/inpaint"])
def test_multipart(client, expected, path):
    files = {"image": ("../../etc/passwd", file_of(PICTURE)), "mask": ("mask.png", file_of(HOLE))}
    fields = {"ldmSteps": "30", "hdStrategy": "HDStrategy.CROP", "hdStrategyCropTrigerSize": "800", "sdSeed": "11",
              "prompt": ""}  # fmt: skip
    answer = client.post(path, files=files, data=fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-seed"] == "11"
    np.testing.assert_array_equal(pixels_of(answer.content), expected)


def test_a_form_needs_no_disk(client, expected, monkeypatch):
    """The root of a container may be read-only, or full."""
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    large = file_of(PICTURE) + bytes(3 * 2**20)  # Pillow ignores what follows a PNG
    answer = client.post("/inpaint", files={"image": large, "mask": file_of(HOLE)})
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(pixels_of(answer.content), expected)


@pytest.mark.parametrize("path", ["/api/v1/inpaint", "/inpaint"])
def test_media_types_in_upper_case(client, path):
    request = client.build_request("POST", path, files={"image": file_of(PICTURE), "mask": file_of(HOLE)})
    kind, boundary = request.headers["content-type"].split("boundary=")
    request.headers["content-type"] = f"{kind.upper()}boundary={boundary}"
    request.headers["accept"] = "Application/JSON"
    answer = client.send(request)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == ("image/png" if path == "/inpaint" else "application/json")


def test_answers_keep_the_inputs_format_or_take_the_one_asked_for(client):
    jpeg, mask = file_of(PICTURE, "JPEG"), file_of(HOLE)
    body = {"image": base64_of(jpeg), "mask": base64_of(mask)}
    assert client.post("/api/v1/inpaint", json=body).headers["content-type"] == "image/jpeg"
    png = client.post("/api/v1/inpaint", json={**body, "format": "png"})
    assert png.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(pixels_of(png.content)[~HOLE], pixels_of(jpeg)[~HOLE])


def test_clients_that_take_anything_get_the_bytes(client):
    body = {"image": base64_of(file_of(PICTURE)), "mask": base64_of(file_of(HOLE))}
    for accept in ("application/json, text/plain, */*", "image/png, application/json", "*/*"):
        answer = client.post("/api/v1/inpaint", json=body, headers={"Accept": accept})
        assert answer.headers["content-type"] == "image/png", accept


def test_data_addresses_in_any_case(client):
    for scheme in ("data", "DATA"):
        mask = f"{scheme}:image/png;base64,{base64_of(file_of(HOLE))}"
        answer = client.post("/api/v1/inpaint", json={"image": base64_of(file_of(PICTURE)), "mask": mask})
        assert answer.status_code == 200, answer.text


def test_json_answers(client, expected):
    body = {"image": base64_of(file_of(PICTURE)), "mask": base64_of(file_of(~HOLE)), "invert_mask": True, "stages": 1}
    answer = client.post("/api/v1/inpaint", json=body, headers={"Accept": "application/json"}).json()
    head, _, text = answer["image"].partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(pixels_of(base64.b64decode(text)), expected)
    assert set(answer["timings"]) == {"queue", "decode", "fill", "encode"}
    assert answer["backend"]
    assert len(answer["stages"]) == 4
    asked = {"headers": {"Accept": "application/json"}, "json": {**body, "stages": 0}}
    assert "stages" not in client.post("/api/v1/inpaint", **asked).json()


def test_iopaints_other_calls(client):
    config = client.get("/api/v1/server-config").json()
    assert [model["name"] for model in config["modelInfos"]] == ["bundled"]
    assert client.get("/api/v1/model").json()["name"] == "bundled"
    assert client.post("/api/v1/model", json={"name": "bundled"}).status_code == 200
    assert client.post("/api/v1/model", json={"name": "sd"}).status_code == 403
    assert config["disableModelSwitch"]


def test_a_client_chooses_among_several_models(expected, tmp_path):
    torch.manual_seed(0)
    create_model("lgnet_demo", coarse_channels=4, local_channels=4, global_channels=4).save_pretrained(tmp_path / "m")
    asked = {"json": {"image": base64_of(GOOD), "mask": base64_of(MASK)}}
    with (
        live_server(models={"bundled": None, "other": str(tmp_path / "m")}) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        assert not client.get("/api/v1/server-config").json()["disableModelSwitch"]
        unknown = client.post("/api/v1/model", json={"name": "sd"})
        assert (unknown.status_code, unknown.json()["detail"]) == (
            400,
            "model: expected one of bundled, other, got 'sd'",
        )
        filled = {}
        for name in ("other", "bundled"):
            assert client.post("/api/v1/model", json={"name": name}).json()["name"] == name
            assert client.get("/api/v1/model").json()["name"] == name
            filled[name] = pixels_of(client.post("/api/v1/inpaint", **asked).content)
            form = {"image": ("a.png", rubbed_out(), "image/png")}
            edited = client.post("/v1/images/edits", files=form).json()["data"][0]["b64_json"]
            np.testing.assert_array_equal(pixels_of(base64.b64decode(edited)), filled[name])
    np.testing.assert_array_equal(filled["bundled"], expected)
    assert (filled["other"] != expected)[HOLE].mean() > 0.5


@pytest.mark.parametrize("operate", ["expand", "shrink", "reverse"])
def test_adjust_mask(client, operate):
    body = {"mask": data_url(file_of(HOLE)), "operate": operate, "kernel_size": 3}
    answer = client.post("/api/v1/adjust_mask", json=body)
    assert answer.headers["content-type"] == "image/png"
    shown = pixels_of(answer.content)
    painted = shown[..., 3] > 0
    count = {"expand": 20 * 30 + 2 * 3 * (20 + 30) + 4 * 4, "shrink": 14 * 24, "reverse": 96 * 120 - 600}[operate]
    assert painted.sum() == count
    assert set(map(tuple, shown[painted].tolist())) == {(255, 203, 0, 186)}


def test_openais_client(server, expected):
    openai = pytest.importorskip("openai")
    calls = openai.OpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0)
    for image, mask in ((file_of(PICTURE), rubbed_out()), (rubbed_out(), None)):
        more = {} if mask is None else {"mask": ("mask.png", mask)}
        answer = calls.images.edit(image=("photo.png", image), prompt="nothing there", model="lgnet", **more)
        result = pixels_of(base64.b64decode(answer.data[0].b64_json))
        np.testing.assert_array_equal(result, expected)
    with pytest.raises(openai.BadRequestError, match="no pixel is transparent") as caught:
        calls.images.edit(image=("photo.png", file_of(PICTURE)), mask=("m.png", file_of(PICTURE)), prompt="x")
    assert caught.value.body["param"] == "mask"
    with pytest.raises(openai.BadRequestError, match="n: expected 1"):
        calls.images.edit(image=("photo.png", rubbed_out()), prompt="x", n=2)
    with pytest.raises(openai.BadRequestError, match="size: expected auto or the picture's 120x96"):
        calls.images.edit(image=("photo.png", rubbed_out()), prompt="x", size="512x512")


@pytest.mark.parametrize("masked", [True, False])
def test_a_size_that_openais_call_cannot_give_is_refused_before_the_fill(client, monkeypatch, masked):
    filled = []
    monkeypatch.setattr(Session, "fill", lambda *args, **kwargs: filled.append(1))
    files = {"image": file_of(PICTURE), "mask": rubbed_out()} if masked else {"image": rubbed_out()}
    answer = client.post("/v1/images/edits", files=files, data={"size": "512x512"})
    assert answer.status_code == 400
    assert "size: expected auto or the picture's 120x96" in answer.text
    assert not filled


def test_openais_compression_begins_at_0(client):
    sizes = []
    for given in ("0", "90"):
        fields = {"output_format": "jpeg", "output_compression": given}
        answer = client.post("/v1/images/edits", files={"image": GOOD, "mask": rubbed_out()}, data=fields)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["output_format"] == "jpeg"
        sizes.append(len(told["data"][0]["b64_json"]))
    assert sizes[0] * 4 < sizes[1]


def inks() -> bytes:
    """A profile of CMYK by which every colour without black is the grey of Lab 50, 0, 0."""
    grey, black = bytes([128, 128, 128]), bytes([0, 128, 128])
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 * (number % 4 == 0) for number in range(9)))
    table += bytes(range(256)) * 4 + (grey + black) * 8 + bytes(range(256)) * 3
    head = struct.pack(">I4sI4s4s4s", 128 + 16 + len(table), b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize("profile", [None, inks()], ids=["no profile", "profile"])
def test_cmyk_is_answered_as_rgb_where_a_client_takes_png(client, profile):
    file = io.BytesIO()
    own = Image.fromarray(PICTURE).convert("CMYK")
    own.save(file, "JPEG", quality=95, icc_profile=profile)
    jpeg = file.getvalue()
    known = pixels_of(jpeg)[0, 0]
    plain = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    body = {"init_images": [base64_of(jpeg)], "mask": base64_of(MASK), "mask_blur": 0}
    answer = client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 200, answer.text
    edit = client.post("/v1/images/edits", files={"image": jpeg, "mask": rubbed_out()})
    assert edit.status_code == 200, edit.text
    told = open_picture(client, jpeg)
    at = f"/api/v1/pictures/{told['id']}"
    assert client.post(f"{at}/fill?x=0&y=0", content=MASK).status_code == 200
    copy = client.get(f"{at}/result?format=png")
    assert copy.headers["content-type"] == "image/png"
    for data in (
        base64.b64decode(answer.json()["images"][0]),
        base64.b64decode(edit.json()["data"][0]["b64_json"]),
        copy.content,
    ):
        with Image.open(io.BytesIO(data)) as shown:
            assert (shown.mode, "icc_profile" in shown.info) == ("RGB", False)
            if profile is None:
                np.testing.assert_array_equal(np.asarray(shown)[~HOLE], plain[~HOLE])
            else:
                assert np.abs(np.asarray(shown).astype(int) - 119).max() <= 2
    saved = client.get(f"{at}/result")
    assert saved.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(saved.content)) as kept:
        assert (kept.mode, kept.info.get("icc_profile")) == ("CMYK", profile)
        np.testing.assert_allclose(np.asarray(kept)[0, 0].astype(int), known, atol=4)


def test_webuiapis_client(server):
    webuiapi = pytest.importorskip("webuiapi")
    calls = webuiapi.WebUIApi(host="127.0.0.1", port=urlsplit(server).port)
    mask = Image.open(io.BytesIO(file_of(HOLE)))
    answer = calls.img2img(
        images=[Image.fromarray(PICTURE)], mask_image=mask, mask_blur=0, inpainting_fill=1, prompt="x", steps=20
    )
    expected = Inpainter.from_pretrained(None)(PICTURE, HOLE)
    np.testing.assert_array_equal(np.asarray(answer.image), expected)
    inverted = calls.img2img(
        images=[Image.fromarray(PICTURE)],
        mask_image=Image.open(io.BytesIO(file_of(~HOLE))),
        mask_blur=2,
        inpainting_mask_invert=1,
    )
    expected = Inpainter.from_pretrained(None)(PICTURE, HOLE, feather=2)
    np.testing.assert_array_equal(np.asarray(inverted.image), expected)


def test_a_mask_with_transparent_places_is_its_alpha_for_a1111(client, expected):
    """Black strokes on a transparent layer, as editors export them."""
    strokes = np.zeros((*HOLE.shape, 4), np.uint8)
    strokes[HOLE, 3] = 255
    opaque = np.dstack([np.repeat(HOLE[..., None] * np.uint8(255), 3, axis=2), np.full(HOLE.shape, 255, np.uint8)])
    for mask in (strokes, opaque):
        body = {"init_images": [base64_of(file_of(PICTURE))], "mask": base64_of(file_of(mask)), "mask_blur": 0}
        answer = client.post("/sdapi/v1/img2img", json=body)
        assert answer.status_code == 200, answer.text
        np.testing.assert_array_equal(pixels_of(base64.b64decode(answer.json()["images"][0])), expected)
    damaged = {**body, "mask": base64_of(file_of(strokes)[:-40])}
    refused = client.post("/sdapi/v1/img2img", json=damaged)
    assert refused.status_code == 400
    assert "mask" in refused.text


def test_head_is_get_without_a_body(client):
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/docs", "/static/main.js", "/api/v1/page"):
        head, got = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == str(len(got.content))
        assert head.headers.get("content-type") == got.headers.get("content-type")
    assert client.head("/inpaint").status_code == 405


def test_probes_and_metrics(client):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/lgnet/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/v2/models/lgnet").json()["name"] == "lgnet"
    text = client.get("/metrics").text
    assert 'lgnet_requests_total{code="200",path="/v2/health/live"}' in text
    assert 'lgnet_seconds_count{phase="fill"}' in text
    assert "lgnet_queue_depth 0.0" in text
    assert 'lgnet_model_info{backend="engine on cpu, float32",model="bundled"} 1.0' in text
