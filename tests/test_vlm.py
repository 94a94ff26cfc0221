"""Room 03 on tiny random models of each Qwen-VL class: visual tokens, scored answers, LoRA; weights that are wrong."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, WIDTH, save_family
from pipeline import three_pictures
from safetensors.torch import load_file, save_file

from emonb import tuning
from emonb import vlm as room
from emonb.data import TAXONOMIES, answer_text, question
from emonb.errors import EmonbError
from emonb.files import resource

LABELS = ("fear", "fear and loss", "dark awe")  # several tokens each, and one begins another
LEVELS = {"qwen2_vl": 1, "qwen2_5_vl": 1, "qwen3_vl": 3}  # merged tokens, and two deepstack levels
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vlm(folders, family):
    return room.load_vlm(str(folders[family]))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return three_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def visual(vlm, pictures):
    return room.visual_tokens(vlm, pictures)


def official(vlm, path, text):
    """[T, V] log-probabilities and [T] ids of one picture and text, by the processor as its authors mean it."""
    inputs = vlm.processor(images=[room.shown(path, vlm.max_side)], text=[text], return_tensors="pt")
    with torch.no_grad():
        return vlm.model(**inputs).logits[0].log_softmax(-1), inputs["input_ids"][0].tolist()


def test_visual_tokens_are_the_models_own_image_features(vlm, family, pictures, visual):
    assert type(vlm.model).__name__ == f"{FAMILIES[family]}ForConditionalGeneration"
    pixels, grid = room.patches(vlm, pictures)
    with torch.no_grad():
        output = vlm.core.get_image_features(pixels, grid, return_dict=True)
    levels = [output.pooler_output, *(output.get("deepstack_features") or [])]
    assert len(levels) == LEVELS[family]
    assert len({len(t) for t in visual.tokens}) > 1, "all pictures have one size: padding is not tested"
    cut = room.visual_tokens(vlm, (), (pixels, grid))
    for i, tokens in enumerate(visual.tokens):
        assert torch.equal(tokens, torch.cat([level[i] for level in levels], 1).half())
        assert torch.equal(tokens, cut.tokens[i])
    mean = torch.stack([image.mean(0) for image in output.pooler_output])
    assert visual.pooled().shape == (3, WIDTH) == (3, vlm.width)
    assert torch.allclose(visual.pooled(), mean, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("labels", [LABELS, TAXONOMIES["mikels8"].labels], ids=["own", "mikels8"])
def test_scored_answers_equal_one_plain_forward_per_picture_and_label(vlm, pictures, visual, labels):
    """Batched, padded on the left, the last tokens on a KV cache, with stored tokens: against none of these."""
    prefix, tails = room.answer_tokens(vlm, labels)
    scores = room.answer_distribution(vlm, visual, labels)
    decode = vlm.processor.tokenizer.decode
    for i, path in enumerate(pictures):
        for c, tail in enumerate(tails):
            logp, ids = official(vlm, path, decode(prefix) + decode(tail))
            start = len(ids) - len(tail)
            assert ids[start:] == tail
            expected = sum(logp[start - 1 + k, token].item() for k, token in enumerate(tail))
            assert scores[i, c].item() == pytest.approx(expected, abs=3e-2)  # visual tokens are float16
    assert (scores[0] - scores[1]).abs().max() > 0.3, "the picture does not matter to this model: nothing is tested"
    alone = room.answer_distribution(vlm, room.visual_tokens(vlm, pictures[1:2]), labels)
    assert torch.allclose(scores[1], alone[0], atol=3e-2)


def test_candidates_are_distinct_and_begin_where_the_template_ends(vlm):
    for labels in (LABELS, *(taxonomy.labels for taxonomy in TAXONOMIES.values())):
        prefix, tails = room.answer_tokens(vlm, labels)
        prompt = room.prompt_text(vlm, question(labels))
        for label, tail in zip(labels, tails, strict=True):
            said = vlm.processor.tokenizer.decode([*prefix, *tail])
            assert said.startswith(prompt)
            assert (prompt + answer_text(label)).startswith(said)
        assert not any(a == b[: len(a)] for i, a in enumerate(tails) for j, b in enumerate(tails) if i != j)


def test_a_training_dialogue_is_what_the_template_makes_of_it(vlm):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": resource("prompts.yaml", "system")}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "{'emotion': 'awe'}"}]},
    ]
    whole, tokenizer = vlm.processor.apply_chat_template(messages, tokenize=False), vlm.processor.tokenizer
    ids, answer = room.prompt_ids(vlm, "What is it?"), room.answer_ids(vlm, "{'emotion': 'awe'}")
    assert [*ids, *answer] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert answer[-2] == tokenizer.eos_token_id
    assert ids.count(vlm.image_token_id) == 1


def test_generation_equals_greedy_steps_without_a_cache(vlm, pictures, visual):
    texts = room.generate(vlm, pictures, "Why?", 4)
    ids = [room.prompt_ids(vlm, "Why?")] * len(pictures)
    start = len(ids[0])
    with torch.no_grad():
        for _ in range(4):
            logits = vlm.model(**room.make_batch(vlm, ids, visual, pad_left=True)).logits[:, -1]
            ids = [[*row, int(token)] for row, token in zip(ids, logits.argmax(-1), strict=True)]
    assert texts == vlm.processor.tokenizer.batch_decode([row[start:] for row in ids], skip_special_tokens=True)


# ---- LoRA


@pytest.fixture(scope="module")
def lessons():
    kinds = [(question(LABELS), answer_text("dark awe")), ("Why?", "It moves."), ("Describe what you see.", "A hill.")]
    return [{"image_id": i, "instruction": q, "response": r} for i, (q, r) in enumerate(kinds)]


@pytest.fixture
def tuned(folders, family):
    torch.manual_seed(0)
    return tuning.add_lora(room.load_vlm(str(folders[family])), dropout=0, targets=("q_proj", "v_proj"))


def test_a_fresh_adapter_changes_no_answer_and_touches_the_language_models_attention_only(vlm, tuned, visual):
    trained = [name for name, p in tuned.model.named_parameters() if p.requires_grad]
    assert len(trained) == tuned.core.config.text_config.num_hidden_layers * 2 * 2
    assert all("language_model" in name and name.split(".")[-4] in ("q_proj", "v_proj") for name in trained)
    assert {p.shape[0] for name, p in tuned.model.named_parameters() if "lora_A" in name} == {8}
    before, after = (room.answer_distribution(v, visual, LABELS) for v in (vlm, tuned))
    assert torch.allclose(before, after, atol=1e-4)
    tuned.model.unload()
    assert not [name for name, _ in tuned.model.get_base_model().named_parameters() if "lora" in name]


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_an_adapted_layer_is_w_x_plus_alpha_over_r_b_a_x(folders, family):
    tuned = tuning.add_lora(room.load_vlm(str(folders[family])), r=4, alpha=6, dropout=0)
    layer = next(
        m for name, m in tuned.model.named_modules() if name.endswith("language_model.layers.1.self_attn.q_proj")
    )
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    w, bias, a, b = (
        np.asarray(t.detach(), dtype=np.float64)
        for t in (layer.weight, layer.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    x = np.random.default_rng(0).normal(size=(5, WIDTH))
    expected = x @ w.T + bias + 6 / 4 * (x @ a.T @ b.T)
    np.testing.assert_allclose(layer(torch.tensor(x, dtype=torch.float32)).detach(), expected, atol=1e-4)


def test_only_the_responses_tokens_are_learnt_each_with_the_same_weight(tuned, lessons, visual):
    prompts = [room.prompt_ids(tuned, row["instruction"]) for row in lessons]
    answers = [room.answer_ids(tuned, row["response"]) for row in lessons]
    batch, targets = tuning.training_batch(tuned, prompts, answers, visual)
    for row, answer, mask in zip(targets, answers, batch["attention_mask"], strict=True):
        assert row[row != tuning.IGNORE].tolist() == answer
        assert row[: int(mask.sum()) - len(answer)].eq(tuning.IGNORE).all()
    logits = tuned.model(**batch).logits
    learnt = np.argwhere(targets.numpy()[:, 1:] != tuning.IGNORE)
    p = np.asarray(logits.detach(), dtype=np.float64)
    p = p - p.max(-1, keepdims=True)
    logp = p - np.log(np.exp(p).sum(-1, keepdims=True))
    expected = -np.mean([logp[row, at, targets[row, at + 1]] for row, at in learnt])
    assert tuning.response_loss(logits, targets, len(learnt)).item() == pytest.approx(expected, rel=1e-5)


def test_a_step_in_parts_and_with_checkpointing_has_the_same_gradients(tuned, lessons, visual):
    def see(image_ids):
        return room.VisualTokens([visual.tokens[i] for i in image_ids], visual.grid[image_ids], visual.width)

    for p in tuned.model.parameters():  # B is zero at first, and with it the gradient of A
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    tuned.model.train()
    found = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        loss = tuning.step_gradients(tuned, lessons, see, parts)
        trained = [p for p in tuned.model.parameters() if p.requires_grad]
        found.append((loss, torch.cat([p.grad.flatten() for p in trained])))
        assert all(p.grad is None for p in tuned.model.parameters() if not p.requires_grad)
        tuned.model.zero_grad()
        tuned.model.enable_input_require_grads()
        tuned.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert found[0][1].abs().max() > 1e-3
    curve = tuning.tune(
        tuned, lessons, see, epochs=8, lr=2e-2, batch_size=1, accumulation=3, gradient_checkpointing=True
    )
    assert curve[-1]["value"] < curve[0]["value"] - 0.1


def test_every_epoch_has_a_new_order_and_a_rest_is_left_out():
    plan = tuning.plan_steps(10, 2.5, 4, seed=3)
    assert [len(step) for step in plan] == [4] * 5
    assert len({*plan[0], *plan[1]}) == 8
    assert plan[:2] != plan[2:4]
    assert plan == tuning.plan_steps(10, 2.5, 4, seed=3) != tuning.plan_steps(10, 2.5, 4, seed=4)


# ---- weights that are missing, damaged or of another kind


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a sound checkpoint, to be damaged."""
    return shutil.copytree(folders["qwen2_vl"], tmp_path / "Qwen2-VL-2B-Instruct")


