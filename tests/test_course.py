"""The course: goals, what one should have seen, exercises whose checks tell right from wrong, the syllabus."""

import io
import re
from collections import Counter
from contextlib import redirect_stdout

import nbformat
import pytest
import torch
from conftest import ROOT

from emonb.annotate.request import estimate_table
from emonb.data import parse_emotion
from emonb.distill import distillation_loss
from emonb.headless import NOTEBOOKS
from emonb.run import check
from emonb.settings import TripletSettings
from emonb.triplets import check_texts

# What a student may write first, as changes of the solution; the check must object to each.
WRONG = {
    "new_rule": [
        ("cheerful = rng.random() < 0.5", "cheerful = label == 'positive'"),
        ("alike = label == \"positive\"", "alike = rng.random() < 0.5"),
        ("if cheerful == alike", "if alike"),
    ],
    "same_picture": [
        ("np.abs(small[0] - small[1]).mean() < 10", "a.tobytes() == b.tobytes()"),
        ("np.abs(small[0] - small[1]).mean() < 10", "abs(small[0].mean() - small[1].mean()) < 10"),
    ],
    "says_nothing": [
        (", re.IGNORECASE", ""),
        ("s?\\b", "\\b"),
        (r"\b{re.escape(name)}s?\b", "{re.escape(name)}"),
        ("re.escape(name)", "name"),
        ("not any", "not all"),
    ],
    "expected_requests": [
        ("sum((1 - accepted) ** k for k in range(most))", "1 / max(accepted, 0.01)"),
        ("(1 - accepted) ** k", "accepted ** k"),
    ],
    "merged": [
        ("alpha / len(A)", "alpha / A.shape[1]"),
        ("return W + alpha / len(A) * B @ A", "return W.add_(alpha / len(A) * B @ A)"),
        ("return W +", "return 0 * W +"),
    ],
    "conversation_mask": [
        ('token if who == "assistant" else -100', "token"),
        ("-100", "-1"),
        ('if who == "assistant"', "if who == turns[-1][0] and tokens is turns[-1][1]"),
        ("for token in tokens]", "for token in tokens][1:]"),
    ],
    "smoothed_step": [
        ("    optimizer.zero_grad()\n", ""),
        ("    optimizer.step()\n", ""),
        ("loss.item()", "nn.functional.cross_entropy(net(images), targets, label_smoothing=smoothing).item()"),
    ],
    "mirrored": [
        (".flip(-1)", ".flip(-2)"),
        ("images.flip(-1)).softmax(-1)", "images.flip(-1))"),
    ],
    "tempered_kl": [
        ("tau**2", "tau"),
        (".sum(-1).mean()", ".mean()"),
        ("(log_p - log_q)", "(log_p.exp() / log_q.exp()).log()"),
    ],
    "smoothed_loss": [
        ("(1 - smoothing) * label", "label"),
        ("every = -log_p.mean()", "every = -log_p.sum(-1).mean()"),
        ("every = -log_p.mean()", "every = -log_p[:, 0].mean()"),
        ("return alpha * distilled + ", "return (1 - smoothing) * alpha * distilled + "),
        ("smoothing * every", "smoothing**2 * every"),
    ],
    "tempered": [
        (" / temperature", " * temperature"),
        ("(shares[..., None] * answers).sum(1)", "answers.mean(1)"),
    ],
    "best_weight": [
        (", key=lambda w: abs(w - 0.5)", ""),
        ("w * vlm + (1 - w) * head", "w * head + (1 - w) * vlm"),
        ("return max(", "return 0.5 * max("),
    ],
    "paired_interval": [
        ("gap[drawn]", "100 * (a[drawn] - b[np.random.default_rng(9).permutation(drawn)])"),
        ("[2.5, 97.5]", "[5, 95]"),
        ("gap = 100 * (a - b)", "gap = 100 * np.abs(a - b)"),
    ],
    "flip_p": [
        (">=", ">"),
        (".mean())", ".sum())"),
    ],
    "room_to_win": [
        ("100 * ", ""),
        ("(one_right | other_right).mean()", "(one_right ^ other_right).mean()"),
    ],
    "only_by_chance": [
        ("a, b = one[emotions == emotion], other[emotions == emotion]", "a, b = one, other"),
        ("rng.permutation(b)", "b"),
        ("~a &", "a &"),
        ("100 * ", ""),
    ],
    "where_agreed": [
        ("if answer == second", "if answer == second == label"),
        ("100 * len(agreed) / len(labels)", "len(agreed) / len(labels)"),
        ("if agreed else np.nan", "if agreed else 0.0"),
        ("if answer == second", ""),
    ],
    "occlusion": [
        (".copy()", ""),
        ("whole - score(covered)", "score(covered) - whole"),
        ("falls[row, column]", "falls[column, row]"),
        ("= picture.mean((0, 1))", "= 0"),
    ],
}  # fmt: skip


