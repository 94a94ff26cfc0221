"""Room 09: choose a picture of one's own in the notebook and see what the models say.

What is shown is plain text and pictures: file names and the VLM's words are data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython.display import display

from emonb.data import open_picture
from emonb.errors import EmonbError
from emonb.figures import as_image
from emonb.files import visible
from emonb.show.opinions import Teacher, lean_figure, opinions, opinions_figure
from emonb.show.predict import as_text
from emonb.show.saliency import saliency_figure

if TYPE_CHECKING:
    import pandas as pd

    from emonb.model import EmoVLMKD

SENTENCE = "Run this notebook to choose a picture of your own here."


def try_image(model: EmoVLMKD, teacher: Teacher | None, samples: pd.DataFrame) -> ipywidgets.VBox | None:
    """Show controls to choose a picture (an upload button, a list of samples), and the answer below them.

    Args:
        model: the assembled model.
        teacher: the ViT, see `emonb.show.opinions.find_teacher`.
        samples: columns `path` and `label`; the first picture of each emotion is offered.

    Returns:
        The three of them. None under the runner (EMONB_HEADLESS=1), where nobody can choose: a sentence stands there.
    """
    if os.environ.get("EMONB_HEADLESS") == "1":
        print(SENTENCE)
        return None
    first = samples.groupby("label", sort=False).head(1)
    truth = dict(zip(first["path"], first["label"], strict=True))
    offered = [(f"{label}: {visible(Path(path).name)}", path) for path, label in truth.items()]
    upload = ipywidgets.FileUpload(accept=".jpg,.jpeg,.png,.webp", description="Your picture")
    sample = ipywidgets.Dropdown(options=[("", ""), *offered], description="or a sample")
    answer = ipywidgets.Output()

    def uploaded(change: dict[str, Any]) -> None:
        if change["new"]:
            sample.value = ""
            file = change["new"][0]
            answer.clear_output()
            with answer:
                show_answer(model, teacher, bytes(file["content"]), file["name"])

    def sampled(change: dict[str, Any]) -> None:
        path = change["new"]
        if path:
            upload.value = ()  # so that the same file can be chosen again
            answer.clear_output()
            with answer:
                show_answer(model, teacher, path, Path(path).name, truth[path])

    upload.observe(uploaded, "value")
    sample.observe(sampled, "value")
    box = ipywidgets.VBox([upload, sample, answer])
    display({**box._repr_mimebundle_(), "text/plain": SENTENCE}, raw=True)
    return box


def show_answer(model: EmoVLMKD, teacher: Teacher | None, source: str | bytes, name: str, truth: str = "") -> None:
    """Print and show what the models say about a file or its content, or in one line why there is no answer."""
    print(f"Looking at {visible(name)} ...")
    try:
        picture = open_picture(source, visible(name))
        said = opinions(model, [picture], [name], teacher=teacher, texts=True)[0]
    except EmonbError as error:
        print(visible(error))
        return
    except Exception as error:  # whatever a model meets: a traceback in a callback would be lost
        print(f"{visible(name)}: could not be answered ({visible(error)})")
        return
    print(as_text(said))
    display(as_image(opinions_figure(picture, said, truth), "the picture and each model's probabilities"))
    display(as_image(lean_figure(said.lean), said.lean.sentence))
    about = f"visual tokens for and against {said.saliency.label} in the head"
    display(as_image(saliency_figure(picture, said.saliency), about, photo=True))
