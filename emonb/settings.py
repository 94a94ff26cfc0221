"""Settings: one validated tree, and profiles (`emonb/profiles/*.yaml`) that list only what differs.

Defaults are the paper's values where the paper or the authors' code states one (see the comments);
the small profiles override them because the stand-in is 5,000 times smaller than Qwen2-VL-7B.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from emonb.errors import EmonbError

SPLITS = ("train", "val", "test")  # of every dataset, in this order
Kind = Literal["categorical", "conversation", "reasoning"]  # of triplets (paper)
Gate = Literal["concat", "bilinear", "moe", "dynamic", "cross"]  # (paper, gate table)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldSettings(_Section):
    """Sizes of the drawn datasets: train, val, test images per taxonomy."""

    mikels8: tuple[int, int, int] = (1040, 200, 600)
    ekman6: tuple[int, int, int] = (800, 160, 600)
    sentiment2: tuple[int, int, int] = (600, 120, 600)


class VLMSettings(_Section):
    """Stage 1: the vision-language model and its LoRA tuning (paper: section on instruction tuning)."""

    base: str = "Qwen/Qwen2-VL-7B-Instruct"  # paper; "stand-in" is the checkpoint shipped with emonb
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # authors' code
    quantize_4bit: bool = True  # authors' code: NF4, double quantisation
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"  # auto: FlashAttention 2 or sdpa; ours
    max_side: int = Field(1024, ge=28)  # authors' code: images shrunk to 1024 px on the long side
    cache_visual_tokens: bool = False  # token-level features of all images: 10 MB an image for 7B
    batch_size: int = Field(8, ge=1)  # passes without gradient; ours
    lora_r: int = Field(8, ge=1)  # paper
    lora_alpha: int = Field(8, ge=1)  # paper
    lora_dropout: float = Field(0.05, ge=0, lt=1)  # paper
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # authors' code
    epochs: float = Field(5, gt=0)  # authors' code
    lr: float = Field(1e-4, gt=0)  # authors' code
    lr_schedule: Literal["constant", "constant_with_warmup", "cosine"] = "constant"  # authors' code
    warmup_ratio: float = Field(0.03, ge=0, lt=1)  # authors' code, where `constant` makes no use of it
    max_grad_norm: float = Field(0.3, gt=0)  # authors' code
    train_batch_size: int = Field(1, ge=1)  # authors' code
    gradient_accumulation: int = Field(1, ge=1)  # authors' code
    loss: Literal["response", "all"] = "response"  # ours: the authors' code learns the prompt, too ("all")
    gradient_checkpointing: bool = True  # authors' code
    triplet_kinds: tuple[Kind, ...] = ("categorical", "conversation", "reasoning")  # paper
    reasons: int = Field(64, ge=0)  # test images for which the VLM's reasons are generated; ours
    max_new_tokens: int = Field(256, ge=1)  # authors' code

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `vlm.load_vlm`."""
        return self.model_dump(include={"base", "dtype", "quantize_4bit", "attention", "max_side"})

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
    max_cost: float | None = Field(None, gt=0)  # USD for one dataset, earlier runs included
    prices: str | None = None  # a file like emonb/resources/prices.yaml; None: that one
    min_words: int = Field(8, ge=1)  # of conversation and of reasoning
    max_words: int = Field(200, ge=1)
    near_duplicate: float = Field(0.8, gt=0, le=1)  # Jaccard similarity of three-word sequences
    mix: bool = False  # go on in a file that holds answers of another model or prompt
    batch_requests: int = Field(50_000, ge=1, le=50_000)  # a Batch API file: at most 50,000 requests, 200 MB
    batch_mb: float = Field(190, gt=0, le=200)
    batch_poll_s: float = Field(60, gt=0)

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
    weights: str | None = None  # a local .safetensors or .pth file; None: timm's own weights from the hub
    image_size: int = Field(384, ge=16)
    kwargs: dict[str, Any] = {}
    epochs: int = Field(10, ge=1)  # authors' code
    lr: float = Field(3e-5, gt=0)  # authors' code
    weight_decay: float = Field(1e-5, ge=0)  # authors' code
    batch_size: int = Field(10, ge=1)  # authors' code
    optimizer: Literal["adam", "adamw"] = "adam"  # authors' code
    crop_scale: tuple[float, float] = (0.08, 1.0)  # torchvision's default for a random resized crop

    @property
    def building(self) -> dict[str, Any]:
        """Arguments of `teacher.build_network`, but for the number of classes."""
        return {**self.model_dump(include={"name", "image_size", "pretrained", "weights"}), **self.kwargs}

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `teacher.train_network`."""
        return self.model_dump(include={"epochs", "lr", "weight_decay", "batch_size", "optimizer"})

    @field_validator("weights")
    @classmethod
    def _used(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("pretrained"):
            raise ValueError("is read only with `pretrained: true`")
        return value


class TeacherSettings(_Section):
    """Stage 2a: the ViT teacher and the other conventional baselines."""

    networks: dict[str, NetworkSettings] = {}
    teacher: str = "vit"  # which of them is distilled

    @field_validator("networks")
    @classmethod
    def _not_empty(cls, value: dict[str, NetworkSettings]) -> dict[str, NetworkSettings]:
        if "vit" not in value:
            raise ValueError("must contain 'vit', the paper's teacher")
        return value


class DistillSettings(_Section):
    """Stage 2b: the student head (paper: section on knowledge distillation)."""

    hidden: tuple[int, ...] = (1024,)  # paper
    depths: tuple[tuple[int, ...], ...] = tuple((1024, 512, 256, 128, 64)[:n] for n in range(1, 6))  # paper
    alpha: float = Field(0.5, ge=0, le=1)  # paper
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # paper, alpha figure
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
    def heads(self) -> dict[str, dict[str, Any]]:
        """Every head to train: model name -> its hidden layers and alpha. `head` is the paper's setting."""
        heads = {"head": (self.hidden, self.alpha)}
        heads |= {f"head_alpha{a:g}": (self.hidden, a) for a in self.alphas if a != self.alpha}
        heads |= {f"head_depth{len(d)}": (d, self.alpha) for d in self.depths if d != self.hidden}
        return {name: {"hidden": hidden, "alpha": alpha} for name, (hidden, alpha) in heads.items()}


