"""The assembled EmoVLM-KD: images and prompts in, emotion logits out (the article's sketch, made whole).

Tuned VLM, distilled head and gate in one torch module that is saved, loaded and asked like any other.
The ViT teacher is not part of it: after distillation it is no longer needed (paper).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emonb import distill, gate, vlm
from emonb.emotions import parse_emotion
from emonb.errors import EmonbError
from emonb.settings import Settings, VLMSettings
from emonb.store import Artifact, Store, read_json, write_json
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import adapted
from emonb.vlm import VLM

__all__ = ["EmoVLMKD", "model_stage"]

Picture = str | Path | Image.Image


class EmoVLMKD(nn.Module):
    """EmoVLM-KD (paper, method): a gate over the VLM's answer and the distilled head.

    Args:
        tuned: the instruction-tuned VLM with its processor.
        head: pooled visual tokens (B, D) -> logits (B, C).
        gating: one-hot answer (B, C) and head probabilities (B, C) -> logits (B, C).
        config: `labels`, `vlm` (its settings), `hidden`, `gate`, `seed`: what `from_pretrained` needs.
    """

    def __init__(self, tuned: VLM, head: distill.StudentHead, gating: nn.Module, config: dict[str, Any]):
        super().__init__()
        self.processor, self.max_side = tuned.processor, tuned.max_side
        self.vlm, self.head, self.gate = tuned.model, head, gating
        self.labels, self.config = list(config["labels"]), config
        self.head.to(tuned.device)
        self.gate.to(tuned.device)

    @property
    def merge_size(self) -> int:
        """Patches along a side of one merged visual token (2 in Qwen2-VL)."""
        return self.seeing().core.config.vision_config.spatial_merge_size

    def seeing(self) -> VLM:
        """The tuned VLM in the form in which `emonb.vlm` takes it."""
        return VLM(self.vlm, self.processor, self.max_side)

    def parts(self, images: Sequence[Picture], prompt: str | None = None, *, generate: bool = False) -> dict:
        """Everything that `forward` computes: `vlm` (B, C) one-hot answer, `vlm_p`, `head`, `logits`, `visual` tokens.

        Args:
            images: paths or PIL images.
            prompt: the question; default: the categorical one of the training.
            generate: let the VLM write freely and parse its text, instead of scoring the C answers. An
                answer that cannot be parsed is all zeros, never a class; the texts are in `texts`.
        """
        tuned = self.seeing()
        visual = vlm.visual_tokens(tuned, images)
        texts = [""] * len(images)
        if generate:
            length = self.config["vlm"]["max_new_tokens"]
            texts = vlm.generate(tuned, images, prompt or categorical_instruction(self.labels), length)
            vlm_p = torch.stack([self.parse(text) for text in texts]).to(tuned.device)
            answer = vlm_p
        else:
            vlm_p = vlm.answer_distribution(tuned, visual, self.labels, prompt).softmax(-1)
            answer = gate.one_hot(vlm_p, torch.ones(len(images), device=vlm_p.device))
        # the pooled feature is rounded as it is on disk, so that a stored and a fresh answer agree
        student = self.head(visual.pooled().half().float().to(tuned.device))
        logits = self.gate(answer, student.softmax(-1))
        return {"vlm": answer, "vlm_p": vlm_p, "head": student, "logits": logits, "texts": texts, "visual": visual}

    def forward(self, images: Sequence[Picture], prompt: str | None = None, *, generate: bool = False) -> Tensor:
        """(B, C) logits; see `parts` for the arguments."""
        return self.parts(images, prompt, generate=generate)["logits"]

    def say(self, images: Sequence[Picture], kind: str = "reasoning") -> list[str]:
        """The tuned VLM's own words about each picture: greedy, so the same picture gives the same text.

        Args:
            images: paths or PIL images.
            kind: `reasoning` (why, without naming the emotion) or `conversation` (key visual elements): the two
                kinds of triplets with free answers (paper: instruction tuning), asked by their first wording.
        """
        instruction = load_prompts()[kind]["instructions"][0]
        return vlm.generate(self.seeing(), images, instruction, self.config["vlm"]["max_new_tokens"])

    def parse(self, text: str) -> Tensor:
        """(C,) one-hot of the label that a free answer names; zeros where it names none."""
        named = parse_emotion(text, self.labels)
        return torch.tensor([float(label == named) for label in self.labels])

    @staticmethod
    def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Loss of stage 2; see `emonb.distill.distillation_loss`."""
        return distill.distillation_loss(student, teacher, labels, **options)

    @staticmethod
    def gate_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of stage 3: cross-entropy of (B, C) logits against (B,) label indices (paper)."""
        return nn.functional.cross_entropy(logits, labels)

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Picture], *, reasons: bool = False, generate: bool = False, batch_size: int = 16
    ) -> pd.DataFrame:
        """Emotion and opinions for pictures: one row each.

        Columns: `image`, `emotion`, `p_<label>`..., `vlm` and `vlm_confidence` (the VLM's answer),
        `head` and `head_confidence`, and with `reasons` the VLM's own explanation in `reason`.
        """
        self.eval()
        rows = []
        for i in range(0, len(images), batch_size):
            batch = images[i : i + batch_size]
            out = self.parts(batch, generate=generate)
            p, student = out["logits"].double().softmax(-1).cpu(), out["head"].double().softmax(-1).cpu()
            answer, unsure = out["vlm_p"].cpu(), out["vlm"].sum(-1).cpu() == 0
            texts = self.say(batch) if reasons else [""] * len(batch)
            for k, image in enumerate(batch):
                row = {"image": str(image) if not isinstance(image, Image.Image) else f"image {i + k}"}
                row["emotion"] = self.labels[int(p[k].argmax())]
                row |= {f"p_{label}": float(x) for label, x in zip(self.labels, p[k], strict=True)}
                row["vlm"] = "" if unsure[k] else self.labels[int(answer[k].argmax())]
                row["vlm_confidence"] = float(answer[k].max())
                row["head"], row["head_confidence"] = self.labels[int(student[k].argmax())], float(student[k].max())
                rows.append({**row, **({"reason": texts[k]} if reasons else {})})
        return pd.DataFrame(rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write LoRA adapter, head, gate and `config.json`; the base VLM is named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.vlm.save_pretrained(folder / "adapter", save_embedding_layers=False)  # they are frozen
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty template
        for name in ("head", "gate"):
            state = {k: v.detach().cpu().contiguous() for k, v in getattr(self, name).state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")
        write_json(folder / "config.json", self.config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EmoVLMKD:
        """Load what `save_pretrained` wrote.

        Raises:
            EmonbError: not such a folder, or the base VLM is not on this machine.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise EmonbError(
                f"{folder}: holds no EmoVLM-KD (config.json missing); give a folder such as models/<name>"
            )
        config = read_json(folder / "config.json")
        tuned = vlm.load_vlm(VLMSettings.model_validate(config["vlm"]), folder / "adapter")
        state = load_file(folder / "head.safetensors")
        head = distill.StudentHead(len(state["mean"]), config["hidden"], len(config["labels"]))
        head.load_state_dict(state)
        gating = gate.make_gate(config["gate"], len(config["labels"]))
        gating.load_state_dict(load_file(folder / "gate.safetensors"))
        return cls(tuned, head, gating, config).eval()


def model_stage(settings: Settings, store: Store, dataset: str, base: VLM) -> Artifact:
    """Assemble the model of the first seed (stage `model`) and copy it to `OUT/models/<dataset>`.

    Args:
        base: the VLM without adapter, already in memory.
    """
    adapter, head, gates = (store.find(s, dataset) for s in ("adapter", "head", "gate"))
    labels = read_json(head.path / "heads.json")["labels"]
    config = {
        "model_type": "emovlm-kd",
        "dataset": dataset,
        "labels": labels,
        "vlm": settings.vlm.model_dump(mode="json"),
        "hidden": list(settings.distill.hidden),
        "gate": settings.gate.kind,
        "seed": settings.seed,
    }

    def build(folder: Path) -> None:
        with adapted(base, adapter) as tuned:
            student = distill.load_head(head, "head", settings.seed)
            gating = gate.load_gate(gates, "emovlmkd", settings.seed)
            EmoVLMKD(tuned, student, gating, config).save_pretrained(folder)

    inputs = [adapter, head, gates]
    artifact = store.get("model", dataset, build, params=config, inputs=inputs, code=["emonb.model"])
    target = settings.out_path / "models" / dataset
    partial = target.with_name(f".{dataset}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(artifact.path, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return artifact
