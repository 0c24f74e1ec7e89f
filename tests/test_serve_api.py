"""The HTTP API over a live server with the bundled model: the page's calls, other tools' clients, bad requests."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from lgnet_fast import Inpainter
from lgnet_fast.samples import sample_paths
from lgnet_fast.serve.options import ServeOptions

from .serve_support import base64_of, data_url, file_of, hole, live_server, photo, pixels_of

PICTURE, HOLE = photo(), hole()

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    options = ServeOptions(max_bytes=4 * 2**20, max_pixels=4_000_000, body_timeout=1.5, cors=("https://ok.example",))
    with live_server(options, {"bundled": None}) as address:
        yield address


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The pipeline's result for PICTURE and HOLE."""
    return np.asarray(Inpainter.from_pretrained(None)(PICTURE, HOLE))


# -- clients of other tools -----------------------------------------------------------------------------------------

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


def test_json_answers(client, expected):
    body = {"image": base64_of(file_of(PICTURE)), "mask": base64_of(file_of(~HOLE)), "invert_mask": True, "stages": 1}
    answer = client.post("/api/v1/inpaint", json=body, headers={"Accept": "application/json"}).json()
    head, _, text = answer["image"].partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(pixels_of(base64.b64decode(text)), expected)
    assert set(answer["timings"]) == {"queue", "decode", "fill", "encode"}
    assert answer["backend"]
    assert len(answer["stages"]) == 4


def test_iopaints_other_calls(client):
    config = client.get("/api/v1/server-config").json()
    assert [model["name"] for model in config["modelInfos"]] == ["bundled"]
    assert client.get("/api/v1/model").json()["name"] == "bundled"
    assert client.post("/api/v1/model", json={"name": "bundled"}).status_code == 200
    assert client.post("/api/v1/model", json={"name": "sd"}).status_code == 403


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


def rubbed_out() -> bytes:
    return file_of(np.dstack([PICTURE, np.where(HOLE, np.uint8(0), np.uint8(255))]))


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


# -- the page's calls -----------------------------------------------------------------------------------------------


def open_picture(client: httpx.Client, data: bytes) -> dict:
    answer = client.post("/api/v1/pictures", content=data)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_fill_undo_and_result(client, expected):
    told = open_picture(client, file_of(PICTURE))
    assert {**told, "id": ""} == {"id": "", "width": 120, "height": 96, "format": "png", "alpha": False, "depth": 8}
    at = f"/api/v1/pictures/{told['id']}"
    mask = io.BytesIO()
    Image.fromarray(np.full((20, 30), 255, np.uint8)).convert("1").save(mask, "PNG")
    answer = client.post(f"{at}/fill?x=40&y=30&position=0", content=mask.getvalue())
    assert answer.headers["x-boxes"] == "40,30,30,20"
    assert answer.headers["x-position"] == "1"
    patch = pixels_of(answer.content)
    assert patch.shape == (20, 30, 4)
    assert (patch[..., 3] == 255).all()
    np.testing.assert_array_equal(patch[..., :3], expected[30:50, 40:70])
    np.testing.assert_array_equal(pixels_of(client.get(f"{at}/result").content), expected)
    jpeg = client.get(f"{at}/result?format=jpeg&quality=80")
    assert jpeg.headers["content-type"] == "image/jpeg"
    assert jpeg.headers["content-disposition"] == "attachment"
    stages = client.get(f"{at}/stages").json()
    assert [stage["name"] for stage in stages["stages"]] == ["masked", "coarse", "local", "result"]
    assert stages["box"] == [0, 0, 118, 96]
    np.testing.assert_array_equal(pixels_of(client.get(f"{at}/result?position=0").content), PICTURE)
    for path in ("result?position=2", "view?position=2", "stages?position=0", "stages?position=2"):
        assert client.get(f"{at}/{path}").status_code == 400
    assert client.get(f"{at}/view?position=1").status_code == 200
    assert client.delete(at).status_code == 204
    assert client.get(f"{at}/view").status_code == 404
    assert client.post(f"{at}/fill?x=0&y=0", content=mask.getvalue()).status_code == 404