class GateSettings(_Section):
    """Stage 3: the gate (paper: section on the gate)."""

    kinds: tuple[Gate, ...] = ("concat", "bilinear", "moe", "dynamic", "cross")  # paper
    kind: Gate = "concat"  # paper
    epochs: int = Field(10, ge=1)  # authors' code
    lr: float = Field(1e-4, gt=0)  # authors' code
    weight_decay: float = Field(1e-4, ge=0)  # authors' code
    batch_size: int = Field(1, ge=1)  # authors' code

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `gate.train_gate` that all gates share."""
        return self.model_dump(include={"epochs", "lr", "weight_decay", "batch_size"})

    @property
    def gates(self) -> dict[str, tuple[str, str]]:
        """Every gate to train: model name -> (kind, inputs). `emovlmkd` is the paper's.

        Inputs: `probabilities` (paper), `logits` (authors' code) or `soft` (the VLM's whole distribution).
        """
        gates = {"emovlmkd": (self.kind, "probabilities")}
        gates |= {f"gate_{k}": (k, "probabilities") for k in self.kinds if k != self.kind}
        return gates | {f"gate_{self.kind}_{i}": (self.kind, i) for i in ("logits", "soft")}


class ReportSettings(_Section):
    """Intervals of every table."""

    bootstrap: int = Field(2000, ge=100)  # resamples of the test images; ours
    confidence: float = Field(0.95, gt=0, lt=1)  # ours


class Settings(_Section):
    """Everything a run depends on. `seeds[0]` trains VLM and teachers; head and gates use all seeds."""

    profile: str
    emotion6_labels: Literal["folder", "majority"] = "folder"  # authors' tree; majority: Emotion6 by its raters
    datasets: tuple[str, ...] = Field(min_length=1)
    images: str | None = None  # folder of datasets; None = the drawn world
    out: str
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    side_by_side: bool = False  # on a CPU: several datasets at once, a thread each; ours
    world: WorldSettings = WorldSettings()
    triplets: TripletSettings = TripletSettings()
    vlm: VLMSettings = VLMSettings()
    teacher: TeacherSettings
    distill: DistillSettings = DistillSettings()
    gate: GateSettings = GateSettings()
    report: ReportSettings = ReportSettings()

    @field_validator("datasets")
    @classmethod
    def _emotion6(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """By its name every file and table says which labels a dataset has."""
        by = {"emotion6": "emotion6-majority"} if info.data.get("emotion6_labels") == "majority" else {}
        return tuple(by.get(name, name) for name in value)

    @field_validator("datasets", "seeds")
    @classmethod
    def _unique(cls, value: tuple) -> tuple:
        if len(set(value)) != len(value):
            raise ValueError("names one entry twice")
        return value

    @property
    def seed(self) -> int:
        """The seed of everything that is trained once."""
        return self.seeds[0]

    @property
    def out_path(self) -> Path:
        """Results folder; a relative one is relative to the project root, not to the notebook."""
        return (project_root() / self.out).resolve()

    @property
    def images_path(self) -> Path | None:
        """Folder of datasets, or None for the drawn world."""
        return (project_root() / self.images).resolve() if self.images else None


def checkpoint_of(base: str) -> str:
    """The one place that knows of the stand-in; else a folder (relative: to the project root), else a hub name."""
    if base == "stand-in":
        return str(resources.files("emonb").joinpath("resources", "base"))
    folder = project_root() / Path(base).expanduser()
    return str(folder) if folder.is_dir() else base


def project_root() -> Path:
    """The checkout that holds the notebooks: the nearest parent with emonb's pyproject.toml, else here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        pyproject = folder / "pyproject.toml"
        if pyproject.is_file() and 'name = "emonb"' in pyproject.read_text(encoding="utf-8"):
            return folder
    return here


