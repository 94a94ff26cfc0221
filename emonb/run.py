"""What a notebook opens: the settings of a run, its results, and one place to save tables, figures and predictions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd

from emonb import annotate, pipeline, predictions
from emonb.annotate.request import public_name
from emonb.data import read_samples, sample_labels, thumbnail
from emonb.errors import EmonbError, StoppedEarly
from emonb.files import atomic_write, claim_folder, make_folder, read_json
from emonb.machine import get_device, is_main, library_versions, process_count, side_by_side
from emonb.progress import progress
from emonb.settings import Settings, TripletSettings, load_settings
from emonb.store import STAGES, Artifact, Store
from emonb.tables import csv_text, latex_text, markdown_text
from emonb.triplets import source_note, triplet_lines

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from PIL.Image import Image

    from emonb.distill import Cached
    from emonb.gate import Opinions
    from emonb.vlm import VLM

Job = str | int  # a part of a job: dataset, network, seed
# Models of OUT/predictions whose file in the result of their stage has another name.
_PUBLISHED = {
    ("base_predictions", "predictions"): "vlm_zero_shot",
    ("vlm_predictions", "predictions"): "vlm_tuned",
    ("vlm_predictions", "generated"): "vlm_generated",
}


class Run:
    """The settings of a run, its store, and its results folder `out`."""

    def __init__(self, settings: Settings, *, force: Sequence[str] = (), keep: Sequence[str] = ()) -> None:
        self.settings, self.out = settings, claim_folder(settings.out_path)
        self.datasets, self.seeds = settings.datasets, settings.seeds
        self.store = Store(self.out / "artifacts", force=force, keep=keep)
        self.written: dict[str, str] = {}  # path -> its folder

    @property
    def vlm(self) -> VLM:
        """The base VLM, loaded once."""
        return pipeline.base_vlm(self)

    def describe(self) -> str:
        """Lines for the top of a notebook: datasets, seeds, who wrote the triplets, versions."""
        versions = ", ".join(f"{name} {v}" for name, v in list(library_versions().items())[:5])
        about = [f"datasets: {', '.join(self.datasets)}", f"seeds: {', '.join(map(str, self.seeds))}"]
        about += [source_note(self.out, self.datasets), *self.settings.caveats, versions]
        return "\n".join(filter(None, about))

    # ---- results of the stages

    def make(self, name: str) -> dict[Any, Artifact]:
        """The results of a stage: those in the store, and the missing ones made now, perhaps several at a time.

        Returns:
            Dataset -> result of the first seed; of the stage `teacher`, (dataset, network) -> result.
        """
        jobs, alone = self.jobs(name), process_count() == 1
        alone = alone and (name == "samples" or get_device().type == "cpu")  # drawing needs no torch
        if STAGES[name].side_by_side and self.settings.side_by_side and alone:
            missing = [job for job in jobs if not self.store.has(*self._order(name, job))]
            calls = [(self.settings, self.store, name, job) for job in missing]
            for _ in progress(side_by_side(_make_elsewhere, calls, name), name, total=len(calls)):
                pass
        made = {job: self.store.get(*self._order(name, job)) for job in jobs}
        if is_main():
            self._publish(name, made)
        found: dict[Any, Artifact] = {}
        for job, artifact in made.items():
            about = job[:-1] if STAGES[name].seeded else job
            found.setdefault(about if len(about) > 1 else about[0], artifact)
        return found

    def _publish(self, name: str, made: Mapping[tuple[Job, ...], Artifact]) -> None:
        """Copy what people read of a stage's results: predictions with all seeds in one file, models, triplets."""
        files: dict[tuple[str, str], list[Path]] = {}
        for (dataset, *more), artifact in made.items():
            for file in sorted(artifact.path.glob("*.parquet")) if name != "samples" else ():
                model = more[0] if name == "teacher" else _PUBLISHED.get((name, file.stem), file.stem)
                files.setdefault((dataset, model), []).append(file)
            for path in artifact.provenance["files"] if name == "model" else ():
                self._save(f"models/{dataset}/{path}", (artifact.path / path).read_bytes())
            if name == "triplets":
                annotate.show_offline(artifact.path / "triplets.jsonl", self.out / "triplets" / f"{dataset}.jsonl")
                self._note(f"triplets/{dataset}.jsonl")
        for (dataset, model), of_seeds in files.items():
            self.save_predictions(predictions.joined(of_seeds), dataset, model)

    def find(self, name: str, *job: Job) -> Artifact:
        """The result of a stage that an earlier notebook made; without a seed in the job that of the first."""
        first = [self.settings.seed] if STAGES[name].seeded and isinstance(job[-1], str) else []
        return self.store.find(name, _name_of(*job, *first))

    def jobs(self, name: str) -> list[tuple[Job, ...]]:
        """What a stage is done for: datasets, or datasets and networks, and the seeds of its trainings."""
        seeds, teacher = [self.seeds] if STAGES[name].seeded else [], self.settings.teacher
        if name != "teacher":
            return list(product(self.datasets, *seeds))
        trained = {n: self.seeds if n == teacher.teacher else self.seeds[:1] for n in teacher.networks}
        return [(dataset, n, seed) for dataset in self.datasets for n in trained for seed in trained[n]]

    def _order(self, name: str, job: Sequence[Job]) -> tuple:
        """What the store is asked for: the stage's recipe for a job, with the results of its seed that it needs."""
        seed, needs = job[-1:] if STAGES[name].seeded else (self.settings.seed,), {}
        for need in STAGES[name].needs:
            network = [self.settings.teacher.teacher] if need == "teacher" else []
            needs[need] = self.find(need, job[0], *network, *(seed if STAGES[need].seeded else ()))
        return name, _name_of(*job), STAGES[name].recipe(self, *job, **needs)

    def ask(self, terms: TripletSettings, images: int = 0, say: Callable[[str], Any] = print) -> None:
        """Ask a served model the question of our VLM about `images` test pictures of each dataset; 0: about all.

        Its answers become a prediction file, and so rows of the tables. Raises `StoppedEarly`, when all datasets have
        had their turn, for a limit on the cost or useless answers; `EmonbError` where nothing can be asked, or
        somebody else's predictions have that name.
        """
        model, stopped = re.sub(r"[^\w.+-]+", "-", public_name(terms.model)), []
        model = f"served-{model}" if predictions.is_ours(model) else model
        for dataset, artifact in self.make("samples").items():
            log = self.out / "asked" / f"{dataset}__{model}.jsonl"
            path = self.out / "predictions" / f"{dataset}__{model}.parquet"
            if path.is_file() and not log.is_file():
                raise EmonbError(f"{path}: somebody else's; move it away, or give the served model another name")
            about = read_samples(artifact.path, "test"), self.labels(dataset), log, terms
            frame, why = annotate.ask_emotions(*about, images=images, say=say)
            if len(frame):
                self.save_predictions(frame, dataset, model)
            stopped += [f"{dataset}: {why}"] * bool(why)
        if stopped:
            raise StoppedEarly(f"{'; '.join(stopped)}. Without --ask, the run goes on with the answers that came")

    # ---- what notebooks read

    def samples(self, dataset: str, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The sample table of a dataset, of all splits or of one, with absolute paths."""
        return read_samples(self.find("samples", dataset).path, split, columns)

    def drawn(self, split: str) -> dict[str, pd.DataFrame]:
        """Drawn dataset -> what its sample table knows of each image_id: evidence, off_mood, drawn_as, noisy, ..."""
        tables = {d: self.samples(d, split).set_index("image_id") for d in self.datasets}
        return {d: table for d, table in tables.items() if "drawn_as" in table}

    def labels(self, dataset: str) -> list[str]:
        """A dataset's emotions in their fixed order."""
        return sample_labels(self.find("samples", dataset).path)

    def chance(self, split: str) -> dict[str, float]:
        """Dataset -> percent of a split's most frequent emotion: what needs no knowledge."""
        labels = {d: self.samples(d, split, ["label"])["label"] for d in self.datasets}
        return {d: 100 * x.value_counts(normalize=True).max() for d, x in labels.items()}

    @property
    def example(self) -> pd.Series:
        """The picture that we follow through all notebooks: the first of test; of a drawn dataset the sixth trap.

        In a trap, not mislabelled, the content speaks for the label and the mood for another emotion. The sixth of
        mini-fi is the first whose answer tuning mended in a run, and of which the ViT then said something else.
        """
        table = self.samples(self.datasets[0], "test")
        traps = table[table["off_mood"] & ~table["noisy"]] if "noisy" in table else table[:1]
        return (table[:1] if traps.empty else traps[:6]).iloc[-1]

    @property
    def thumbnail(self) -> Image:
        """The picture that we follow, small."""
        return thumbnail(self.example["path"])

    def title(self, dataset: str) -> str:
        """A dataset as every table and figure names it."""
        return predictions.dataset_title(dataset)

    def triplets(self, dataset: str) -> list[dict[str, Any]]:
        """The triplets of a dataset's training pictures."""
        return list(triplet_lines(self.find("triplets", dataset).path / "triplets.jsonl"))

    def tokens(self, dataset: str, split: str) -> pipeline.Source:
        """Called with image ids: their visual tokens."""
        return pipeline.Source(self.vlm, self.find("features", dataset), self.find("samples", dataset), split)

    def tensors(self, dataset: str, split: str) -> Cached:
        """What a head learns from: features [N, D], teacher's logits [N, C], labels [N]."""
        teacher = self.find("teacher", dataset, self.settings.teacher.teacher)
        return pipeline.cached_tensors(self.find("samples", dataset), self.find("features", dataset), teacher)[split]

    def opinions(self, dataset: str, split: str, inputs: str = "probabilities") -> Opinions:
        """What a gate learns from (see `gate.gate_inputs`), of the first seed."""
        from safetensors.torch import load_file

        frame = predictions.first_seed(self.predictions(dataset, "vlm_tuned", split))
        head = self.find("head", dataset).path
        rows = pipeline.rows_of(head / "head.parquet", split, frame["image_id"])
        logits = load_file(head / "logits.safetensors")[f"head.{split}.repeat0"]
        return pipeline.opinions(frame, logits[rows], inputs)

    def histories(self, stage: str, what: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """(what, dataset's title) -> training curves of all seeds; of the stage `teacher`, `what` is the network."""
        found = {}
        for job in self.jobs(stage):
            if stage != "teacher" or job[1] == what:
                rows = read_json(self.find(stage, *job).path / "history.json")
                found.setdefault((what, self.title(job[0])), []).extend(row | {"seed": job[-1]} for row in rows)
        return found

    def distribution(self, dataset: str, model: str, image_id: str) -> dict[str, float]:
        """The answer of a model's first seed about one test picture: emotion -> probability."""
        frame = predictions.first_seed(self.predictions(dataset, model, "test")).set_index("image_id")
        return {name: float(frame.at[image_id, f"p_{name}"]) for name in predictions.prediction_labels(frame)}

    def predictions(self, dataset: str, model: str, split: str | None = None) -> pd.DataFrame:
        """Predictions that this or an earlier notebook saved, of all splits or of one."""
        path = f"predictions/{dataset}__{model}.parquet"
        self.store.note(file=path)
        return predictions.read_predictions(self.out / path, split=split)

    def all_predictions(self, split: str = "test") -> predictions.LoadedPredictions:
        """{(dataset, model): frame} of all prediction files; damaged ones are left out and said so in `problems`."""
        self.store.note(file="predictions")  # somebody else's file may come
        for path in (self.out / "predictions").glob("*.parquet"):
            self.store.note(file=f"predictions/{path.name}")
        return predictions.load_all(self.out / "predictions", self.datasets, split=split, partial=True)

    def asked(self) -> dict[tuple[str, str], dict[str, float]]:
        """(dataset, model) of the served models that were asked -> `usd`, `seconds` (`annotate.price_of_asking`)."""
        paths = {tuple(path.stem.split("__", 1)): path for path in sorted((self.out / "asked").glob("*__*.jsonl"))}
        for file in ("asked", *(f"asked/{path.name}" for path in paths.values())):
            self.store.note(file=file)
        return {key: annotate.price_of_asking(path) for key, path in paths.items() if key[0] in self.datasets}

    def table(self, id: str) -> pd.DataFrame | None:
        """A table that an earlier notebook saved, or None."""
        self.store.note(file=f"tables/{id}.csv")
        path = self.out / "tables" / f"{id}.csv"
        return pd.read_csv(path) if path.is_file() else None

    # ---- what notebooks write

    def save_table(self, frame: pd.DataFrame, id: str, caption: str = "") -> None:
        """Save `tables/<id>.csv` (full precision) and `.md`, `.tex` (rounded; caption: also `frame.attrs`)."""
        caption = caption or frame.attrs.get("caption", "")
        if self.settings.caveats:
            caption = " ".join([f"{caption.rstrip('.')}." if caption else "", *self.settings.caveats]).strip()
        self._save(f"tables/{id}.csv", csv_text(frame))
        self._save(f"tables/{id}.md", markdown_text(frame, caption))
        self._save(f"tables/{id}.tex", latex_text(frame, id, caption))

    def save_figure(self, fig: Figure, id: str) -> None:
        """Save `figures/<id>.png` and `.svg`; the same figure gives the same bytes."""
        from emonb.figures import as_files

        for ending, content in as_files(fig).items():
            self._save(f"figures/{id}.{ending}", content)

    def save_predictions(self, frame: pd.DataFrame, dataset: str, model: str) -> None:
        """Save `predictions/<dataset>__<model>.parquet`."""
        path = f"predictions/{dataset}__{model}.parquet"
        predictions.write_predictions(self.out / path, frame)
        self._note(path)

    def files_written(self) -> str:
        """One line: how many files this notebook wrote, by folder."""
        counted = ", ".join(f"{n} in {folder}/" for folder, n in Counter(self.written.values()).items())
        return f"{len(self.written)} files written: {counted or 'none'} (results folder {os.path.relpath(self.out)})"

    def _save(self, path: str, data: str | bytes) -> None:
        make_folder((self.out / path).parent)
        atomic_write(self.out / path, data)
        self._note(path)

    def _note(self, path: str) -> None:
        self.written[path] = path.split("/")[0]
        self.store.note(file=path)


def open_run(
    profile: str = "mini",
    datasets: str = "",
    out: str = "",
    *,
    images: str = "",
    seeds: str = "",
    force: str = "",
    keep: str = "",
) -> Run:
    """Open the results folder of a run; the arguments are the notebooks' parameters, "": as the profile says.

    Of the stages in `keep`, or $EMONB_KEEP, an older result is taken in spite of changed code. Raises `EmonbError` for
    invalid settings, an unknown stage in `force` or `keep`, or no write permission.
    """
    settings = load_settings(profile, datasets=datasets, images=images, out=out, seeds=seeds)
    keep = keep or os.environ.get("EMONB_KEEP", "")
    return Run(settings, force=parse_stages("force", force), keep=parse_stages("keep", keep))


def parse_stages(option: str, names: str) -> tuple[str, ...]:
    """Stages of a comma-separated list (`all` for every one); raises `EmonbError` for an unknown one."""
    chosen = tuple(part.strip() for part in names.split(",") if part.strip())
    unknown = [name for name in chosen if name not in (*STAGES, "all")]
    if unknown:
        raise EmonbError(f"{option}: unknown stage {', '.join(unknown)}; use one of: {', '.join(STAGES)}, all")
    return tuple(STAGES) if "all" in chosen else chosen


def _name_of(*job: Job) -> str:
    return "--".join(f"seed{part}" if isinstance(part, int) else part for part in job)


def _make_elsewhere(settings: Settings, store: Store, name: str, job: Sequence[Job]) -> None:
    """One result, in a process of its own."""
    run = Run(settings, force=store.force, keep=store.keep)
    run.store.get(*run._order(name, job))


def make_with_needs(run: Run, name: str, say: Callable[[str], Any] = print) -> None:
    """Make one stage for every dataset, and before it what it needs; `all`: every stage up to the gates.

    Under `accelerate launch` all processes call this; the first one tells of each result by `say`.
    """
    order = list(STAGES)
    if name not in (*order, "all"):
        raise EmonbError(f"stage {name!r}: unknown; use one of {', '.join(order)}, all")
    wanted = {*order[: order.index("gate") + 1]} if name == "all" else {name}
    for stage in reversed(STAGES.values()):
        wanted |= {*stage.needs} if stage.name in wanted else set()
    for stage in sorted(wanted, key=order.index):
        run.make(stage)
        for artifact in (run.find(stage, *job) for job in run.jobs(stage)):
            how = artifact.provenance
            if is_main():
                cost = f"{how['seconds']:.0f} s, {how['processes']} processes"
                say(f"{stage} of {artifact.name}: {cost}, {artifact.path}")


def check(example: object, properties: Mapping[str, Callable[[], Any]]) -> None:
    """Say whether an exercise is right, by properties of its function, or which of them fails first.

    `example` is any answer of the function; None: not written yet. An error of the function is a property that fails.
    """
    if example is None:
        print("not written yet")
        return
    for what, holds in properties.items():
        try:
            missing = "" if holds() else what
        except Exception as error:  # the student's: whatever it is, the notebook goes on
            missing = f"{what} ({type(error).__name__}: {error})"
        if missing:
            print(f"not yet: {missing}")
            return
    print("right")