def test_the_format_that_is_told_is_the_one_that_is_saved(client):
    for name, long in (("gif", "GIF"), ("bmp", "BMP"), ("jp2", "JPEG2000")):
        told = open_picture(client, file_of(PICTURE[..., 0], long))
        assert told["format"] == name
        saved = client.get(f"/api/v1/pictures/{told['id']}/result")
        assert saved.headers["content-type"] == f"image/{name}"
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    told = open_picture(client, file_of(PICTURE, "HEIF"))
    assert told["format"] == "heif"
    assert client.get(f"/api/v1/pictures/{told['id']}/result").headers["content-type"] == "image/heif"


def test_an_unknown_format_is_told_the_same_on_both_ways(client):
    told = open_picture(client, GOOD)
    saved = client.get(f"/api/v1/pictures/{told['id']}/result?format=exe")
    filled = client.post(**inpaint(format="exe"))
    assert (saved.status_code, filled.status_code) == (400, 400)
    assert saved.json()["detail"] == filled.json()["detail"]


def test_far_parts_come_below_one_another(client):
    told = open_picture(client, file_of(photo(600, 900)))
    mask = hole(600, 900, (10, 30, 20, 60)) | hole(600, 900, (500, 520, 800, 850))
    answer = client.post(f"/api/v1/pictures/{told['id']}/fill?x=0&y=0", content=file_of(mask))
    assert answer.headers["x-boxes"] == "20,10,40,20;800,500,50,20"
    patch = pixels_of(answer.content)
    assert patch.shape == (40, 50, 4)
    result = pixels_of(client.get(f"/api/v1/pictures/{told['id']}/result").content)
    np.testing.assert_array_equal(patch[:20, :40, :3], result[10:30, 20:60])
    np.testing.assert_array_equal(patch[20:, :, :3], result[500:520, 800:850])
    assert not patch[:20, 40:].any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_shown_and_filled_upright(client, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = file_of(photo(40, 64), "WEBP" if orientation % 2 else "JPEG", exif=exif)
    told = open_picture(client, data)
    size = (40, 64) if orientation > 4 else (64, 40)
    assert (told["width"], told["height"]) == size
    shown = Image.open(io.BytesIO(client.get(f"/api/v1/pictures/{told['id']}/view").content))
    assert shown.size == size
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.abs(np.asarray(shown).astype(int) - upright).mean() < 6


def test_views_are_boxes_of_at_most_so_many_pixels(client):
    told = open_picture(client, file_of(photo(300, 400)))
    at = f"/api/v1/pictures/{told['id']}/view"
    shown = pixels_of(client.get(f"{at}?x=100&y=50&width=200&height=100&longest=50").content)
    assert shown.shape == (25, 50, 3)
    whole = pixels_of(client.get(f"{at}?x=100&y=50&width=2000&height=100").content)
    assert whole.shape == (100, 300, 3)
    assert np.abs(whole.astype(int) - photo(300, 400)[50:150, 100:400]).mean() < 4
    assert client.get(f"{at}?x=400&y=0").status_code == 400


def test_profiles_and_depth_are_for_the_file_and_the_screen_gets_srgb(client):
    deep = Image.fromarray(photo()[..., 0].astype(np.uint16) * 257)
    file = io.BytesIO()
    deep.save(file, "PNG")
    told = open_picture(client, file.getvalue())
    assert told["depth"] == 16
    shown = pixels_of(client.get(f"/api/v1/pictures/{told['id']}/view").content)
    assert np.abs(shown[..., 0].astype(int) - photo()[..., 0]).mean() < 4
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    told = open_picture(client, file_of(PICTURE, icc_profile=profile))
    assert client.get(f"/api/v1/pictures/{told['id']}/view").status_code == 200


def test_alpha_is_shown_and_kept(client):
    alpha = photo(seed=5)[..., 0]
    told = open_picture(client, file_of(np.dstack([PICTURE, alpha])))
    assert told["alpha"]
    at = f"/api/v1/pictures/{told['id']}"
    shown = client.get(f"{at}/view")
    assert shown.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(pixels_of(shown.content)[..., 3], alpha)
    answer = client.post(f"{at}/fill?x=0&y=0", content=file_of(HOLE))
    np.testing.assert_array_equal(pixels_of(answer.content)[..., 3], alpha[30:50, 40:70])


def test_masks_are_read_as_the_pipeline_reads_them(client):
    told = open_picture(client, file_of(PICTURE))
    at = f"/api/v1/pictures/{told['id']}/mask"
    shown = pixels_of(client.post(at, content=file_of(HOLE)).content)
    np.testing.assert_array_equal(shown[..., 1] > 0, HOLE)
    ambiguous = client.post(at, content=rubbed_out())
    assert ambiguous.status_code == 400
    assert "mask_channel" in ambiguous.json()["detail"]
    shown = pixels_of(client.post(f"{at}?channel=inverse_alpha", content=rubbed_out()).content)
    np.testing.assert_array_equal(shown[..., 1] > 0, HOLE)


def test_samples_and_what_the_page_offers(client):
    page = client.get("/api/v1/page").json()
    assert page["samples"] == list(sample_paths())
    told = client.post(f"/api/v1/pictures?sample={page['samples'][0]}").json()
    with Image.open(sample_paths()[page["samples"][0]][0]) as own:
        assert (told["width"], told["height"]) == own.size
    thumbnail = client.get(f"/api/v1/samples/{page['samples'][0]}")
    assert max(Image.open(io.BytesIO(thumbnail.content)).size) <= 480
    assert client.get("/api/v1/samples/none").status_code == 404


def test_the_page_asks_at_once_for_modules_that_it_would_find_later(client):
    """Those that `main.js` does not import itself."""
    folder = Path(__file__).parents[1] / "lgnet_fast" / "serve" / "static"
    own = set(re.findall(r'from "\./([a-z]+\.js)"', (folder / "main.js").read_text()))
    told = set(re.findall(r'<link rel="modulepreload" href="static/([a-z]+\.js)">', client.get("/").text))
    assert told == {path.name for path in folder.glob("*.js")} - own - {"main.js", "docs.js"}


def test_static_files_name_no_other_host(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    folder = Path(__file__).parents[1] / "lgnet_fast" / "serve" / "static"
    size = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200, name
        assert answer.content == path.read_bytes()
        size += len(zlib.compress(answer.content))
        if "vendor" not in name:
            text = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text, name
            assert "https:" not in text, name
    assert size < 400_000
    for name in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "vendor", "", "index.html/"):
        assert client.get(f"/static/{name}").status_code == 404


# -- who may ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "https://ok.example", "Sec-Fetch-Site": "cross-site"}, 201),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": "[::1]:9"}, 201),
        ({"Host": "localhost"}, 201),
    ],
    ids=str,
)
def test_origins_and_hosts(client, headers, status):
    answer = client.post("/api/v1/pictures", content=file_of(PICTURE), headers=headers)
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == ("https://ok.example" if headers.get("Origin") == "https://ok.example" else None)