def cells(path: str) -> list:
    return nbformat.read(ROOT / path, as_version=4).cells


def tasks(path: str) -> list[tuple[str, str, str]]:
    """(what is asked, the function's cell, its check) of each exercise."""
    found = cells(path)
    at = [i for i, cell in enumerate(found) if "exercise" in cell.metadata.get("tags", [])]
    assert [found[i + 1].metadata["tags"] for i in at] == [["check"]] * len(at)
    return [(found[i - 1].source, found[i].source, found[i + 1].source) for i in at]


def said(known: dict, *sources: str) -> str:
    with redirect_stdout(io.StringIO()) as output:
        for source in sources:
            exec(source, known)
    return output.getvalue().strip()


def function_of(source: str) -> str:
    return re.findall(r"^def (\w+)", source, re.MULTILINE)[-1]


every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


@every_notebook
def test_it_says_what_one_can_do_afterwards(name):
    title = next(cell.source for cell in cells(f"notebooks/{name}.ipynb") if re.match(r"# \d", cell.source))
    goals = title.partition("\n\n**Afterwards you can**\n\n")[2].split("\n")
    assert len(goals) == 3
    assert all(re.fullmatch(r"- \w.*[;.]", goal) for goal in goals)


@every_notebook
def test_every_prompt_hides_what_one_should_have_seen(name):
    text = "\n\n".join(cell.source for cell in cells(f"notebooks/{name}.ipynb") if cell.cell_type == "markdown")
    prompts = re.split(r"^\*\*Try it\.\*\*", text, flags=re.MULTILINE)[1:]
    for prompt in prompts:
        fold = r".+?\n\n<details><summary>What you should have seen</summary>\n\n(.+?)\n\n</details>"
        hidden = re.match(fold, prompt, re.DOTALL)
        assert hidden, prompt[:60]
        assert re.fullmatch(r".+\n\n\*Noise:\* [a-z].+", hidden[1], re.DOTALL), hidden[1]


def test_what_the_folds_say_can_be_computed():
    """Where no luck is at work: the parser, the check of an answer, prices, KL by temperature."""
    said = ("A scene without fear.", "More awe than fear.", "Afraid? Not at all.")
    assert [parse_emotion(text, ("awe", "fear")) for text in said] == ["fear", None, "fear"]
    water = "Whoever looks at the dark water thinks of what {} in it."
    found = [check_texts(text, text, "fear") for text in map(water.format, ("is frightening", "fearless divers find"))]
    assert [why for why, _ in found] == ["names the emotion"] * 2
    high, low, small = (
        estimate_table(TripletSettings(model=model, detail=detail), [(96, 96)], 1, ("awe", "fear"), batch=False)
        for model, detail in (("gpt-4.1", "high"), ("gpt-4.1", "low"), ("gpt-4o-mini", "high"))
    )
    assert low["usd_low"][0] < high["usd_low"][0] < small["usd_low"][0], "input"
    assert low["usd_low"][1] == high["usd_low"][1] > small["usd_low"][1], "output"
    teachers, student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.5, 0.0]])
    parts = {}
    for tau in (2, 8):
        losses = (distillation_loss(student, t[None], torch.tensor([0]), alpha=1.0, tau=tau) for t in teachers)
        parts[tau] = [loss.item() for loss in losses]
    assert parts[8] == pytest.approx(parts[2], rel=0.1), "tau^2 makes up"
    assert all(a / 64 < b / 4 / 10 for a, b in zip(parts[8], parts[2], strict=True)), "KL falls steeply"
    assert parts[2][1] > parts[2][0], "a wrong teacher"


