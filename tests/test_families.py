"""Room 03 on tiny models of each Qwen-VL class: visual tokens, scored answers, LoRA, and the real chat templates."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, WIDTH, byte_level_tokenizer, processor_of, save_family, settings_of
from pipeline import COLORS, make_tree, run_stages, three_pictures, tiny_workspace

from emonb import emotions
from emonb import vlm as room
from emonb.emotions import TAXONOMIES, Taxonomy
from emonb.model import EmoVLMKD, model_stage
from emonb.parameters import count_vlm
from emonb.predictions import read_predictions
from emonb.samples import read_samples
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import add_lora

LABELS = ("fear", "fear and loss", "dark awe")  # several tokens each, and one begins another
LEVELS = {"qwen2_vl": 1, "qwen2_5_vl": 1, "qwen3_vl": 3}  # merged tokens, and two deepstack levels


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small are five times slower when threads share their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vlm(folders, family):
    return room.load_vlm(settings_of(folders[family]))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return three_pictures(tmp_path_factory.mktemp("pictures"))


def official(vlm, path, text):
    """Inputs of one picture and text, made by the processor as its authors mean it."""
    return vlm.processor(images=[room.shown(path, vlm.max_side)], text=[text], return_tensors="pt")


def test_loads_its_own_class(vlm, family):
    assert type(vlm.model).__name__ == f"{FAMILIES[family]}ForConditionalGeneration"
    assert type(vlm.processor).__name__ == f"{FAMILIES[family]}Processor"
    assert vlm.width == WIDTH


def test_its_parameters_are_counted_without_weights(vlm, folders, family):
    found = count_vlm(str(folders[family]))
    assert found["total"] == sum(p.numel() for p in vlm.model.parameters())
    assert found["features"] == WIDTH
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "v": (WIDTH, WIDTH // 2), "o": (WIDTH, WIDTH)}
    assert found["lora"] == 2 * 8 * sum(sum(shape) for shape in shapes.values())


def test_visual_tokens_are_the_models_own_image_features(vlm, family, pictures):
    inputs = room.picture_inputs(vlm.processor, pictures, vlm.max_side)
    with torch.no_grad():
        output = vlm.core.get_image_features(inputs.pixel_values, inputs.grid, return_dict=True)
    visual = room.visual_tokens(vlm, pictures)
    again = room.visual_tokens(vlm, inputs)
    levels = [output.pooler_output, *(output.get("deepstack_features") or [])]
    assert len(levels) == LEVELS[family]
    for i, tokens in enumerate(visual.tokens):
        assert tokens.dtype == torch.float16
        assert torch.equal(tokens, torch.cat([level[i] for level in levels], 1).half())
        assert torch.equal(tokens, again.tokens[i])
    assert torch.equal(visual.grid, inputs.grid)
    assert len({len(t) for t in visual.tokens}) > 1, "all pictures have one size: padding is not tested"
    mean = torch.stack([image.mean(0) for image in output.pooler_output])
    assert visual.pooled().shape == (3, WIDTH)
    assert torch.allclose(visual.pooled(), mean, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pad_left", [True, False])
def test_a_batch_equals_the_processors_path(vlm, pictures, pad_left):
    prompts = ["Describe what you see in this image.", "Why?", categorical_instruction(LABELS)]
    sequences = [room.dialogue_ids(vlm, prompt)[0] for prompt in prompts]
    inputs = room.picture_inputs(vlm.processor, pictures, vlm.max_side)
    with torch.no_grad():
        for visual, tolerance in ((inputs, 1e-4), (room.visual_tokens(vlm, inputs), 3e-2)):
            batch = room.make_batch(vlm, sequences, visual, pad_left=pad_left)
            got = vlm.model(**batch).logits
            for row, (path, prompt) in enumerate(zip(pictures, prompts, strict=True)):
                wanted = vlm.model(**official(vlm, path, room.prompt_text(vlm, prompt))).logits[0]
                real = batch["attention_mask"][row].bool()
                assert real.sum() == len(wanted)
                assert torch.allclose(got[row, real], wanted, atol=tolerance)  # visual tokens are float16


@pytest.mark.parametrize("labels", [LABELS, TAXONOMIES["mikels8"].labels], ids=["own", "mikels8"])
def test_scored_answers_equal_one_plain_forward_per_image_and_label(vlm, pictures, labels):
    prefix, tails = room.answer_tokens(vlm, labels)
    inputs = room.picture_inputs(vlm.processor, pictures, vlm.max_side)
    pixels = room.answer_distribution(vlm, inputs, labels)
    tokens = room.answer_distribution(vlm, room.visual_tokens(vlm, inputs), labels)
    text = vlm.processor.tokenizer.decode(prefix)
    for i, path in enumerate(pictures):
        for c, tail in enumerate(tails):
            whole = official(vlm, path, text + vlm.processor.tokenizer.decode(tail))
            assert whole["input_ids"][0, -len(tail) :].tolist() == tail
            with torch.no_grad():
                logits = vlm.model(**whole).logits[0].log_softmax(-1)
            start = len(logits) - len(tail)
            expected = sum(logits[start - 1 + k, token].item() for k, token in enumerate(tail))
            assert pixels[i, c].item() == pytest.approx(expected, abs=1e-3)
            assert tokens[i, c].item() == pytest.approx(expected, abs=3e-2)
    assert (pixels[0] - pixels[1]).abs().max() > 0.3, "the picture does not matter to this model: nothing is tested"


def test_generation_equals_greedy_steps_without_a_cache(vlm, pictures):
    instruction, steps = "Describe what you see in this image.", 4
    texts = room.generate(vlm, pictures, instruction, steps)
    tokenizer = vlm.processor.tokenizer
    inputs = room.picture_inputs(vlm.processor, pictures, vlm.max_side)
    ids = [room.dialogue_ids(vlm, instruction)[0]] * len(pictures)
    start = len(ids[0])
    with torch.no_grad():
        for _ in range(steps):
            logits = vlm.model(**room.make_batch(vlm, ids, inputs, pad_left=True)).logits[:, -1]
            ids = [[*row, int(token)] for row, token in zip(ids, logits.argmax(-1), strict=True)]
    assert texts == tokenizer.batch_decode([row[start:] for row in ids], skip_special_tokens=True)


def test_lora_trains_the_language_models_attention_and_nothing_else(folders, family, pictures):
    settings = settings_of(folders[family])
    base = room.load_vlm(settings)
    visual = room.visual_tokens(base, pictures)
    before = room.answer_distribution(base, visual, LABELS)
    tuned = add_lora(base, settings)
    trained = {n: p for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert len(trained) == tuned.core.config.text_config.num_hidden_layers * 4 * 2
    for name in trained:
        assert "language_model" in name
        assert name.split(".")[-4] in ("q_proj", "k_proj", "v_proj", "o_proj")
    assert torch.allclose(room.answer_distribution(tuned, visual, LABELS), before, atol=1e-4)
    prompt, answer = room.dialogue_ids(tuned, categorical_instruction(LABELS), "{'emotion': 'dark awe'}")
    batch = room.make_batch(tuned, [prompt + answer] * 3, visual, pad_left=False)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        labels[row, length - len(answer) : length] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2)
    losses, gradients = [], []
    for checkpointing in (False, True, True, True, True, True):
        if checkpointing:
            tuned.model.activation_checkpointing_enable({"use_reentrant": False})
        tuned.model.train()
        optimizer.zero_grad()
        loss = tuned.model(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in trained.items()})
        if checkpointing:  # the first two see the same weights
            optimizer.step()
    assert all(p.grad is None for p in tuned.model.parameters() if not p.requires_grad)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), f"{name}: checkpointing changes the gradient"
    assert sum(g.abs().sum() for n, g in gradients[0].items() if "lora_B" in n) > 0
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "tokens"])
def test_a_training_batch_survives_the_trainers_hands(vlm, pictures, pixels):
    """Trainer and accelerate take nested outputs apart and build them again on the device."""
    from accelerate.utils import send_to_device

    inputs = room.picture_inputs(vlm.processor, pictures, vlm.max_side)
    visual = inputs if pixels else room.visual_tokens(vlm, inputs)
    batch = room.make_batch(vlm, [room.dialogue_ids(vlm, "Why?")[0]] * 3, visual, pad_left=False)
    with torch.no_grad():
        assert torch.equal(vlm.model(**send_to_device(batch, "cpu")).logits, vlm.model(**batch).logits)


def test_the_real_template_puts_one_picture_between_system_and_question(vlm):
    system, end = load_prompts()["system"], "<|im_end|>\n"
    text = room.prompt_text(vlm, "What is it?")
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    user = f"<|im_start|>user\n{picture}What is it?{end}"
    assert text == f"<|im_start|>system\n{system}{end}{user}<|im_start|>assistant\n"
    ids, nothing = room.dialogue_ids(vlm, "What is it?")
    assert nothing == []
    assert ids.count(vlm.image_token_id) == 1
    assert vlm.processor.tokenizer.decode(ids) == text


def test_a_training_dialogue_is_what_the_template_makes_of_it(vlm):
    ids, answer = room.dialogue_ids(vlm, "What is it?", "{'emotion': 'awe'}")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": load_prompts()["system"]}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "{'emotion': 'awe'}"}]},
    ]
    whole = vlm.processor.apply_chat_template(messages, tokenize=False)
    tokenizer = vlm.processor.tokenizer
    assert [*ids, *answer] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert answer[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize("taxonomy", TAXONOMIES)
def test_answers_begin_where_the_template_ends(vlm, taxonomy):
    labels = TAXONOMIES[taxonomy].labels
    prefix, tails = room.answer_tokens(vlm, labels)
    decode = vlm.processor.tokenizer.decode
    prompt = room.prompt_text(vlm, categorical_instruction(labels))
    frame = load_prompts()["categorical"]["response"]
    for label, tail in zip(labels, tails, strict=True):
        assert (prompt + frame.format(label=label)).startswith(decode([*prefix, *tail]))
    assert len({tuple(t) for t in tails}) == len(labels)


def test_the_tokenizer_of_these_tests_splits_words_like_a_real_one():
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer.tokenize("contentment gloom")) > 2
    assert tokenizer.decode(tokenizer("Ünknown  wörds\n", add_special_tokens=False)["input_ids"]) == "Ünknown  wörds\n"


def test_picture_inputs_need_no_model_and_work_in_another_process(pictures):
    processor = processor_of("qwen2_5_vl")
    here = room.picture_inputs(processor, pictures, 64)

    def collate(rows):
        return room.picture_inputs(processor, rows, 64)

    loader = torch.utils.data.DataLoader([str(p) for p in pictures], 1, num_workers=1, collate_fn=collate)
    there = list(loader)
    assert len(here) == 3
    assert torch.equal(torch.cat([x.pixel_values for x in there]), here.pixel_values)
    assert torch.equal(torch.cat([x.grid for x in there]), here.grid)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], scope="function")
def test_all_stages_and_the_assembled_model(folders, family, tmp_path, monkeypatch):
    """Tokens through the cache on disk, checkpointed training, the adapter put back: a fresh picture agrees."""
    monkeypatch.setattr(emotions, "TAXONOMIES", {"own": Taxonomy("own", tuple(COLORS))})
    make_tree(tmp_path / "images" / "colours", {"train": 3, "val": 2, "test": 2})
    ws = tiny_workspace(tmp_path, folders[family], tmp_path / "images", "colours", gradient_checkpointing=True)
    made = run_stages(ws, "colours")
    model_stage(ws.settings, ws.store, "colours", room.load_vlm(ws.settings.vlm))
    test = read_samples(made["samples"], "test")
    got = EmoVLMKD.from_pretrained(ws.out / "models" / "colours").parts(test["path"].tolist())
    stored = read_predictions(made["vlm_predictions"].path / "predictions.parquet", tuple(COLORS))
    stored = stored.set_index("image_id").loc[test["image_id"], [f"p_{label}" for label in COLORS]]
    assert torch.allclose(got["vlm_p"].double(), torch.tensor(stored.to_numpy(float)), atol=1e-3)
    base = read_predictions(made["base_predictions"].path / "predictions.parquet", tuple(COLORS)).set_index("image_id")
    base = torch.tensor(base.loc[test["image_id"], [f"p_{label}" for label in COLORS]].to_numpy(float))
    assert (base - got["vlm_p"]).abs().max() > 1e-2, "the adapter changes nothing: it is not tested"
