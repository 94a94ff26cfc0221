"""The assembled EmoVLM-KD: images and prompts in, emotion logits out (the article's sketch, made whole).

Tuned VLM, distilled head and gate in one torch module that is saved, loaded and asked like any other.
The ViT teacher is not part of it: after distillation it is no longer needed (paper).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emonb.data import parse_emotion, question
from emonb.distill import StudentHead
from emonb.errors import EmonbError
from emonb.files import file_digest, read_json, resource, write_json
from emonb.gate import make_gate, one_hot
from emonb.settings import VLMSettings
from emonb.tuning import save_adapter
from emonb.vlm import VLM, Picture, answer_distribution, generate, load_vlm, visual_tokens


class EmoVLMKD(nn.Module):
    """EmoVLM-KD (paper, method): a gate over the VLM's answer and the distilled head.

    Args:
        tuned: the instruction-tuned VLM with its processor.
        head: pooled visual tokens [B, D] -> logits [B, C].
        gating: one-hot answer [B, C] and head probabilities [B, C] -> logits [B, C].
        config: `labels`, `vlm` (how it is loaded), `hidden`, `gate`, `seed`: what `from_pretrained` needs.
    """

    def __init__(self, tuned: VLM, head: StudentHead, gating: nn.Module, config: dict[str, Any]):
        super().__init__()
        self.processor, self.max_side = tuned.processor, tuned.max_side
        self.vlm, self.head, self.gate = tuned.model, head, gating
        self.labels, self.config = list(config["labels"]), config
        self.head.to(tuned.device)
        self.gate.to(tuned.device)

    def seeing(self) -> VLM:
        """The tuned VLM in the form in which `emonb.vlm` takes it."""
        return VLM(self.vlm, self.processor, self.max_side)

    def forward(self, images: Sequence[Picture], *, generate: bool = False) -> Tensor:
        """[B, C] logits; see `parts` for the arguments."""
        return self.parts(images, generate=generate)["logits"]

    def parts(self, images: Sequence[Picture], *, generate: bool = False) -> dict:
        """What `forward` computes: `vlm` [B, C] one-hot answer, `vlm_p`, `head`, `logits`, `texts`, `visual` tokens.

        Args:
            images: paths or PIL images.
            generate: let the VLM write freely and parse its text, instead of scoring the C answers. An
                answer that cannot be parsed is all zeros, never a class; the texts are in `texts`.
        """
        tuned, texts = self.seeing(), [""] * len(images)
        visual = visual_tokens(tuned, images)
        if generate:
            texts = self._write(images, question(self.labels))
            vlm_p = answer = torch.stack([self.parse(text) for text in texts]).to(tuned.device)
        else:
            vlm_p = answer_distribution(tuned, visual, self.labels).softmax(-1)
            answer = one_hot(vlm_p, torch.ones(len(images), device=vlm_p.device))
        # the pooled feature is rounded as it is on disk, so that a stored and a fresh answer agree
        student = self.head(visual.pooled().half().float().to(tuned.device))
        logits = self.gate(answer, student.softmax(-1))
        return {"vlm": answer, "vlm_p": vlm_p, "head": student, "logits": logits, "texts": texts, "visual": visual}

    def say(self, images: Sequence[Picture], kind: str = "reasoning") -> list[str]:
        """The tuned VLM's own words about each picture: greedy, so the same picture gives the same text.

        Args:
            images: paths or PIL images.
            kind: `reasoning` (why, without naming the emotion) or `conversation` (key visual elements): the two
                kinds of triplets with free answers (paper: instruction tuning), asked by their first wording.
        """
        reasoning = resource("prompts.yaml", "reasoning", "instructions")
        conversation = resource("prompts.yaml", "conversation", "instructions")
        return self._write(images, {"reasoning": reasoning, "conversation": conversation}[kind][0])

    def _write(self, images: Sequence[Picture], instruction: str) -> list[str]:
        return generate(self.seeing(), images, instruction, self.config["vlm"]["max_new_tokens"])

    def parse(self, text: str) -> Tensor:
        """[C] one-hot of the label that a free answer names; zeros where it names none."""
        named = parse_emotion(text, self.labels)
        return torch.tensor([float(label == named) for label in self.labels])

    @torch.inference_mode()
    def predict(self, images: Sequence[Picture], *, batch_size: int = 16) -> pd.DataFrame:
        """Emotion and opinions for pictures: one row each.

        Columns: `image`, `emotion`, `p_<label>`..., `vlm` and `vlm_confidence` (the VLM's answer),
        `head` and `head_confidence`.
        """
        self.eval()
        rows = []
        for i in range(0, len(images), batch_size):
            batch = images[i : i + batch_size]
            out = self.parts(batch)
            p, student = (out[name].double().softmax(-1).cpu() for name in ("logits", "head"))
            for k, image in enumerate(batch):
                row = {"image": str(image) if not isinstance(image, Image.Image) else f"image {i + k}"}
                row["emotion"] = self.labels[int(p[k].argmax())]
                row |= {f"p_{label}": float(x) for label, x in zip(self.labels, p[k], strict=True)}
                for name, said in (("vlm", out["vlm_p"][k]), ("head", student[k])):
                    row |= {name: self.labels[int(said.argmax())], f"{name}_confidence": float(said.max())}
                rows.append(row)
        return pd.DataFrame(rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write LoRA adapter, head, gate and `config.json`; the base VLM is named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.seeing(), folder / "adapter")
        save_module(self.head, folder / "head.safetensors")
        save_module(self.gate, folder / "gate.safetensors")
        files = ["config.json", *(path.name for path in sorted(folder.glob("*.safetensors")))]  # also what it has seen
        files += [f"adapter/{path.name}" for path in sorted((folder / "adapter").iterdir())]
        digests = {file: _digest(folder, file, self.config) for file in files}
        write_json(folder / "config.json", {**self.config, "sha256": digests})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EmoVLMKD:
        """Load what `save_pretrained` wrote.

        Raises:
            EmonbError: not such a folder, a file of it is not what was saved, or the base VLM is not on this machine.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise EmonbError(
                f"{folder}: holds no EmoVLM-KD (config.json missing); give a folder such as models/<name>"
            )
        config, part = read_json(folder / "config.json"), "config.json"
        try:
            for part, digest in config.pop("sha256", {}).items():
                if digest != _digest(folder, part, config):
                    raise ValueError("its content is not what was saved")
            part = "config.json"
            options = VLMSettings.model_validate(config["vlm"]).loading
            part = "adapter"
            tuned = load_vlm(**options, adapter=folder / part)
            part = "head.safetensors"
            head = load_head(folder / part, config["hidden"], len(config["labels"]))
            part = "gate.safetensors"
            gating = load_gate(folder / part, config["gate"], len(config["labels"]))
            return cls(tuned, head, gating, config).eval()
        except EmonbError:
            raise
        except Exception as error:  # whatever torch, safetensors and peft raise for a file that is cut or another's
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise EmonbError(
                f"{folder / part}: damaged, or of another model ({why}); copy the folder again, or run notebook 06"
            ) from None


def _digest(folder: Path, file: str, config: dict[str, Any]) -> str:
    """sha256 of a file of a model's folder; of what `config.json` says."""
    if file == "config.json":
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return file_digest(folder / file)


def save_module(module: nn.Module, file: Path) -> None:
    """Write a head's, gate's or network's weights."""
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, file)


def load_head(file: Path, hidden: Sequence[int], classes: int) -> StudentHead:
    """A trained head."""
    state = load_file(file)
    head = StudentHead(len(state["mean"]), hidden, classes)
    head.load_state_dict(state)
    return head.eval()


def load_gate(file: Path, kind: str, classes: int) -> nn.Module:
    """A trained gate."""
    gating = make_gate(kind, classes)
    gating.load_state_dict(load_file(file))
    return gating.eval()
