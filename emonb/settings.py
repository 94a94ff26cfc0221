"""Settings: one validated tree, and profiles (`emonb/profiles/*.yaml`) that list only what differs.

Defaults are the paper's values where the paper or the authors' code states one (see the comments);
the small profiles override them because the stand-in is 5,000 times smaller than Qwen2-VL-7B.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, JsonValue, ValidationError, ValidationInfo, field_validator

from emonb.errors import EmonbError
from emonb.files import read_yaml, resource_path

DRAWN_SCENES = "drawn-scenes"  # the networks' weights shipped with emonb, as "stand-in" is the VLM's
SPLITS = ("train", "val", "test")  # of every dataset, in this order
Kind = Literal["categorical", "conversation", "reasoning"]  # of triplets (paper)
Gate = Literal["concat", "bilinear", "moe", "dynamic", "cross"]  # (paper, gate table)


def _each_once(value: tuple) -> tuple:
    if len({*value}) < len(value):
        raise ValueError("names one entry twice")
    return value


_Some = (Field(min_length=1), AfterValidator(_each_once))
_Path = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]  # not blank, and without what no system takes
_Above0 = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]  # of hidden layers
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


class _Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    pass


class WorldSettings(_Section):
    """Sizes of the drawn datasets: train, val, test images per taxonomy."""

    mikels8: tuple[int, int, int] = (1040, 200, 2400)
    ekman6: tuple[int, int, int] = (1040, 200, 2400)
    sentiment2: tuple[int, int, int] = (1040, 200, 2400)
    redraw: int = Field(0, ge=0)  # other test pictures of the same world, to see which verdicts hang on these


class VLMSettings(_Section):
    """Stage 1: the vision-language model and its LoRA tuning (paper: section on instruction tuning)."""

    base: _Path = "Qwen/Qwen2-VL-7B-Instruct"  # paper; "stand-in" is the checkpoint shipped with emonb
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"  # authors' code; auto: `fast_dtype()`; ours
    quantize_4bit: bool = True  # authors' code: NF4, double quantisation
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"  # auto: FlashAttention 2 or sdpa; ours
    max_side: int = Field(1024, ge=28)  # authors' code: images shrunk to 1024 px on the long side
    processor: dict[str, JsonValue] = {}  # what differs from the model's own image processor, by its names; ours
    cache_visual_tokens: bool = False  # token-level features of all images: 10 MB an image for 7B
    batch_size: int = Field(8, ge=1)  # passes without gradient; ours
    lora_r: int = Field(8, ge=1)  # paper
    lora_alpha: int = Field(8, ge=1)  # paper
    lora_dropout: float = Field(0.05, ge=0, lt=1)  # paper
    lora_targets: Annotated[tuple[_Path, ...], *_Some] = ("q_proj", "k_proj", "v_proj", "o_proj")  # authors' code
    epochs: float = Field(5, gt=0)  # authors' code
    lr: float = Field(1e-4, gt=0)  # authors' code
    lr_schedule: Literal["constant", "constant_with_warmup", "cosine"] = "constant"  # authors' code
    warmup_ratio: float = Field(0.03, ge=0, lt=1)  # authors' code, where `constant` makes no use of it
    max_grad_norm: float = Field(0.3, gt=0)  # authors' code
    train_batch_size: int = Field(1, ge=1)  # authors' code
    gradient_accumulation: int = Field(1, ge=1)  # authors' code
    loss: Literal["response", "all"] = "response"  # ours: the authors' code learns the prompt, too ("all")
    gradient_checkpointing: bool = True  # authors' code
    triplet_kinds: Annotated[tuple[Kind, ...], *_Some] = ("categorical", "conversation", "reasoning")  # paper
    reasons: int = Field(64, ge=0)  # test images for which the VLM's reasons are generated; ours
    max_new_tokens: int = Field(256, ge=1)  # authors' code

    @field_validator("dtype")
    @classmethod
    def _decided(cls, value: str) -> str:
        """Keys, models and `run.json` say what was computed in, not that it was left open."""
        return fast_dtype() if value == "auto" else value

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `vlm.load_vlm`."""
        names = {"base", "dtype", "quantize_4bit", "attention", "max_side"}
        return self.model_dump(include=names | ({"processor"} if self.processor else set()))

    @property
    def lora(self) -> dict[str, Any]:
        """Arguments of `tuning.add_lora`."""
        return {name: getattr(self, f"lora_{name}") for name in ("r", "alpha", "dropout", "targets")}

    @property
    def tuning(self) -> dict[str, Any]:
        """Arguments of `tuning.tune`."""
        same = self.model_dump(include={"epochs", "lr", "warmup_ratio", "max_grad_norm", "gradient_checkpointing"})
        named = {"batch_size": self.train_batch_size, "accumulation": self.gradient_accumulation, "learn": self.loss}
        return {**same, **named, "schedule": self.lr_schedule}


