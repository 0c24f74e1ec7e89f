"""The page's calls over a live server with the bundled model, and the files that it loads."""

from __future__ import annotations

import base64
import io
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from lgnet_fast.samples import sample_paths

from .serve_support import (
    GOOD,
    HOLE,
    PICTURE,
    file_of,
    hole,
    inpaint,
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


def test_fill_undo_and_result(client, expected):
    told = open_picture(client, file_of(PICTURE))
    assert {**told, "id": ""} == {
        "id": "",
        "width": 120,
        "height": 96,
        "format": "png",
        "alpha": False,
        "depth": 8,
        "frames": 1,
    }
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
    for stage in stages["stages"]:
        kind, encoded = stage["image"].split(",")
        assert kind == "data:image/png;base64"
        assert pixels_of(base64.b64decode(encoded)).shape[:2] == (96, 118)
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


@pytest.mark.parametrize(
    ("format", "count", "frames"), [("GIF", 3, 3), ("PNG", 2, 2), ("TIFF", 2, 2), ("TIFF", 1, 1), ("MPO", 2, 1)]
)
@pytest.mark.filterwarnings("ignore:.*frames is used")
def test_the_number_of_frames_is_told(client, format, count, frames):
    first, *others = [Image.fromarray(photo(seed=seed)) for seed in range(count)]
    file = io.BytesIO()
    first.save(file, format, **({"save_all": True, "append_images": others} if count > 1 else {}))
    assert open_picture(client, file.getvalue())["frames"] == frames


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "YCbCr"])
def test_the_screen_gets_srgb_of_every_mode(client, mode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Red and green change places.
    profile = profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    levels = np.full((40, 60, 3), (200, 60, 40), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).convert(mode).save(file, "TIFF", icc_profile=profile)
    try:
        Image.open(file).load()
    except OSError:
        pytest.skip("this Pillow does not read the YCbCr that it writes")
    at = f"/api/v1/pictures/{open_picture(client, file.getvalue())['id']}"
    shown = pixels_of(client.get(f"{at}/view").content).astype(int)
    assert np.abs(shown[..., :3].mean(axis=(0, 1)) - (60, 200, 40)).max() <= 8  # a palette dithers
    patch = client.post(f"{at}/fill?x=20&y=10", content=file_of(np.ones((10, 10), dtype=bool)))
    filled = pixels_of(patch.content)
    assert (filled[filled[..., 3] > 0][:, 1] > filled[filled[..., 3] > 0][:, 0]).all()


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
    assert "mask_channel" in ambiguous.json()["detail"]  # the page's sign to ask
    for channel, expected in (("red", "channel: expected one of auto, luma"), ("alpha", "channel: 'alpha' needs")):
        refused = client.post(f"{at}?channel={channel}", content=file_of(HOLE))
        assert refused.status_code == 400
        assert refused.json()["detail"].startswith(expected)
    shown = pixels_of(client.post(f"{at}?channel=inverse_alpha", content=rubbed_out()).content)
    np.testing.assert_array_equal(shown[..., 1] > 0, HOLE)
    empty = client.post(at, content=file_of(HOLE & False))
    assert empty.status_code == 400
    assert empty.json()["detail"] == "mask: no hole pixel; is the mask inverted?"


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
