"""Nothing of other people's photographs, and no path of a machine, slips into a committed file."""

import base64
import io
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageChops

PHOTOGRAPHS = ROOT.parent / "shared" / "data"
NAMES = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]
INLINE = re.compile(r"""(?:data:image/\w+;base64,|"image/(?:png|jpeg)": ")([A-Za-z0-9+/=\\n]{400,})""")
CLOSE = 25  # of 240 bits; the most alike of the photographs differ in 36, and drawn pictures from all of them in 60


def picture_hash(picture: Image.Image) -> np.ndarray:
    """240 bits: whether a cell of 16 x 16 is brighter than its neighbour (dHash; Krawetz 2013)."""
    small = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=int)
    return (small[:, 1:] > small[:, :-1]).ravel()


def pictures_in(name: str) -> list[Image.Image]:
    """The picture that a file is, or those inside of a notebook or page; without margins."""
    content = (ROOT / name).read_bytes()
    if not name.endswith((".png", ".jpg", ".jpeg", ".gif", ".webp")):
        found = INLINE.findall(content.decode("utf-8", "replace"))
        contents = [base64.b64decode(text.replace("\\n", "")) for text in found]
    else:
        contents = [content]
    whole = [Image.open(io.BytesIO(data)).convert("RGB") for data in contents]
    boxes = [ImageChops.difference(p, Image.new("RGB", p.size, p.getpixel((0, 0)))).getbbox() for p in whole]
    return whole + [picture.crop(box) for picture, box in zip(whole, boxes, strict=True) if box]


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
    told = {name: min(map(nearest, pictures), default=240) for name in NAMES if (pictures := pictures_in(name))}
    assert len(told) > 8
    assert {name: bits for name, bits in told.items() if bits < CLOSE} == {}


def test_no_committed_file_names_a_place_on_somebodys_machine():
    """Tests may, where they play somebody."""
    place = re.compile(rb"/(?:home|Users|root|work|workspace)/[\w.-]+|\b[A-Z]:\\+Users")
    texts = {name: (ROOT / name).read_bytes() for name in NAMES if not name.startswith("tests/")}
    assert {name: found[0] for name, text in texts.items() if (found := place.findall(text))} == {}