class TripletSettings(_Section):
    """Stage 1a: who writes the triplets, and on what terms (paper: GPT-4; terms are ours)."""

    annotator: Literal["auto", "offline", "openai", "batch"] = "auto"  # auto: answers already paid for, else offline
    model: str = Field("gpt-4.1", min_length=1)  # any vision model that the server at OPENAI_BASE_URL knows
    max_side: int = Field(768, ge=28)  # pixels; detail "high" is scaled to 768 on the short side anyway
    detail: Literal["high", "low", "auto"] = "high"
    answer_format: Literal["auto", "schema", "sections", "questions"] = "auto"  # auto: the first that the server can
    max_output_tokens: int = Field(500, ge=16)
    temperature: float | None = Field(None, ge=0, le=2)  # None: the server's default
    retries: int = Field(2, ge=0)  # how often an image is asked again after an answer that fails a check
    transport_retries: int = Field(6, ge=0)  # after 408, 409, 429, 5xx, time-outs and cut connections
    timeout_s: float = Field(120, gt=0)
    concurrency: int = Field(8, ge=1, le=512)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    # USD for one dataset, earlier runs included; ours. The 1,040 pictures of a mini dataset cost at worst, asked three
    # times and answered at full length, 21 USD with gpt-4o, the dearest in the price file, and usually 2 to 6
    max_cost: float = Field(25.0, gt=0)
    price: tuple[float, float] | Literal["none"] | None = None  # USD per million tokens in, out; none: without a limit
    prices: _Path | None = None  # a file like emonb/resources/prices.yaml; None: that one
    min_words: int = Field(8, ge=1)  # of conversation and of reasoning
    max_words: int = Field(200, ge=1)
    near_duplicate: float = Field(0.8, gt=0, le=1)  # Jaccard similarity of three-word sequences
    mix: bool = False  # go on in a file that holds answers of another model or prompt
    batch_requests: int = Field(50_000, ge=1, le=50_000)  # a Batch API file: at most 50,000 requests, 200 MB
    batch_mb: float = Field(190, gt=0, le=200)
    batch_poll_s: float = Field(60, gt=0)

    @field_validator("price", mode="before")
    @classmethod
    def _two_prices(cls, value: Any) -> Any:
        if value in (None, "none"):
            return value
        with suppress(TypeError, ValueError):
            prices = tuple(map(float, value.split(",") if isinstance(value, str) else value))
            if len(prices) == 2 and all(0 <= price < math.inf for price in prices):
                return prices
        raise EmonbError(f"price: {value!r} is not IN,OUT, USD per million tokens in and out, such as --price 0.4,1.6")

    @field_validator("max_words")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min_words", 1):
            raise ValueError("must not be below min_words: every answer would fail")
        return value


