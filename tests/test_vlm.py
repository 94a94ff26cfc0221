"""Room 03 on tiny random models of each VLM class: visual tokens, scored answers, LoRA; weights that are wrong."""

import json
import shutil
import time
from contextlib import contextmanager
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from families import FAMILIES, WIDTH, save_family
from PIL import Image
from pipeline import DATASET, make_tree, paint, tiny_profile
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from emonb import tuning
from emonb import vlm as room
from emonb.data import TAXONOMIES, answer_text, question
from emonb.distill import StudentHead
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.gate import make_gate
from emonb.model import EmoVLMKD
from emonb.run import open_run
from emonb.settings import VLMSettings

LABELS = ("fear", "fear and loss", "dark awe")  # several tokens each, and one begins another
LEVELS = {"qwen3_vl": 3}  # merged tokens, and two deepstack levels
FEW = ("qwen2_vl", "qwen3_vl", "gemma3")  # for what is peft's or plain arithmetic in every class
ONE_SIZE = ("llava", "gemma3", "paligemma")  # classes whose pictures all have the same number of tokens
CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda family: save_family(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs it")
    return request.param


few = pytest.mark.parametrize("family", FEW, indirect=True, scope="module")


@pytest.fixture(scope="module")
def vlm(folders, family):
    return room.load_vlm(str(folders(family)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A square, a wide and a tall one, with different numbers of visual tokens."""
    folder, sizes = tmp_path_factory.mktemp("pictures"), [(96, 96), (192, 96), (60, 200)]
    return [paint(folder / f"{i}.png", (200, 90 * i, 40), i, size) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def visual(vlm, pictures):
    return room.visual_tokens(vlm, pictures)


@contextmanager
def rounding(vlm):
    """The model's own image features in float16, as they are stored; else nothing of ours."""
    plain = vlm.core.get_image_features

    def rounded(*arguments, **options):
        output = plain(*arguments, **options)
        for name in ("pooler_output", "deepstack_features"):
            if (found := getattr(output, name, None)) is not None:
                setattr(output, name, tree_map(lambda x: x.half().to(x.dtype), found))
        return output

    vlm.core.get_image_features = rounded
    yield
    del vlm.core.get_image_features


def plain_inputs(vlm, picture, instruction, answer):
    """A dialogue as the class's authors mean it, through its processor; and the number of tokens behind the answer."""
    processor, prompt = vlm.processor, room.prompt_text(vlm, instruction)
    options = {"images": [[room.shown(picture, vlm.max_side)]], "return_tensors": "pt"}
    if not processor.chat_template:
        return processor(text=[prompt], suffix=[answer], **options), 1
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages.insert(0, {"role": "system", "content": [{"type": "text", "text": resource("prompts.yaml", "system")}]})
    said, _, end = processor.apply_chat_template(messages, tokenize=False).rpartition(answer)
    whole = (said if said.startswith(prompt) else prompt) + answer + end  # LLaVA-OneVision's writes "assistant \n"
    starts = processor.tokenizer.bos_token and not whole.startswith(processor.tokenizer.bos_token)
    tail = len(processor.tokenizer(end, add_special_tokens=False)["input_ids"])
    return processor(text=[whole], add_special_tokens=bool(starts), **options), tail


def test_visual_tokens_are_what_the_model_itself_inserts(vlm, family, pictures, visual):
    assert type(vlm.model).__name__ == f"{FAMILIES[family][0]}ForConditionalGeneration"
    assert (len({len(t) for t in visual.tokens}) > 1) == (family not in ONE_SIZE)
    assert {t.shape[1] for t in visual.tokens} == {LEVELS.get(family, 1) * WIDTH}
    assert visual.pooled().shape == (3, WIDTH) == (3, vlm.width)
    cut, seen = room.visual_tokens(vlm, (), room.patches(vlm, pictures)), []
    hook = vlm.language.register_forward_pre_hook(lambda m, a, options: seen.append(options), with_kwargs=True)
    for i, picture in enumerate(pictures):
        inputs, _ = plain_inputs(vlm, picture, "Why?", "So.")
        with torch.no_grad():
            vlm.model(**inputs)
        options, here = seen[-1], inputs["input_ids"][0] == vlm.image_token_id
        levels = [options["inputs_embeds"][0, here], *(options.get("deepstack_visual_embeds") or [])]
        assert torch.equal(visual.tokens[i], cut.tokens[i])
        assert torch.allclose(visual.tokens[i].float(), torch.cat(levels, 1), rtol=2e-3, atol=2e-3)
        assert torch.allclose(visual.pooled()[i], options["inputs_embeds"][0, here].mean(0), rtol=2e-3, atol=2e-3)
    hook.remove()


def test_scored_answers_equal_one_plain_forward_per_picture_and_label(vlm, pictures, visual):
    """In a batch, padded on the left, the last tokens on a KV cache, stored tokens: against none of these."""
    labels = ("excitement", *LABELS)
    asked = question(labels)
    prefix, tails = room.answer_tokens(vlm, labels)
    begun, scores = len(prefix) - len(room.prompt_ids(vlm, asked)), room.answer_distribution(vlm, visual, labels)
    for i, path in enumerate(pictures):
        for c, (label, tail) in enumerate(zip(labels, tails, strict=True)):
            answer = room.answer_ids(vlm, answer_text(label), ended=False)
            inputs, after = plain_inputs(vlm, path, asked, answer_text(label))
            start = inputs["input_ids"].shape[1] - after - len(answer) + begun
            assert inputs["input_ids"][0, start : start + len(tail)].tolist() == tail
            with rounding(vlm), torch.no_grad():
                logp = vlm.model(**inputs).logits[0, start - 1 :].log_softmax(-1)
            expected = sum(logp[k, token].item() for k, token in enumerate(tail))
            assert scores[i, c].item() == pytest.approx(expected, abs=1e-4)
    assert (scores[0] - scores[1]).abs().max() > 5e-3, "the picture does not matter to this model: nothing is tested"


def test_candidates_are_distinct_and_begin_where_the_template_ends(vlm):
    for labels in (LABELS, *(taxonomy.labels for taxonomy in TAXONOMIES.values())):
        prefix, tails = room.answer_tokens(vlm, labels)
        prompt = room.prompt_ids(vlm, question(labels))
        for label, tail in zip(labels, tails, strict=True):
            answer = room.answer_ids(vlm, answer_text(label), ended=False)
            assert [*prefix, *tail] == [*prompt, *answer][: len(prefix) + len(tail)]
            assert vlm.processor.tokenizer.decode(answer).strip() == answer_text(label)
        assert not any(a == b[: len(a)] for i, a in enumerate(tails) for j, b in enumerate(tails) if i != j)


def test_a_training_dialogue_is_what_template_and_processor_make_of_it(vlm, pictures, visual):
    said = "{'emotion': 'awe'}"
    ids, answer = room.prompt_ids(vlm, "What is it?"), room.answer_ids(vlm, said)
    assert ids.count(vlm.placeholder_id) == 1
    batch = room.make_batch(vlm, [[*ids, *answer]] * 3, visual, pad_left=False, answered=[len(answer)] * 3)
    for i, picture in enumerate(pictures):
        inputs, after = plain_inputs(vlm, picture, "What is it?", said)
        whole = inputs["input_ids"].shape[1] - after  # LLaVA's template ends an answer with a space, we with </s>
        for name in ("input_ids", "mm_token_type_ids", "token_type_ids"):
            assert (name in batch) == (name in inputs)
            if name in batch:
                assert batch[name][i, :whole].tolist() == inputs[name][0, :whole].tolist(), name
    ends = {vlm.processor.tokenizer.eos_token_id, vlm.processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert ends & {*answer[-2:]}


def test_generation_equals_greedy_steps_without_a_cache(vlm, pictures, visual):
    ids = [room.prompt_ids(vlm, "Why?")] * len(pictures)
    start = len(ids[0])
    with torch.no_grad():
        for k in range(4):
            batch = room.make_batch(vlm, ids, visual, pad_left=True, answered=[k] * len(pictures))
            ids = [[*row, int(t)] for row, t in zip(ids, vlm.model(**batch).logits[:, -1].argmax(-1), strict=True)]
    texts = vlm.processor.tokenizer.batch_decode([row[start:] for row in ids], skip_special_tokens=True)
    assert texts == room.generate(vlm, pictures, "Why?", 4)


# ---- LoRA

KINDS = [(question(LABELS), answer_text("dark awe")), ("Why?", "It moves."), ("Describe what you see.", "A hill.")]
LESSONS = [{"image_id": i, "instruction": asked, "response": said} for i, (asked, said) in enumerate(KINDS)]


@pytest.fixture
def tuned(folders, family):
    torch.manual_seed(0)
    return tuning.add_lora(room.load_vlm(str(folders(family))), r=4, alpha=6, dropout=0, targets=("q_proj", "v_proj"))


def test_a_fresh_adapter_changes_no_answer_and_touches_the_language_models_attention_only(vlm, tuned, visual):
    trained = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    text = tuned.core.config.get_text_config()
    layers = [kind for kind in getattr(text, "layer_types", None) or ["full"] * 2 if not kind.startswith("linear")]
    assert len(trained) == len(layers) * 2 * 2
    inside = {id(p) for p in tuned.language.parameters()}
    assert all(id(p) in inside for name, p in tuned.model.named_parameters() if name in trained)
    assert all(name.split(".")[-5:-3] in (["self_attn", "q_proj"], ["self_attn", "v_proj"]) for name in trained)
    before, after = (room.answer_distribution(v, visual, LABELS) for v in (vlm, tuned))
    assert torch.allclose(before, after, atol=1e-4)


@few
def test_an_adapted_layer_is_w_x_plus_alpha_over_r_b_a_x(tuned):
    layer = tuned.language.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, WIDTH)
    bias = 0 if layer.bias is None else layer.bias.double()
    expected = x.double() @ layer.weight.double().T + bias + 6 / 4 * (x.double() @ a.double().T @ b.double().T)
    assert torch.allclose(layer(x).double(), expected, atol=1e-4)


@few
def test_only_the_responses_tokens_are_learnt_each_with_the_same_weight(tuned, visual):
    prompts, answers = (
        [encode(tuned, row[field]) for row in LESSONS]
        for encode, field in ((room.prompt_ids, "instruction"), (room.answer_ids, "response"))
    )
    batch, targets = tuning.training_batch(tuned, prompts, answers, visual)
    for row, answer, mask in zip(targets, answers, batch["attention_mask"], strict=True):
        assert row[row != tuning.IGNORE].tolist() == answer
        assert row[: int(mask.sum()) - len(answer)].eq(tuning.IGNORE).all()
    logits = tuned.model(**batch).logits.detach()
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    learnt = np.argwhere(targets.numpy()[:, 1:] != tuning.IGNORE)
    expected = -np.mean([np.log(p[row, at, targets[row, at + 1]]) for row, at in learnt])
    assert tuning.response_loss(logits, targets, len(learnt)).item() == pytest.approx(expected, rel=1e-5)


def test_the_prompt_is_learnt_too_on_request_but_never_the_picture(tuned, visual):
    texts = ("a", "b c", "d")
    prompts, answers = [room.prompt_ids(tuned, "Why?")] * 3, [room.answer_ids(tuned, text) for text in texts]
    batch, targets = tuning.training_batch(tuned, prompts, answers, visual, "all")
    never = {tuned.placeholder_id, tuned.processor.tokenizer.unk_token_id}
    for row, prompt, answer in zip(targets, prompts, answers, strict=True):
        assert row[row != tuning.IGNORE].tolist() == [token for token in [*prompt, *answer] if token not in never]
    rows = [{"image_id": i, "instruction": "Why?", "response": text} for i, text in enumerate(texts)]
    loss = tuning.step_gradients(tuned, rows, lambda ids: visual, [slice(None)], "all")
    logits = tuned.model(**batch).logits
    count = int((targets[:, 1:] != tuning.IGNORE).sum())
    assert loss == pytest.approx(tuning.response_loss(logits, targets, count).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_answers_after_a_tuning_as_before_also_a_quantised_one(folders, pictures, dtype):
    """And the tuning computes in bfloat16 where the VLM is loaded so, with weights of the adapter in float32."""
    vlm = room.load_vlm(str(folders("qwen2_vl")), dtype=dtype)
    vlm.model.is_quantized = True
    visual = room.visual_tokens(vlm, pictures)
    weights = {name: p.clone() for name, p in vlm.model.state_dict().items()}
    before, seen = room.answer_distribution(vlm, visual, LABELS), []
    tuned = tuning.add_lora(vlm, dropout=0)
    layer = tuned.language.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    tuning.tune(
        tuned, LESSONS, lambda ids: room.VisualTokens([visual.tokens[i] for i in ids], visual.grid[ids], None), lr=1
    )
    assert {str(kind) for kind in seen} == {f"torch.{dtype}"}
    assert {p.dtype for p in tuned.model.parameters() if p.requires_grad} == {torch.float32}
    assert not torch.equal(room.answer_distribution(tuned, visual, LABELS), before)
    vlm.model = tuned.model.unload()
    assert torch.equal(room.answer_distribution(vlm, visual, LABELS), before)
    after = vlm.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], p) and after[name].dtype == p.dtype for name, p in weights.items())


def test_a_tuning_that_leaves_lora_near_its_random_start_is_warned_of(folders, pictures):
    vlm = room.load_vlm(str(folders("qwen2_vl")), dtype="float32")
    visual = room.visual_tokens(vlm, pictures[:1])
    with pytest.warns(UserWarning, match="LoRA: 1 steps at a learning rate of 1e-05 move a weight by 1e-05 at most"):
        tuning.tune(tuning.add_lora(vlm), LESSONS[:1], lambda ids: visual, epochs=1, lr=1e-5)


@few
def test_a_step_in_parts_and_with_checkpointing_has_the_same_gradients(tuned, visual):
    def see(image_ids):
        frames = visual.frames and [visual.frames[i] for i in image_ids]
        return room.VisualTokens([visual.tokens[i] for i in image_ids], visual.grid[image_ids], visual.width, frames)

    trained, found = [p for p in tuned.model.parameters() if p.requires_grad], []
    for p in trained:  # B is zero at first, and with it the gradient of A
        torch.nn.init.normal_(p, std=0.1)
    tuned.model.train()
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        loss = tuning.step_gradients(tuned, LESSONS, see, parts)
        found.append((loss, torch.cat([p.grad.flatten() for p in trained])))
        tuned.model.zero_grad()
        tuned.model.enable_input_require_grads()
        tuned.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert found[0][1].abs().max() > 1e-3
    options = {"batch_size": 1, "accumulation": 3, "gradient_checkpointing": True}
    curve = tuning.tune(tuned, LESSONS, see, epochs=8, lr=2e-2, **options)
    assert curve[-1]["value"] < curve[0]["value"] - 0.1


def assembled(tuned, base, **options):
    """A model around a tuned VLM, with a random head and gate."""
    vlm = VLMSettings(base=base, dtype="float32", quantize_4bit=False, **options).model_dump(mode="json")
    config = {"labels": LABELS, "vlm": vlm, "hidden": [8], "gate": "concat", "seed": 0}
    head = StudentHead(tuned.width, (8,), len(LABELS))
    return EmoVLMKD(tuned, head, make_gate("concat", len(LABELS)), config).eval()


def test_the_assembled_model_answers_the_same_after_saving_and_loading(folders, family, tuned, pictures, tmp_path):
    for name, weights in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    model = assembled(tuned, str(folders(family)), max_new_tokens=4)
    model.save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    twin = EmoVLMKD.from_pretrained(tmp_path)
    pd.testing.assert_frame_equal(*(one.predict(pictures, batch_size=2) for one in (model, twin)))
    assert model.say(pictures) == twin.say(pictures)


def test_a_profile_may_ask_for_one_view_of_a_picture(folders, tmp_path):
    """Options of the image processor; what it does not know is named with what it does know."""
    base, picture = str(folders("idefics3")), Image.new("RGB", (192, 96))
    options = {"processor": {"do_image_splitting": False}}
    whole, cut = room.load_vlm(base, **options), room.load_vlm(base)
    one, parts = (room.visual_tokens(vlm, [picture]) for vlm in (whole, cut))
    assert len(one.tokens[0]) * 3 == len(parts.tokens[0])
    whole = tuning.add_lora(whole, r=4, alpha=6, dropout=0, targets=("q_proj",))
    assembled(whole, base, **options).save_pretrained(tmp_path)
    loaded = EmoVLMKD.from_pretrained(tmp_path).seeing()
    assert len(room.visual_tokens(loaded, [picture]).tokens[0]) == len(one.tokens[0])
    with pytest.raises(EmonbError, match=r"vlm\.processor: do_split: .* no such option; it has do_.*splitting"):
        room.load_processor(base, {"do_split": False})


@pytest.mark.parametrize("name", ["idefics3", "llava_next"])
@pytest.mark.parametrize("kept", [True, False], ids=["tokens kept", "tokens made again"])
def test_stored_tokens_give_the_answers_of_fresh_ones(folders, tmp_path, name, kept):
    """Of classes without patch grids: pictures cut into parts with marks between them, and others of many lengths."""
    make_tree(tmp_path / "images" / DATASET, {"train": 2, "val": 1, "test": 2})
    paint(tmp_path / "images" / DATASET / "test" / "positive" / "wide.png", (9, 99, 9), 1, (192, 96))
    profile = tiny_profile(tmp_path / "tiny.yaml", folders(name), cache_visual_tokens=kept, batch_size=2)
    run = open_run(str(profile), images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    for stage in ("samples", "features", "base_predictions"):
        run.make(stage)
    features = run.find("features", DATASET).path
    assert (features / "test.frames.npy").is_file() == (name == "idefics3")
    assert bool([*features.glob("*.safetensors")]) == kept
    stored = run.predictions(DATASET, "vlm_zero_shot", "test").set_index("image_id")
    labels, columns = run.labels(DATASET), [f"p_{label}" for label in run.labels(DATASET)]
    for row in run.samples(DATASET, "test").itertuples():
        fresh = room.answer_distribution(run.vlm, room.visual_tokens(run.vlm, [row.path]), labels)[0].softmax(-1)
        np.testing.assert_allclose(stored.loc[row.image_id, columns].astype(float), fresh, atol=1e-4)


def test_every_epoch_has_a_new_order_and_a_rest_is_left_out():
    plan = tuning.plan_steps(10, 2.5, 4, seed=3)
    assert [len(step) for step in plan] == [4] * 5
    assert len({*plan[0], *plan[1]}) == 8
    assert plan[:2] != plan[2:4]
    assert plan == tuning.plan_steps(10, 2.5, 4, seed=3) != tuning.plan_steps(10, 2.5, 4, seed=4)


# ---- weights that are missing, damaged or of another kind


def refusal(base) -> str:
    """The message about a base that cannot be loaded, and that it comes at once."""
    start = time.monotonic()
    with pytest.raises(EmonbError) as caught:
        room.load_vlm(str(base))
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "nobody/nothing"])
def test_a_model_that_is_not_here_comes_with_the_command_that_fetches_it(name):
    text, into = refusal(name), f"models/{name.split('/')[1]}"
    assert text.startswith(f"setting vlm.base: {name!r} cannot be loaded")
    assert f"`hf download {name} --local-dir {into}`" in text
    assert f"`vlm: {{base: {into}}}`" in text


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


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text("{"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut short": cut_short,
    "a shard is lost": lose_a_shard,
    "a tensor is lost": lose_a_tensor,
    "a model without eyes": lambda folder: transformers.Qwen2Config().save_pretrained(folder),
    "a class that nobody tried": lambda folder: transformers.FuyuConfig().save_pretrained(folder),
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_wrong_checkpoint_is_one_message_with_its_remedy(folders, tmp_path, damage):
    folder = shutil.copytree(folders("qwen2_vl"), tmp_path / "Qwen2-VL-2B-Instruct")
    DAMAGE[damage](folder)
    text = refusal(folder)
    assert text.startswith(f"setting vlm.base: {str(folder)!r} ")
    wrong = damage in ("no chat template", "a model without eyes", "a class that nobody tried")
    assert ("choose an instruction-tuned model of qwen2_vl," if wrong else "hf download Qwen/") in text


NEEDS = "setting vlm.attention: flash_attention_2 needs "
ATTENTION = [
    ("auto", "bfloat16", CUDA, True, "flash_attention_2"),
    ("auto", "bfloat16", CUDA, False, "sdpa"),
    ("auto", "bfloat16", CPU, True, "sdpa"),
    ("eager", "bfloat16", CUDA, True, "eager"),
    ("flash_attention_2", "float32", CUDA, True, f"{NEEDS}vlm.dtype bfloat16"),
    ("flash_attention_2", "float16", CUDA, False, f"{NEEDS}the package flash-attn"),
]


@pytest.mark.parametrize(("asked", "dtype", "device", "installed", "wanted"), ATTENTION)
def test_attention_by_what_is_there(monkeypatch, asked, dtype, device, installed, wanted):
    monkeypatch.setattr(room, "is_flash_attn_2_available", lambda: installed)
    try:
        found = room.attention_code(asked, dtype, device)
    except EmonbError as error:
        found = str(error)
    assert found.startswith(wanted)


def test_four_bits_ask_for_their_package(monkeypatch):
    monkeypatch.setattr(room, "get_device", lambda: CUDA)
    monkeypatch.setattr(room, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(EmonbError, match=r"setting vlm.quantize_4bit: .*pip install -e '\.\[gpu\]'"):
        room.load_vlm("stand-in", quantize_4bit=True)


def test_layers_for_lora_that_are_not_there_are_named_with_those_that_are():
    found = r"setting vlm.lora_targets: no nosuch here; layers are down_proj, .*, v_proj"
    with pytest.raises(EmonbError, match=found):
        tuning.add_lora(room.load_vlm("stand-in"), targets=["nosuch"])
