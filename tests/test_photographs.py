"""Nothing of other people's photographs, and no path of a machine, slips into a committed file."""

import base64
import io
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from emonb.show.explorer import SIDE as TILE

PHOTOGRAPHS = ROOT.parent / "shared" / "data"
NAMES = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]
INLINE = re.compile(r"""(?:data:image/\w+;base64,|"image/(?:png|jpeg)": ")([A-Za-z0-9+/=\\n]{400,})""")
CLOSE = 25  # of 240 bits; the most alike of the photographs differ in 36, and drawn pictures from all of them in 60


def picture_hash(picture: Image.Image) -> np.ndarray:
    """240 bits: whether a cell of 16 x 16 is brighter than its neighbour (dHash; Krawetz 2013)."""
    small = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=int)
    return (small[:, 1:] > small[:, :-1]).ravel()


def pictures_in(name: str) -> list[Image.Image]:
    """The picture that a file is, or those inside of a notebook or page; and what each consists of."""
    content = (ROOT / name).read_bytes()
    if not name.endswith((".png", ".jpg", ".jpeg", ".gif", ".webp")):
        found = INLINE.findall(content.decode("utf-8", "replace"))
        contents = [base64.b64decode(text.replace("\\n", "")) for text in found]
    else:
        contents = [content]
    whole = [Image.open(io.BytesIO(data)).convert("RGB") for data in contents]
    return whole + [part for picture in whole for part in parts_of(picture)]


def parts_of(picture: Image.Image) -> list[Image.Image]:
    """What stands apart on a background, as a photograph in a figure does, and the tiles of a sheet of thumbnails."""
    pixels = np.asarray(picture, dtype=int)
    apart, _ = ndimage.label(np.abs(pixels - pixels[0, 0]).max(axis=2) > 12)
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(apart)]
    columns, rows = (picture.width // TILE, picture.height // TILE)
    if picture.width == columns * TILE and picture.height == rows * TILE:
        boxes += [(TILE * x, TILE * y, TILE * x + TILE, TILE * y + TILE) for y in range(rows) for x in range(columns)]
    parts = [picture.crop(box) for box in boxes if min(box[2] - box[0], box[3] - box[1]) >= 40]
    return [part for part in parts if 60 < picture_hash(part).sum() < 180]  # not the plain bars of a chart


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not beside the checkout")
def test_no_committed_picture_is_one_of_the_photographs():
    files = [f for f in sorted(PHOTOGRAPHS.rglob("*.jpg")) if f.parts[len(PHOTOGRAPHS.parts)] in ("emotion6", "oasis")]
    assert len(files) > 2000
    known = np.stack([picture_hash(Image.open(file)) for file in files])

    def nearest(picture: Image.Image) -> int:
        return int((known != picture_hash(picture)).sum(axis=1).min())

    photograph = Image.open(files[7])
    again = io.BytesIO()
    photograph.resize((96, 96)).save(again, "JPEG", quality=60)
    assert nearest(Image.open(again)) < CLOSE, "a thumbnail is found"
    figure, sheet = Image.new("RGB", (700, 300), "white"), Image.new("RGB", (3 * TILE, 2 * TILE))
    figure.paste(photograph.resize((120, 90)), (50, 60))
    figure.paste("red", (300, 60, 600, 80))
    for place, file in enumerate(files[:6]):
        sheet.paste(Image.open(file).resize((TILE, TILE)), (place % 3 * TILE, place // 3 * TILE))
    assert min(map(nearest, parts_of(figure))) < CLOSE > max(map(nearest, parts_of(sheet)[-6:])), "and a part"
    told = {name: min(map(nearest, pictures), default=240) for name in NAMES if (pictures := pictures_in(name))}
    assert len(told) > 8
    assert {name: bits for name, bits in told.items() if bits < CLOSE} == {}


def test_no_committed_file_names_a_place_on_somebodys_machine():
    """Tests may, where they play somebody."""
    place = re.compile(rb"/(?:home|Users|root|work|workspace)/[\w.-]+|\b[A-Z]:\\+Users")
    texts = {name: (ROOT / name).read_bytes() for name in NAMES if not name.startswith("tests/")}
    assert {name: found[0] for name, text in texts.items() if (found := place.findall(text))} == {}