class NetworkSettings(_Section):
    """One conventional vision model, built by timm."""

    name: str  # timm architecture
    pretrained: bool = False
    weights: _Path | None = None  # a local .safetensors or .pth file; "drawn-scenes": ours; None: timm's from the hub
    image_size: int = Field(384, ge=16)
    kwargs: dict[str, JsonValue] = {}
    epochs: int = Field(10, ge=1)  # authors' code
    lr: float = Field(3e-5, gt=0)  # authors' code
    weight_decay: float = Field(1e-5, ge=0)  # authors' code
    batch_size: int = Field(10, ge=1)  # authors' code
    optimizer: Literal["adam", "adamw"] = "adam"  # authors' code
    crop_scale: tuple[_Share, _Share] = (0.08, 1.0)  # torchvision's default for a random resized crop

    @property
    def building(self) -> dict[str, Any]:
        """Arguments of `teacher.build_network`, but for the number of classes."""
        return {**self.model_dump(include={"name", "image_size", "pretrained", "weights"}), **self.kwargs}

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `teacher.train_network`."""
        return self.model_dump(include={"epochs", "lr", "weight_decay", "batch_size", "optimizer"})

    @field_validator("crop_scale")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be the least and the greatest share of the picture, above 0")
        return value

    @field_validator("weights")
    @classmethod
    def _used(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("pretrained"):
            raise ValueError("is read only with `pretrained: true`")
        return value


class TeacherSettings(_Section):
    """Stage 2a: the ViT teacher and the other conventional baselines."""

    teacher: str = "vit"  # which of the networks is distilled
    networks: dict[str, NetworkSettings]

    @field_validator("networks")
    @classmethod
    def _named(cls, value: dict[str, NetworkSettings], info: ValidationInfo) -> dict[str, NetworkSettings]:
        """By its name the files of a network are called, beside those of our own models."""
        for name in ("vit", info.data.get("teacher", "vit")):
            if name not in value:
                raise ValueError(f"must contain {name!r}, the teacher of the paper or of this profile")
        for name in value:
            ours = re.match("(vlm|probe|head|gate|emovlmkd|average)(_|$)", name)
            if ours or not re.fullmatch(r"[a-zA-Z0-9]+([_.-][a-zA-Z0-9]+)*", name):
                raise ValueError(f"{name!r} is taken, or would break names of files; use letters and digits")
        return value


class DistillSettings(_Section):
    """Stage 2b: the student head (paper: section on knowledge distillation)."""

    hidden: _Widths = (1024,)  # paper
    depths: Annotated[tuple[_Widths, ...], *_Some] = tuple((1024, 512, 256, 128, 64)[:n] for n in range(1, 6))  # paper
    lengths: tuple[_Above0, ...] = (8,)  # of more trainings of the printed depths, 1: the authors' (`schedules`); ours
    alpha: float = Field(0.5, ge=0, le=1)  # paper
    alphas: tuple[_Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0.5: paper
    tau: float = Field(2.0, gt=0)  # paper
    target: Literal["label", "teacher"] = "label"  # paper and code: ground truth; article: teacher's argmax
    dropout: float = Field(0.1, ge=0, lt=1)  # authors' code
    standardize: bool = False  # the stand-in's features differ much in scale; Qwen2-VL's do not
    epochs: int = Field(5, ge=1)  # authors' code
    lr: float = Field(1e-5, gt=0)  # authors' code
    weight_decay: float = Field(1e-4, ge=0)  # authors' code
    batch_size: int = Field(1, ge=1)  # authors' code

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `distill.train_head` that all heads share."""
        names = {"tau", "target", "dropout", "standardize", "epochs", "lr", "weight_decay", "batch_size"}
        return self.model_dump(include=names)

    @property
    def schedules(self) -> dict[float, dict[str, Any]]:
        """Trainings of other lengths: multiple of the authors' -> arguments of `distill.train_head`. Ours.

        Held equal is learning rate x steps, how far Adam can take a weight: theirs is 1e-5 x 5 epochs x images, since
        each image is a step (0.8 on FI, 0.05 on 1,000 images). A step of b images is b times as long (linear scaling,
        Goyal et al. 2017), so the passes are equal, too. Shorter trainings take shorter steps, longer more epochs.
        """
        steps = 1e-5 * self.batch_size
        return {x: {"lr": steps * min(1, x), "epochs": round(5 * max(1, x))} for x in self.lengths}

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """Every head to train: model name -> hidden layers, alpha, and what else is its own. `head` is the paper's."""
        heads = {"head": {}} | {f"head_alpha{a:g}": {"alpha": a} for a in self.alphas if a != self.alpha}
        heads |= {f"head_depth{len(d)}": {"hidden": d} for d in self.depths if d != self.hidden}
        printed = [d for d in self.depths if len(d) in (1, 2, 5)]  # paper
        for x, schedule in self.schedules.items():
            heads |= {f"head_depth{len(d)}_x{x:g}": {"hidden": d, **schedule} for d in printed}
        return {name: {"hidden": self.hidden, "alpha": self.alpha, **own} for name, own in heads.items()}

    @field_validator("depths", "alphas", "lengths")
    @classmethod
    def _one_name_each(cls, value: tuple) -> tuple:
        """Files are called by a head's number of layers, and by alpha and length in six digits."""
        names = [str(len(x)) if isinstance(x, tuple) else f"{x:g}" for x in value]
        if len({*names}) < len(names):
            raise ValueError(f"files of two would have one name ({', '.join(names)}); leave one out")
        return value


