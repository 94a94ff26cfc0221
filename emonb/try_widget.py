"""Room 09: choose a picture of one's own in the notebook and see what the models say.

A live kernel shows the controls; everywhere else (executed headless, an exported page, GitHub, a notebook opened
again) one sentence stands there instead. File names, labels and the VLM's words are data: they are escaped, and
a file that is no picture is one message.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
from PIL import Image

from emonb.errors import EmonbError
from emonb.figures import as_image
from emonb.files import visible
from emonb.lean import lean_figure
from emonb.model import EmoVLMKD
from emonb.opinions import Opinion, Teacher, find_teacher, opinions, opinions_figure, read_picture
from emonb.paper_values import dataset_title
from emonb.saliency import saliency_figure
from emonb.samples import open_picture, read_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from emonb.workspace import Workspace

__all__ = ["TryImage", "opinion_html", "try_image"]

SENTENCE = "Run this notebook to choose a picture of your own here."
# JupyterLab shows "Error displaying widget: model not found" where a widget's kernel is gone, and knows no
# fallback: so an output that holds no living widget is hidden, and the sentence shows only without one.
_STYLE = (
    ".jp-OutputArea:has(.emonb-try-note) .jp-OutputArea-output.lm-Panel:not(:has(.emonb-try)), "
    ".jp-OutputArea:has(.emonb-try) .emonb-try-note {display: none}"
)


def try_image(ws: Workspace, dataset: str = "") -> TryImage | None:
    """Controls to choose a picture, and the models' answer below them, as outputs of the cell.

    Under the runner (EMONB_HEADLESS=1), where nobody can choose, only one sentence is printed.

    Args:
        ws: the results folder with the models.
        dataset: whose model to ask first; default: the first one.

    Returns:
        The controls, for tests and for those who want to go on with them; None under the runner.
    """
    if os.environ.get("EMONB_HEADLESS") == "1":
        print(SENTENCE)
        return None
    from IPython.display import display

    controls = TryImage(ws, dataset)
    view = controls.box._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    note = f'<style>{_STYLE}</style><p class="emonb-try-note">{SENTENCE}</p>'
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": ""}, raw=True)
    display({"text/html": note, "text/plain": SENTENCE}, raw=True)
    return controls


class TryImage:
    """The controls: an upload button, the test pictures (one for each emotion), the datasets' models.

    Attributes:
        upload, sample, dataset, box: ipywidgets.
        answer: the ipywidgets.HTML below them.
    """

    def __init__(self, ws: Workspace, dataset: str = "") -> None:
        self._ws = ws
        self._loaded: tuple[str, EmoVLMKD, Teacher | None] | None = None
        self._last: tuple[Image.Image, str, str] | None = None  # picture, name, what people say
        names = list(ws.settings.datasets)
        wide = ipywidgets.Layout(width="max-content")
        self.upload = ipywidgets.FileUpload(
            accept=".jpg,.jpeg,.png,.webp",
            description="Your picture",
            tooltip="a JPEG, PNG or WebP file of at most 10 MB",
        )
        self.sample = ipywidgets.Dropdown(options=[("", "")], description="or a sample", layout=wide)
        self.dataset = ipywidgets.Dropdown(
            options=[(dataset_title(name), name) for name in names],
            value=dataset or names[0],
            description="model of",
            layout=wide,
        )
        self.answer = ipywidgets.HTML()
        self.box = ipywidgets.VBox([ipywidgets.HBox([self.upload, self.sample, self.dataset]), self.answer])
        self.box.children[0].layout.flex_flow = "row wrap"
        self.box.add_class("emonb-try")
        self._fill()
        self.upload.observe(self._uploaded, "value")
        self.sample.observe(self._sampled, "value")
        self.dataset.observe(self._changed, "value")

    def _fill(self) -> None:
        """One test picture of each emotion of the chosen dataset."""
        test = read_samples(self._ws.store.find("samples", self.dataset.value), "test")
        first = test.groupby("label", sort=False).head(1)
        self._truth = dict(zip(first["path"], first["label"], strict=True))
        options = [(f"{label}: {visible(Path(path).name)}", path) for path, label in self._truth.items()]
        self.sample.options = [("", ""), *options]

    def _uploaded(self, change: dict[str, Any]) -> None:
        if change["new"]:
            file = change["new"][0]
            self._tell(
                lambda: self._show(read_picture(bytes(file["content"]), visible(file["name"])), file["name"], "")
            )
            self.sample.value = ""

    def _sampled(self, change: dict[str, Any]) -> None:
        path = change["new"]
        if path:
            self._tell(lambda: self._show(open_picture(path), Path(path).name, self._truth[path]))
            self.upload.value = ()  # so that the same file can be chosen again

    def _changed(self, change: dict[str, Any]) -> None:
        self._fill()
        if self._last:
            self._tell(lambda: self._show(self._last[0], self._last[1], ""))

    def _show(self, picture: Image.Image, name: str, truth: str) -> None:
        self._last = (picture, name, truth)
        self.answer.value = f"<p>Looking at {escape(visible(name))} ...</p>"
        model, teacher = self._model()
        opinion = opinions(model, [picture], names=[name], teacher=teacher, texts=True)[0]
        self.answer.value = opinion_html(picture, opinion, truth)

    def _model(self) -> tuple[EmoVLMKD, Teacher | None]:
        """The chosen model; one at a time is kept, since the real ones are large."""
        if self._loaded is None or self._loaded[0] != self.dataset.value:
            self._loaded = None
            folder = self._ws.out / "models" / self.dataset.value
            model = EmoVLMKD.from_pretrained(folder)
            self._loaded = (self.dataset.value, model, find_teacher(folder, model.labels))
        return self._loaded[1:]

    def _tell(self, action: Callable[[], None]) -> None:
        """Do it, or say in the controls why not: a traceback in a callback would be lost, or shown in a log."""
        try:
            action()
        except EmonbError as error:
            self.answer.value = f"<p><b>{escape(visible(error))}</b></p>"
        except Exception as error:  # whatever a model or a decoder meets
            reason = escape(visible(f"{type(error).__name__}: {error}"))
            self.answer.value = f"<p><b>This picture could not be answered</b> ({reason}).</p>"


def opinion_html(picture: Image.Image, opinion: Opinion, truth: str = "") -> str:
    """An opinion as HTML, with its figures inside; every name and text is escaped.

    Args:
        picture: as people see it.
        opinion: with the VLM's words.
        truth: what people say, or "".
    """
    said = ", ".join(f"{m} says {a or 'nothing readable'}" for m, a in opinion.answers.items())
    shown = {name: escape(visible(text or "")) for name, text in (
        ("Key elements", opinion.key_elements), ("Reasons", opinion.reasons), ("Gate", opinion.lean.sentence),
    )}  # fmt: skip
    label = opinion.saliency.label
    return "".join(
        [
            f"<p><b>{escape(visible(opinion.image))}: {escape(opinion.emotion)}</b> ({opinion.confidence():.0%})</p>",
            _img(opinions_figure(picture, opinion, truth), said),
            *(f"<p><b>{name}.</b> {text}</p>" for name, text in shown.items()),
            _img(lean_figure(opinion.lean), opinion.lean.sentence),
            f"<p>Which parts of the picture spoke for {escape(label)} in the head (not in the VLM), and which "
            "against:</p>",
            _img(
                saliency_figure(picture, opinion.saliency),
                f"the head's visual tokens for and against {label}",
                photo=True,
            ),
        ]
    )


def _img(figure: Figure, alt: str, *, photo: bool = False) -> str:
    data = base64.b64encode(as_image(figure, alt, photo=photo).data).decode("ascii")
    kind = "jpeg" if photo else "png"
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}" style="max-width: 100%; display: block">'