def refusal(base) -> str:
    """The message about a base that cannot be loaded, and that it comes at once."""
    start = time.monotonic()
    with pytest.raises(EmonbError) as caught:
        room.load_vlm(str(base))
    assert time.monotonic() - start < 5
    return str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "nobody/nothing"])
def test_a_model_that_is_not_here_comes_with_the_command_that_fetches_it(name):
    text, into = refusal(name), f"models/{name.split('/')[1]}"
    assert text.startswith(f"setting vlm.base: {name!r} cannot be loaded")
    assert f"`hf download {name} --local-dir {into}`" in text
    assert f"`vlm: {{base: {into}}}`" in text
    assert "\n" not in text


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def llava(folder):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"vision_config": transformers.CLIPVisionConfig(**small)}
    parts["text_config"] = transformers.LlamaConfig(**small, vocab_size=99)
    transformers.LlavaConfig(**parts).save_pretrained(folder)


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text("{"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut short": cut_short,
    "a shard is lost": lose_a_shard,
    "a tensor is lost": lose_a_tensor,
    "another model": lambda folder: transformers.Qwen2Config().save_pretrained(folder),
    "another vision-language model": llava,
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_wrong_checkpoint_is_one_message_with_its_remedy(folder, damage):
    DAMAGE[damage](folder)
    text = refusal(folder)
    print(text)
    assert text.startswith(f"setting vlm.base: {str(folder)!r} ")
    assert "\n" not in text
    remedy = "choose a Qwen2-VL, Qwen2.5-VL or Qwen3-VL" if damage == "no chat template" else "hf download Qwen/"
    assert remedy in text


CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "installed", "wanted"),
    [
        ("auto", "bfloat16", CUDA, True, "flash_attention_2"),
        ("auto", "bfloat16", CUDA, False, "sdpa"),
        ("auto", "float32", CUDA, True, "sdpa"),
        ("auto", "bfloat16", CPU, True, "sdpa"),
        ("eager", "bfloat16", CUDA, True, "eager"),
        ("flash_attention_2", "bfloat16", CPU, True, "needs a CUDA device"),
        ("flash_attention_2", "float32", CUDA, True, "needs vlm.dtype bfloat16"),
        ("flash_attention_2", "float16", CUDA, False, "needs the package flash-attn"),
    ],
)
def test_attention_by_what_is_there(monkeypatch, asked, dtype, device, installed, wanted):
    monkeypatch.setattr(room, "is_flash_attn_2_available", lambda: installed)
    if "needs" in wanted:
        with pytest.raises(EmonbError, match=f"setting vlm.attention: .*{wanted}"):
            room.attention_code(asked, dtype, device)
    else:
        assert room.attention_code(asked, dtype, device) == wanted


def test_four_bits_ask_for_their_package(monkeypatch):
    monkeypatch.setattr(room, "get_device", lambda: CUDA)
    monkeypatch.setattr(room, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(EmonbError, match=r"setting vlm.quantize_4bit: .*pip install -e '\.\[gpu\]'"):
        room.load_vlm("stand-in", quantize_4bit=True)


def test_large_pictures_are_shrunk_and_the_callers_stays_as_it_is(pictures):
    picture = room.shown(pictures[1], 10_000)
    assert room.shown(picture, 48).size == (48, 24)
    assert picture.size == (192, 96)