class GateSettings(_Section):
    """Stage 3: the gate (paper: section on the gate)."""

    kinds: Annotated[tuple[Gate, ...], *_Some] = ("concat", "bilinear", "moe", "dynamic", "cross")  # paper
    kind: Literal["concat"] = "concat"  # paper; tables and claims call it so
    epochs: int = Field(10, ge=1)  # authors' code
    lr: float = Field(1e-4, gt=0)  # authors' code
    weight_decay: float = Field(1e-4, ge=0)  # authors' code
    batch_size: int = Field(1, ge=1)  # authors' code

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `gate.train_gate` that all gates share."""
        return self.model_dump(include={"epochs", "lr", "weight_decay", "batch_size"})


class ReportSettings(_Section):
    """Intervals of every table."""

    bootstrap: int = Field(2000, ge=100)  # resamples of the test images; ours
    confidence: float = Field(0.95, gt=0, lt=1)  # ours


class Settings(_Section):
    """Everything a run depends on.

    Each of `seeds` is a pipeline of its own: LoRA, ViT, heads and gates. Baselines that no claim needs have the first.
    """

    profile: str
    emotion6_labels: Literal["folder", "majority"] = "folder"  # authors' tree; majority: Emotion6 by its raters
    datasets: tuple[str, ...] = Field(min_length=1)
    images: _Path | None = None  # folder of datasets; None = the drawn world
    classes: dict[str, tuple[str, ...]] = {}  # own taxonomies: dataset -> its classes in order
    remarks: dict[str, str] = {}  # dataset -> a sentence without which its numbers mislead; beside every table
    out: _Path
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    repeats: int = Field(3, ge=1)  # how often a pipeline trains the head, the head without teacher and the gate; ours
    side_by_side: bool = False  # on a CPU: several datasets at once, a thread each; ours
    world: WorldSettings = WorldSettings()
    triplets: TripletSettings = TripletSettings()
    vlm: VLMSettings = VLMSettings()
    teacher: TeacherSettings
    distill: DistillSettings = DistillSettings()
    gate: GateSettings = GateSettings()
    report: ReportSettings = ReportSettings()

    @field_validator("seeds", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        """Seeds as torch's CPU generator tells them apart: by 32 bits."""
        seeds = [str(seed).strip() for seed in (value if isinstance(value, list | tuple) else [value])]
        odd = [seed for seed in seeds if not re.fullmatch(r"[0-9]{1,10}", seed) or int(seed) >= 2**32]
        odd = odd or [seed for i, seed in enumerate(seeds) if int(seed) in map(int, seeds[:i])]
        if odd or not seeds:
            said, most = ", ".join(odd) or "none", 2**32 - 1
            raise EmonbError(f"seeds: {said}; give whole numbers from 0 to {most}, each once, such as 0,1,2")
        return [int(seed) for seed in seeds]

    @field_validator("datasets")
    @classmethod
    def _named(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """By its name every file and table says which labels a dataset has."""
        by = {"emotion6": "emotion6-majority"} if info.data.get("emotion6_labels") == "majority" else {}
        names = _each_once(tuple(by.get(name, name) for name in value))
        for name in names:
            check_dataset_name(name)
        return names

    @property
    def gates(self) -> dict[str, dict[str, str]]:
        """Every gate to train: model name -> its kind, its inputs, the head that it reads, what it learns from.

        `emovlmkd` is the paper's. Inputs: `probabilities` (paper), `logits` (authors' code) or `soft` (the VLM's whole
        distribution). One for each deeper head (paper, depth table). Learns from `train` (paper) or, ours, from
        answers about pictures that the head has not seen: `val`, or `oof`, train out of fold.
        """
        kind, distill = self.gate.kind, self.distill
        gates = {"emovlmkd": {}} | {f"gate_{k}": {"kind": k} for k in self.gate.kinds if k != kind}
        gates |= {f"gate_{kind}_{inputs}": {"inputs": inputs} for inputs in ("logits", "soft")}
        gates |= {f"gate_{kind}_{of}": {"learns_from": of} for of in ("val", "oof")}
        others = [f"depth{len(hidden)}" for hidden in distill.depths if hidden != distill.hidden]
        gates |= {f"gate_{depth}": {"head": f"head_{depth}"} for depth in others}
        paper = {"kind": kind, "inputs": "probabilities", "head": "head", "learns_from": "train"}
        return {name: paper | own for name, own in gates.items()}

    @property
    def caveats(self) -> list[str]:
        """The remarks on this run's datasets."""
        return [f"{name}: {self.remarks[name]}" for name in self.datasets if name in self.remarks]

    @property
    def seed(self) -> int:
        """The seed of the first pipeline, and of everything that is trained once."""
        return self.seeds[0]

    @property
    def out_path(self) -> Path:
        """Results folder."""
        return Path(os.path.realpath(from_root(self.out)))  # unlike Path.resolve() it goes on with a ring of links

    @property
    def images_path(self) -> Path | None:
        """Folder of datasets, or None for the drawn world."""
        return Path(os.path.realpath(from_root(self.images))) if self.images else None


def check_dataset_name(name: str) -> None:
    """Raise `ValueError` for a name that cannot be part of a file's name: results are `<dataset>__<model>.parquet`."""
    if (
        not name.isprintable()
        or len(name) > 80
        or name.casefold() == "all"
        or re.search(r"""[/\\:*?"<>|,;{}[\]#%$`]|__|--|^[\W_]|[-_. ]$""", name)
    ):
        raise ValueError(
            f"dataset {name!r} would break names of files, or means the mean over all: begin with a "
            'letter or digit, use no __ or -- and none of / \\ : * ? " < > | , ; { } [ ] # % $ `; '
            "rename its folder, or import it under another --name"
        )


def fast_dtype() -> str:
    """bfloat16 where this machine's GPU or processor has instructions for it (twice as fast), else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = getattr(torch.cpu, "get_capabilities", dict)()  # before torch 2.10 it does not tell
    return "bfloat16" if any(there for name, there in known.items() if name.endswith("bf16")) else "float32"


def checkpoint_of(base: str) -> str:
    """The one place that knows of the stand-in; else a folder (relative: to the project root), else a hub name."""
    if base == "stand-in":
        return str(resource_path("base"))
    folder = from_root(base)
    return str(folder) if folder.is_dir() else base


def weights_of(weights: str, name: str) -> Path:
    """The one place that knows of the networks shipped, a file each family (`vit`, ...); else a file, as in a base."""
    if weights == DRAWN_SCENES:
        return resource_path("networks", f"{re.match('[a-z]*', name)[0]}.safetensors")
    return from_root(weights)


def from_root(path: str) -> Path:
    """A path that settings name: relative to the project root, not to the notebook; `~` is the user's home."""
    return project_root() / os.path.expanduser(path)


def project_root() -> Path:
    """The checkout that holds the notebooks: the nearest parent with emonb's pyproject.toml, else here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        pyproject = folder / "pyproject.toml"
        if pyproject.is_file() and 'name = "emonb"' in pyproject.read_text("utf-8", "replace"):
            return folder
    return here


def load_settings(profile: str = "mini", **overrides: Any) -> Settings:
    """Load a profile by name or YAML path and override top-level fields.

    Args:
        profile: `smoke`, `mini`, `photos`, `paper`, `paper-2b`, or the path of a YAML file.
        overrides: top-level fields; None and "" mean "as the profile says"; `datasets` and `seeds`
            may be comma-separated text; a dict changes single fields of a section.

    Raises:
        EmonbError: unknown profile; or a key that is unknown, of the wrong type or impossible.
    """
    name, tree = _read_profile(profile)
    tree = {"profile": name, "out": f"build/{name}", **tree}
    for key, value in overrides.items():
        if key in ("datasets", "seeds") and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if value or value == 0:
            tree = _merged(tree, {key: os.fspath(value) if isinstance(value, os.PathLike) else value})
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        wrong = []
        for one in error.errors()[:3]:
            key, what = ".".join(map(str, one["loc"]))[:80], one["msg"].removeprefix("Value error, ")
            wrong.append(f"{key}: {what} (found {_SHORT.repr(one['input'])[:100]})")
        raise EmonbError(f"profile {profile}: invalid settings: {'; '.join(wrong)}") from None


def _read_profile(profile: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a profile, on top of those of the profile that its key `from` names."""
    shipped = {file.stem: file for file in Path(__file__).with_name("profiles").glob("*.yaml")}
    path, known = shipped.get(profile) or from_root(profile), ", ".join(sorted(shipped))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise EmonbError(f"unknown profile {profile!r}; use one of {known} or the path of a .yaml file")
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise EmonbError(f"profile {profile}: must be a mapping of settings, found {type(tree).__name__}")
    start = tree.pop("from", "")
    if start and not (isinstance(start, str) and start in shipped):
        raise EmonbError(f"profile {profile}: from: {_SHORT.repr(start)} is none of {known}")
    return Path(profile).stem, _merged(_read_profile(start)[1], tree) if start else tree


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings on top of others, section by section."""
    both = {key: isinstance(value, dict) and isinstance(below.get(key), dict) for key, value in above.items()}
    return below | {key: _merged(below[key], value) if both[key] else value for key, value in above.items()}