@pytest.mark.parametrize(("host", "status"), [(b"", 200), (b"Host: evil.example\r\n", 421), (b"Host: \r\n", 421)])
def test_http_1_0_needs_no_host(server, host, status):
    """Such clients may send none; where there is one, it is checked."""
    answer = answer_of(server, b"GET /v2/health/ready HTTP/1.0\r\n" + host + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def answer_of(server: str, request: bytes) -> bytes:
    """The answer to the bytes of a request, after which the server closes the connection."""
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://127.0.0.1/v2/health/ready", "127.0.0.1", 200),
        ("HTTPS://LOCALHOST:80/v2/health/ready?x=1", "localhost", 200),
        ("http://127.0.0.1/v2/health/re%61dy", "127.0.0.1", 200),
        ("http://127.0.0.1", "127.0.0.1", 200),
        ("http://127.0.0.1?x=1", "127.0.0.1", 200),
        ("http://127.0.0.1/nothing", "127.0.0.1", 404),
        ("http://127.0.0.1/v2/health/ready", "evil.example", 200),
        ("http://evil.example/v2/health/ready", "127.0.0.1", 421),
        ("http:///v2/health/ready", "127.0.0.1", 421),
    ],
)
def test_targets_may_be_whole_addresses(server, target, host, status):
    """RFC 9112, section 3.2.2: the host of the address counts, the header is ignored."""
    request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = answer_of(server, request.encode())
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert (b"<!doctype html>" in answer) == (status == 200 and "health" not in target)