def load_settings(profile: str = "mini", **overrides: Any) -> Settings:
    """Load a profile by name or YAML path and override top-level fields.

    Args:
        profile: `smoke`, `mini`, `paper`, `paper-2b`, or the path of a YAML file.
        overrides: top-level fields; None and "" mean "as the profile says"; `datasets` and `seeds`
            may be comma-separated text; a dict changes single fields of a section.

    Raises:
        EmonbError: unknown profile; or a key that is unknown, of the wrong type or impossible.
    """
    name, text = _read_profile(profile)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise EmonbError(f"profile {profile}: not valid YAML ({error}); correct the file") from None
    if not isinstance(tree, dict):
        raise EmonbError(f"profile {profile}: must be a mapping of settings, found {type(tree).__name__}")
    tree = {"profile": name, "out": f"build/{name}", **tree}
    for key, value in overrides.items():
        if key in ("datasets", "seeds") and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, dict) and isinstance(tree.get(key, {}), dict):
            value = {**tree.get(key, {}), **value}
        if value or value == 0:
            tree[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
        raise EmonbError(f"profile {profile}: invalid settings\n" + "\n".join(lines)) from None


def _read_profile(profile: str) -> tuple[str, str]:
    shipped = {f.name.removesuffix(".yaml"): f for f in resources.files("emonb").joinpath("profiles").iterdir()}
    path = shipped.get(profile, Path(profile))
    if profile in shipped or (Path(profile).suffix in (".yaml", ".yml") and path.is_file()):
        return Path(profile).stem, path.read_text(encoding="utf-8")
    raise EmonbError(
        f"unknown profile {profile!r}; use one of {', '.join(sorted(shipped))} or the path of a .yaml file"
    )
