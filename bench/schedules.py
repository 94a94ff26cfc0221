"""Distillation and gate under the authors' schedule and under ours: same stand-in, same images, same epochs.

    python bench/schedules.py --images 96

The authors' schedule is written out here from what is known of their code: in every epoch of the distillation the
vision tower sees each image again; in every epoch of the gate the VLM writes its answer to each image again, one
image at a time, sampling at temperature 0.8 up to 256 tokens. Where their code is not known it gets the cheaper
reading: batches of our size for the tower, one tower pass an image in a gate epoch (the head reads the tokens of the
pass that the answer is written from), no pass over val, pictures decoded once and kept. Ours is what the stages do:
the tower and a scored answer once for each image, then head and gate on cached tensors, one head, one gate, one seed.
Neither counts the teacher, whose logits both read. Epochs are the paper's.

Writes `schedules.json`: seconds per stage and in all, images a second, peak memory, the ratio; and for Qwen2-VL-7B on
FI the ratio that follows from the costs an image of a rehearsal (`docs/rehearsal`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from measure import DATASET, arguments, clock, save, small_run, tuned
from torch import Tensor, nn

from emonb.distill import StudentHead, distillation_loss, train_head
from emonb.emotions import parse_emotion
from emonb.fit import set_seed
from emonb.gate import make_gate, one_hot, train_gate
from emonb.progress import progress
from emonb.samples import read_samples, sample_labels
from emonb.settings import Settings, project_root
from emonb.triplets import categorical_instruction
from emonb.visual import picture_inputs
from emonb.vlm import VLM, answer_distribution, prompt_text, visual_tokens

TEMPERATURE, LONGEST = 0.8, 256  # authors' code
EPOCHS = {"distill": 5, "gate": 10}  # paper


def read_once(vlm: VLM, paths: list[str]) -> list[Any]:
    """Every picture decoded and cut into patches, kept in memory as the authors' code keeps them."""
    return [picture_inputs(vlm.processor, [path], vlm.max_side) for path in paths]


