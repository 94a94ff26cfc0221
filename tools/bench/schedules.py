"""Distillation and gate under the authors' schedule and under ours: same stand-in, same images, same epochs.

    python -m tools.bench.schedules --images 96

The authors' schedule is written out here from what is known of their code: in every epoch of the distillation the
vision tower sees each image again; in every epoch of the gate the VLM writes its answer to each image again, one
image at a time, sampling at temperature 0.8 up to 256 tokens. Where their code is not known it gets the cheaper
reading: batches of our size for the tower, one tower pass an image in a gate epoch (for answer and head), no pass over
val, pictures decoded once for the gate and kept. Ours is what the stages do: the tower and a scored answer once for
each image, then head and gate on cached tensors, one head, one gate, one seed. Neither counts the teacher, whose
logits both read. Epochs are the paper's.

Writes `schedules.json`: seconds per stage and in all, images a second, peak memory, the ratio; and for Qwen2-VL-7B on
FI the ratio that follows from the seconds a picture of a rehearsal (`docs/rehearsal`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emonb.data import parse_emotion, question
from emonb.distill import Cached, StudentHead, distillation_loss, train_head
from emonb.files import read_json
from emonb.gate import Opinions, make_gate, one_hot, train_gate
from emonb.progress import progress
from emonb.settings import project_root
from emonb.vlm import VLM, answer_distribution, make_batch, patches, prompt_ids, visual_tokens
from tools.bench.common import DATASET, arguments, clock, save, small_run, tuned

SAMPLED = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.8}  # authors' code
EPOCHS = {"distillation": 5, "gate": 10}  # paper; also the defaults of train_head and train_gate


def authors_distillation(vlm: VLM, paths: list[str], teacher: Tensor, labels: Tensor, size: int) -> StudentHead:
    """One head; the vision tower runs for each image in each epoch."""
    head = StudentHead(vlm.width, (1024,), teacher.shape[1])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-5, weight_decay=1e-4)
    for _ in progress(range(EPOCHS["distillation"]), "authors' distillation", unit="epoch"):
        for rows in torch.randperm(len(paths)).split(size):
            features = visual_tokens(vlm, [paths[i] for i in rows]).pooled()
            distillation_loss(head(features), teacher[rows], labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return head.eval()


def authors_gate(vlm: VLM, head: StudentHead, paths: list[str], names: list[str], labels: Tensor) -> dict[str, float]:
    """One gate; the VLM samples an answer to each image in each epoch. Returns what was written."""
    gate = make_gate("concat", len(names))
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-4, weight_decay=1e-4)
    pictures, prompt = [patches(vlm, [path]) for path in paths], prompt_ids(vlm, question(names))
    tokens = lost = 0
    for _ in progress(range(EPOCHS["gate"]), "authors' gate", unit="epoch"):
        for i in torch.randperm(len(paths)).tolist():
            with torch.no_grad():
                visual = visual_tokens(vlm, (), pictures[i])
                batch = make_batch(vlm, [prompt], visual, pad_left=True)
                said = vlm.model.generate(**batch, **SAMPLED)[0, batch["input_ids"].shape[1] :]
                student = head(visual.pooled()).softmax(-1)
            named = parse_emotion(vlm.processor.tokenizer.decode(said, skip_special_tokens=True), names)
            answer = torch.tensor([[float(name == named) for name in names]])
            nn.functional.cross_entropy(gate(answer, student), labels[i : i + 1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens, lost = tokens + len(said), lost + (named is None)
    answers = EPOCHS["gate"] * len(paths)
    return {"answers": answers, "tokens_per_answer": tokens / answers, "unparsable_share": lost / answers}


def measured(vlm: VLM, paths: list[str], names: list[str], labels: Tensor, size: int) -> dict[str, Any]:
    """Both schedules on the same images, one after the other."""
    teacher = torch.randn(len(paths), len(names), generator=torch.Generator().manual_seed(0))  # no cost in either
    torch.manual_seed(0)
    with clock() as distillation:
        head = authors_distillation(vlm, paths, teacher, labels, size)
    with clock() as gating:
        written = authors_gate(vlm, head, paths, names, labels)
    with clock() as once:
        seen = [visual_tokens(vlm, paths[i : i + size]) for i in range(0, len(paths), size)]
        scores = torch.cat([answer_distribution(vlm, visual, names) for visual in seen])
        rows = Cached(torch.cat([visual.pooled().half() for visual in seen]), teacher, labels)
    with clock() as heads:
        mine, _ = train_head(rows, rows, epochs=EPOCHS["distillation"])
    with clock() as gates:
        student = mine(rows.features.float()).softmax(-1).detach()
        opinions = Opinions(one_hot(scores, torch.ones(len(paths))), student, labels)
        train_gate("concat", opinions, opinions, epochs=EPOCHS["gate"])
    stages = {"authors": {"distillation": distillation, "gate": gating}}
    stages["ours"] = {"one pass": once, "distillation": heads, "gate": gates}
    seconds = {who: sum(stage["seconds"] for stage in parts.values()) for who, parts in stages.items()}
    return {
        "images": len(paths),
        "epochs": EPOCHS,
        "seconds": seconds,
        "ratio": seconds["authors"] / seconds["ours"],
        "images_per_second": {who: len(paths) / s for who, s in seconds.items()},
        "stages": stages,
        "peak_memory_mb": {who: max(s["peak_memory_mb"] for s in parts.values()) for who, parts in stages.items()},
        "authors_answers": written,
    }


def projected(report: Path) -> dict[str, Any]:
    """Distillation and gate of Qwen2-VL-7B by a rehearsal's seconds a picture: authors' over ours, at least.

    The authors' answers are counted as scored ones; how long theirs are is not known.
    """
    found = read_json(report) if report.is_file() else {}
    if "steps" not in found:
        return {"missing": f"{report.name}: make it with python -m emonb rehearse --model 7b"}
    tower, answer = (found["steps"][name]["seconds"] for name in ("tower", "answer"))
    theirs = EPOCHS["distillation"] * tower + EPOCHS["gate"] * (tower + answer)
    return {"report": report.name, "model": found["model"], "cpu": found["cpu"], "ratio": theirs / (tower + answer)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=96, help="training images that both schedules see")
    options = parser.parse_args()
    run = small_run(options)
    train, names = run.samples(DATASET, "train").head(options.images), run.labels(DATASET)
    labels, paths = torch.tensor([names.index(x) for x in train["label"]]), train["path"].tolist()
    with tuned(run) as vlm:
        answer_distribution(vlm, visual_tokens(vlm, paths[:8]), names)  # warm up: neither pays for the first call
        found = measured(vlm, paths, names, labels, run.settings.vlm.batch_size)
    found["projected_7b"] = projected(project_root() / "docs" / "rehearsal" / "cpu-7b.json")
    save(options.out, "schedules", found)


if __name__ == "__main__":
    main()