def test_own_origin_and_preflight(client, server):
    own = client.post("/api/v1/pictures", content=file_of(PICTURE), headers={"Origin": server})
    assert own.status_code == 201
    ask = {"Access-Control-Request-Method": "POST"}
    assert client.options("/inpaint", headers={"Origin": "https://ok.example", **ask}).status_code == 204
    told = client.get("/api/v1/page", headers={"Origin": "https://ok.example"})
    exposed = told.headers["access-control-expose-headers"].split(", ")
    assert {"X-Boxes", "X-Position", "X-Strategy", "X-Seed", "Retry-After", "Server-Timing"} <= set(exposed)
    assert "access-control-expose-headers" not in own.headers
    assert client.options("/inpaint", headers={"Origin": "https://evil.example", **ask}).status_code == 405


def test_tokens():
    with live_server(ServeOptions(token="s3cret")) as address, httpx.Client(base_url=address) as client:
        open_paths = (
            "/",
            "/static/main.js",
            "/docs",
            "/v2/health/live",
            "/v2/models/lgnet",
            "/v2/models/lgnet/ready",
        )
        for path in open_paths:
            assert client.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic ***"},
            {"Authorization": "s3cret"},
        ):
            for path in ("/api/v1/page", "/metrics", "/api/v1/server-config"):
                assert client.get(path, headers=headers).status_code == 401
        assert client.get("/api/v1/page", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/api/v1/page", auth=("any", "s3cret")).status_code == 200
        refused = client.post("/v1/images/edits")
        assert refused.status_code == 401
        assert refused.json()["error"] == {
            "message": "token: expected the header Authorization: Bearer TOKEN",
            "type": "invalid_request_error",
            "param": "token",
            "code": "RequestError",
        }


# -- bad requests ---------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than it holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


GOOD, MASK = file_of(PICTURE), file_of(HOLE)
TRUNCATED = GOOD[: len(GOOD) // 2]


def inpaint(**changes: object) -> dict:
    return {"url": "/api/v1/inpaint", "json": {"image": base64_of(GOOD), "mask": base64_of(MASK), **changes}}


def form(url: str = "/inpaint", fields: dict | None = None, **files: bytes) -> dict:
    return {"url": url, "files": {name: (name, data) for name, data in files.items()}, "data": fields or {}}


BAD = {
    "no body": ({"url": "/api/v1/inpaint", "content": b""}, 422, "body: expected JSON"),
    "not JSON": ({"url": "/api/v1/inpaint", "content": b"{'image'"}, 422, "body: expected JSON"),
    "a list": ({"url": "/api/v1/inpaint", "json": []}, 422, "body"),
    "nested JSON": ({"url": "/api/v1/inpaint", "content": b"[" * 100_000}, 422, "body"),
    "no mask": ({"url": "/api/v1/inpaint", "json": {"image": base64_of(GOOD)}}, 422, "mask: Field required"),
    "a number": (inpaint(image=5), 422, "image: "),
    "null": (inpaint(mask=None), 422, "mask: "),
    "not base64": (inpaint(image="&&&"), 400, "image: expected base64"),
    "an empty text": (inpaint(image=""), 400, "image: expected a picture file"),
    "an address": (inpaint(image="http://127.0.0.1/a.png"), 400, "image: addresses are not fetched"),
    "a file's address": (inpaint(mask="file:///etc/passwd"), 400, "mask: addresses are not fetched"),
    "not a picture": (inpaint(image=base64_of(b"hello")), 400, "image: expected a readable picture"),
    "a torn picture": (inpaint(image=base64_of(TRUNCATED)), 400, "image"),
    "a torn mask": (inpaint(mask=base64_of(MASK[: len(MASK) // 2])), 400, "mask"),
    "a text as mask": (inpaint(mask=base64_of(b"<svg></svg>")), 400, "mask: expected a readable picture"),
    "another size": (inpaint(mask=base64_of(file_of(hole(97, 120)))), 400, "expected the picture's size 120x96"),
    "an empty mask": (inpaint(mask=base64_of(file_of(HOLE & False))), 400, "no hole pixel"),
    "a full mask": (inpaint(mask=base64_of(file_of(HOLE | True))), 400, "100.0% of the picture is hole"),
    "a bomb": (inpaint(image=base64_of(bomb(20_000, 20_000))), 413, "image: expected at most 4000000 pixels (--max-"),
    "a bomb to open": (
        {"url": "/api/v1/pictures", "content": bomb(20_000, 20_000)}, 413, "picture: expected at most 4000000"),
    "a large picture": (inpaint(image=base64_of(bomb(2001, 2000))), 413, "image: expected at most 4000000 pixels"),
    "a large mask": (inpaint(mask=base64_of(bomb(2001, 2000))), 413, "mask: expected at most 4000000 pixels"),
    "a promise not kept": (inpaint(image=base64_of(bomb(1900, 1900))), 400, "image"),
    "a wrong strategy": (inpaint(strategy="best"), 400, "strategy: expected one of"),
    "a wrong HD strategy": (inpaint(hd_strategy="Best"), 400, "hd_strategy: expected Original, Crop or Resize"),
    "a negative dilate": (inpaint(dilate=-1), 422, "dilate: "),
    "a huge dilate": (inpaint(dilate=10**9), 422, "dilate: "),
    "a text as feather": (inpaint(feather="wide"), 422, "feather: "),
    "a threshold": (inpaint(mask_threshold=1.0), 422, "mask_threshold: "),
    "a channel": (inpaint(mask_channel="red"), 400, "mask_channel: expected one of"),
    "a channel that is not there": (inpaint(mask_channel="alpha"), 400, "needs a mask with transparency"),
    "a format": (inpaint(format="exe"), 400, "format: expected one of"),
    "a quality": (inpaint(quality=0), 422, "quality: "),
    "a format that holds no alpha": (
        {"url": "/api/v1/inpaint", "json": {"image": base64_of(file_of(np.dstack([PICTURE, PICTURE[..., 0]]))),
         "mask": base64_of(MASK), "format": "jpeg"}}, 400, "format: JPEG holds"),
    "too many bytes": (
        {"url": "/api/v1/pictures", "content": b"\0" * (4 * 2**20 + 1)}, 413, "body: expected at most"),
    "bytes that were not announced": (
        {"url": "/api/v1/pictures", "content": (b"\0" * 2**20 for _ in range(6))}, 413, "body: expected at most"),
    "a compressed body": (
        {"url": "/api/v1/pictures", "content": zlib.compress(GOOD), "headers": {"content-encoding": "deflate"}}, 415,
        "body: expected no Content-Encoding, got 'deflate'"),
    "no form": ({"url": "/inpaint", "json": {}}, 415, "multipart/form-data"),
    "a form without a mask": (form(image=GOOD), 422, "mask: expected a picture file"),
    "a form of texts": ({"url": "/inpaint", "data": {"image": "x"}, "files": {"mask": MASK}}, 422, "image: "),
    "a broken form": (
        {"url": "/inpaint", "content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, 400, ""),
    "many fields": (form(fields={f"f{n}": "1" for n in range(100)}, image=GOOD, mask=MASK), 400, "Too many fields"),
    "many files": (form(image=GOOD, mask=MASK, a=b"1", b=b"2", c=b"3"), 400, "Too many files"),
    "a seed": (form(fields={"sdSeed": "x"}, image=GOOD, mask=MASK), 422, "sd_seed: "),
    "a wrong operation": (
        {"url": "/api/v1/adjust_mask", "json": {"mask": base64_of(MASK), "operate": "twist"}}, 400, "operate: "),
    "an edit without an image": (form("/v1/images/edits", mask=rubbed_out()), 400, "image: expected one"),
    "an edit of two": (
        {"url": "/v1/images/edits", "files": [("image[]", GOOD), ("image[]", GOOD)]}, 400, "expected one file"),
    "an edit as URL": (
        form("/v1/images/edits", {"response_format": "url"}, image=rubbed_out()), 400, "response_format: "),
    "an edit with a wrong compression": (
        form("/v1/images/edits", {"output_format": "webp", "output_compression": "101"}, image=rubbed_out()), 422,
        "output_compression: expected a whole number from 0 to 100, got '101'"),
    "an edit by a torn mask": (form("/v1/images/edits", image=GOOD, mask=rubbed_out()[:-900]), 400, "mask"),
    "no initial image": (
        {"url": "/sdapi/v1/img2img", "json": {"init_images": [], "mask": base64_of(MASK)}}, 422, "init_images: "),
    "an unknown picture": ({"url": "/api/v1/pictures/no/fill?x=0&y=0", "content": MASK}, 404, "send it again"),
    "no place": ({"url": "/api/v1/pictures/no/fill", "content": MASK}, 422, "x: Field required"),
    "a picture of a sample that is none": ({"url": "/api/v1/pictures?sample=../x"}, 404, "no such sample"),
    "an empty picture": ({"url": "/api/v1/pictures", "content": b""}, 400, "picture: expected a picture file"),
    "an unknown path": ({"url": "/api/v1/nothing"}, 404, "Not Found"),
    "a wrong method": ({"url": "/metrics"}, 405, "Method Not Allowed"),
    "another origin": ({"url": "/inpaint", "headers": {"origin": "http://evil"}}, 403, "origin: "),
    "a long header": ({"url": "/inpaint", "headers": {"x-long": "x" * 200_000}}, 400, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_wrong(server, name):
    request, status, text = BAD[name]
    with httpx.Client(base_url=server, timeout=60) as client:
        try:
            answer = client.post(**request)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            assert status in (400, 413)  # answered while it was still being sent
        else:
            assert answer.status_code == status, answer.text
            if text:
                told = answer.json()
                told = told["error"]["message"] if request["url"].startswith("/v1/") else told["detail"]
                assert text in told
        assert client.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("piece", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("preamble", "epilogue"),
    [
        (b"", b""),
        (b"\r\n", b"\r\n"),
        (b"This is a message of several parts.\r\n", b"\r\nThe end.\r\n"),
        (b"--y\r\n\r\n--not this one\r\n", b"\r\n--x\r\nno part\r\n"),
    ],
)
def test_text_around_the_parts_of_a_form_is_ignored(client, preamble, epilogue, piece):
    """RFC 2046, section 5.1.1."""
    parts = b"".join(
        b"--x\r\nContent-Disposition: form-data; name=%s; filename=a\r\n\r\n%s\r\n" % (name, data)
        for name, data in ((b"image", GOOD[:40]), (b"mask", MASK))
    )
    body = preamble + parts + b"--x--" + epilogue
    answer = client.post(
        "/inpaint",
        content=(body[at : at + piece] for at in range(0, len(body), piece)),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("image: expected a readable picture")  # it was found, and is torn


def test_after_all_that_a_good_request_works(client, expected):
    assert len(BAD) >= 40
    answer = client.post(**inpaint())
    np.testing.assert_array_equal(pixels_of(answer.content), expected)
    assert 'code="500"' not in client.get("/metrics").text


def test_a_body_that_stops_is_given_up(server):
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server).port, timeout=20)
    connection.putrequest("POST", "/api/v1/pictures")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"\x89PNG")
    answer = connection.getresponse()
    assert answer.status == 408
    assert "no data for 1.5 seconds" in json.loads(answer.read())["detail"]
    connection.close()


def test_a_full_queue_is_told_as_429():
    with (
        live_server(ServeOptions(queue=1, threads=1)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        large = file_of(photo(700, 900))
        mask = file_of(np.ones((700, 900), bool) & (np.indices((700, 900)).sum(axis=0) % 300 < 20))
        body = {"image": base64_of(large), "mask": base64_of(mask)}
        slow = threading.Thread(
            target=httpx.post, args=(f"{address}/api/v1/inpaint",), kwargs={"json": body, "timeout": 300}
        )
        slow.start()
        deadline = time.monotonic() + 60
        while "lgnet_queue_depth 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        statuses = set()
        while slow.is_alive() and 429 not in statuses:
            answer = client.post(**inpaint())
            statuses.add(answer.status_code)
        slow.join()
        assert 429 in statuses
        assert int(answer.headers["retry-after"]) >= 1
        assert "queue: all 1 places are taken" in answer.json()["detail"]


def test_over_the_time_limit_is_504_without_a_time_to_come_again_and_idle_pictures_are_closed():
    options = ServeOptions(timeout=0.1, session_idle=0.4)
    with live_server(options) as address, httpx.Client(base_url=address, timeout=60) as client:
        large, mask = file_of(photo(700, 900)), file_of(hole(700, 900, (100, 600, 100, 800)))
        body = {"image": base64_of(large), "mask": base64_of(mask), "strategy": "full"}
        answer = client.post("/api/v1/inpaint", json=body)
        assert answer.status_code == 504
        assert "retry-after" not in answer.headers
        assert answer.json()["detail"] == "timeout: the request took more than 0.1 seconds (--timeout)"

        deadline = time.monotonic() + 60
        while client.post("/api/v1/pictures", content=GOOD).status_code != 201:  # the large one still runs
            assert time.monotonic() < deadline
        while "lgnet_pictures 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