@every_notebook
def test_a_check_tells_right_from_wrong_and_from_nothing(name):
    """With the cells of the notebook and the functions of its solutions."""
    asked, solved = tasks(f"notebooks/{name}.ipynb"), tasks(f"notebooks/solutions/{name}.ipynb")
    assert 2 <= len(asked) <= 3
    assert [cell for *_, cell in asked] == [cell for *_, cell in solved]
    blank, known = {}, {}
    for number, ((task, empty, verify), (why, solution, _)) in enumerate(zip(asked, solved, strict=True), 1):
        function = function_of(solution)
        assert task.startswith(f"**Exercise {number}: ")
        assert len(why.split()) > 40
        assert empty == solution[: len(empty) - 8] + "\n    ...", "the solution begins otherwise"
        assert said(blank, empty, verify) == "not written yet"
        assert said(known, solution, verify) == "right"
        for old, new in WRONG[function]:
            assert solution.count(old) >= 1, f"{function}: {old}"
            verdict = said({**known}, solution.replace(old, new), verify)
            assert re.fullmatch(r"not yet: .+", verdict), f"{function} with {new!r}: {verdict}"


@every_notebook
def test_solutions_were_executed(name):
    code = [cell for cell in cells(f"notebooks/solutions/{name}.ipynb") if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = ["".join(output.get("text", "?") for output in cell.outputs) for cell in code]
    assert outputs == ["", "right\n"] * (len(code) // 2)


def test_what_raises_an_error_is_not_right(capsys):
    check(1, {"a list": lambda: [][0]})
    assert capsys.readouterr().out == "not yet: a list (IndexError: list index out of range)\n"


def test_the_syllabus_fits_the_notebooks():
    text, minutes = (ROOT / "docs" / "syllabus.md").read_text(encoding="utf-8"), Counter()
    for session, spent in re.findall(r"^\| (\d) \| .+ \| (\d+) \|$", text, re.MULTILINE):
        minutes[session] += int(spent)
    assert minutes == dict.fromkeys("1234", 90)
    for name in NOTEBOOKS:
        told = "\n".join(cell.source for cell in cells(f"notebooks/{name}.ipynb") if cell.cell_type == "markdown")
        (skipped,) = re.findall(rf"^- {name[:2]}: (.*)", text, re.MULTILINE)
        assert {*re.findall(r'"(.+?)"', skipped)} <= {*re.findall(r"^## (.+)", told, re.MULTILINE)}
        quiz = rf"^- \*\*{name[:2]}\.\d\*\* [^<]+\?\s<details><summary>answer</summary>[^<]+</details>$"
        assert len(re.findall(quiz, text.replace("\n  ", " "), re.MULTILINE)) == 2, name
        for number, title in re.findall(rf"\b{name[:2]}\b[^|\n]*?exercise (\d) \((.+?)\)", text):
            assert f"**Exercise {number}: {title}.**" in " ".join(told.split())


def test_words_in_doubt_lead_to_their_entry_of_the_glossary():
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    entries = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        linked = re.findall(r"docs/glossary\.md#([\w-]+)", path.read_text(encoding="utf-8"))
        assert len(linked) > 2, path.name
        assert not set(linked) - entries, path.name