def authors_distillation(
    vlm: VLM, paths: list[str], teacher: Tensor, labels: Tensor, settings: Settings
) -> StudentHead:
    """One head; the vision tower runs for each image in each epoch."""
    config, classes = settings.distill, teacher.shape[1]
    set_seed(settings.seed)
    head = StudentHead(vlm.width, config.hidden, classes, config.dropout)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for _ in progress(range(config.epochs), "authors' distillation", unit="epoch"):
        order = torch.randperm(len(paths))
        for rows in order.split(settings.vlm.batch_size):
            batch = picture_inputs(vlm.processor, [paths[i] for i in rows], vlm.max_side)
            features = visual_tokens(vlm, batch).pooled()
            loss = distillation_loss(head(features), teacher[rows], labels[rows], alpha=config.alpha, tau=config.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


def authors_gate(
    vlm: VLM, head: StudentHead, paths: list[str], names: list[str], labels: Tensor, settings: Settings
) -> dict[str, float]:
    """One gate; the VLM samples an answer to each image in each epoch. Returns what was written."""
    config = settings.gate
    set_seed(settings.seed)
    gate = make_gate(config.kind, len(names))
    optimizer = torch.optim.Adam(gate.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    pictures, text = read_once(vlm, paths), prompt_text(vlm, categorical_instruction(names))
    tokenizer, tokens, lost = vlm.processor.tokenizer, 0, 0
    pad = vlm.processor.image_token
    merge = vlm.core.config.vision_config.spatial_merge_size**2
    for _ in progress(range(config.epochs), "authors' gate", unit="epoch"):
        for i in torch.randperm(len(paths)).tolist():
            picture = pictures[i]
            prompt = text.replace(pad, pad * (int(picture.grid.prod()) // merge))
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            types = (inputs["input_ids"] == vlm.image_token_id).int()
            with torch.inference_mode(), _KeptTower(vlm) as seen:
                written = vlm.model.generate(
                    **inputs, mm_token_type_ids=types, pixel_values=picture.pixel_values, image_grid_thw=picture.grid,
                    max_new_tokens=LONGEST, do_sample=True, temperature=TEMPERATURE,
                )  # fmt: skip
                student = head(seen[0].half().float().mean(0, keepdim=True)).softmax(-1)
            said = written[0, inputs["input_ids"].shape[1] :]
            tokens += len(said)
            named = parse_emotion(tokenizer.decode(said, skip_special_tokens=True), names)
            lost += named is None
            answer = torch.tensor([[float(name == named) for name in names]])
            loss = nn.functional.cross_entropy(gate(answer, student.clone()), labels[i : i + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    answers = config.epochs * len(paths)
    return {"answers": answers, "tokens_per_answer": tokens / answers, "unparsable_share": lost / answers}


class _KeptTower:
    """Merged tokens of the vision tower's passes in the block: what the head reads, at no second pass."""

    def __init__(self, vlm: VLM) -> None:
        self.tower, self.seen = vlm.core.visual, []

    def __enter__(self) -> list[Tensor]:
        self.hook = self.tower.register_forward_hook(lambda _m, _i, out: self.seen.append(out.pooler_output))
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def ours_one_pass(vlm: VLM, paths: list[str], names: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Each image once: pooled features (N, D) and scored answers (N, C)."""
    features, scores = [], []
    for i in range(0, len(paths), size):
        visual = visual_tokens(vlm, picture_inputs(vlm.processor, paths[i : i + size], vlm.max_side))
        features.append(visual.pooled().half())
        scores.append(answer_distribution(vlm, visual, names))
    return torch.cat(features), torch.cat(scores)


def measured(settings: Settings, vlm: VLM, paths: list[str], names: list[str], labels: Tensor) -> dict[str, Any]:
    """Both schedules on the same images, one after the other."""
    teacher = torch.randn(len(paths), len(names), generator=torch.Generator().manual_seed(0))  # no cost in either
    with clock() as distillation:
        head = authors_distillation(vlm, paths, teacher, labels, settings)
    with clock() as gating:
        written = authors_gate(vlm, head, paths, names, labels, settings)
    with clock() as once:
        features, scores = ours_one_pass(vlm, paths, names, settings.vlm.batch_size)
    rows = {"features": features.float(), "teacher": teacher, "labels": labels}
    with clock() as heads:
        mine, _ = train_head({"train": rows, "val": rows}, settings.distill.hidden, settings.distill.alpha,
                             len(names), settings.distill, settings.seed)  # fmt: skip
    with torch.inference_mode():
        student = mine(rows["features"]).softmax(-1)
    data = (one_hot(scores, torch.ones(len(paths))), student, labels)
    with clock() as gates:
        train_gate(settings.gate.kind, data, data, settings.gate, settings.seed)
    theirs = {"distillation": distillation, "gate": gating}
    ours = {"one pass": once, "distillation": heads, "gate": gates}
    seconds = {"authors": sum(s["seconds"] for s in theirs.values()), "ours": sum(s["seconds"] for s in ours.values())}
    return {
        "images": len(paths),
        "epochs": {"distillation": settings.distill.epochs, "gate": settings.gate.epochs},
        "seconds_authors": seconds["authors"],
        "seconds_ours": seconds["ours"],
        "ratio": seconds["authors"] / seconds["ours"],
        "images_per_second": {who: len(paths) / s for who, s in seconds.items()},
        "stages": {"authors": theirs, "ours": ours},
        "peak_memory_mb": {
            "authors": max(s["peak_memory_mb"] for s in theirs.values()),
            "ours": max(s["peak_memory_mb"] for s in ours.values()),
        },
        "authors_answers": written,
    }


def projected(report: Path) -> dict[str, Any]:
    """What a rehearsal's costs an image say of Qwen2-VL-7B on FI: authors' seconds over ours."""
    if not report.is_file():
        return {"missing": f"{report.name}: make it with python -m emonb rehearse --model 7b"}
    found = json.loads(report.read_text(encoding="utf-8"))
    fi = found["precisions"][found["precision"]]["datasets"]["fi"]
    ratios = {kept: {k: fi[kept][k] for k in ("ratio", "ratio_after_tuning")} for kept in ("cached", "recomputed")}
    return {"report": report.name, "model": found["model"], "machine": found["machine"], "fi": ratios}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=96, help="training images that both schedules see")
    options = parser.parse_args()
    start = time.monotonic()
    settings, store = small_run(options.out)
    settings = settings.model_copy(
        update={part: getattr(settings, part).model_copy(update={"epochs": n}) for part, n in EPOCHS.items()}
    )
    samples = store.find("samples", DATASET)
    train, names = read_samples(samples, "train", ["path", "label"]).head(options.images), sample_labels(samples)
    labels, paths = torch.tensor([names.index(x) for x in train["label"]]), train["path"].tolist()
    with tuned(settings, store) as vlm:
        ours_one_pass(vlm, paths[:8], names, 8)  # warm up: neither pays for the first call
        found = measured(settings, vlm, paths, names, labels)
    found["projected_7b"] = projected(project_root() / "docs" / "rehearsal" / "cpu-7b.json")
    save(options.out, "schedules", found, time.monotonic() - start)
    print(f"authors {found['seconds_authors']:.1f} s, ours {found['seconds_ours']:.2f} s: {found['ratio']:.0f} x")


if __name__ == "__main__":
    main()
