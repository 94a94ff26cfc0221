"""Loading of the vision-language model: where its weights are, in which precision and on which device.

Qwen2-VL is the paper's; Qwen2.5-VL and Qwen3-VL take the same way. A checkpoint is accepted by what its
class offers, not by its name.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from emonb.errors import EmonbError
from emonb.fit import get_device
from emonb.hub import hub_offline, in_short, missing_weights
from emonb.parallel import sharded
from emonb.settings import VLMSettings

__all__ = ["attention_of", "load_model", "load_processor", "placed_by_launcher", "quantization_of"]

PAPER_BASE = "Qwen/Qwen2-VL-7B-Instruct"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_processor(settings: VLMSettings) -> Any:
    """The base VLM's processor (tokenizer, image processor, chat template), without its weights.

    Raises:
        EmonbError: not on this machine, or not the processor of a Qwen-VL model.
    """
    _check(settings, weights=False)
    processor = _from_pretrained(AutoProcessor, settings)
    parts = [hasattr(processor, name) for name in ("tokenizer", "image_processor", "chat_template")]
    if not all(parts) or not processor.chat_template:
        raise _wrong_model(settings, "its processor lacks a tokenizer, an image processor or a chat template")
    if "<|im_end|>" not in processor.tokenizer.get_vocab():
        raise _wrong_model(settings, "its tokenizer does not know <|im_end|>, the end of a Qwen message")
    return processor


def load_model(settings: VLMSettings) -> Any:
    """The base VLM's model, by hub name, local folder or "stand-in", in evaluation mode on its device.

    Raises:
        EmonbError: weights that are missing, damaged or of another kind of model, with the command that
            fetches them; a setting that this machine cannot fulfil.
    """
    if os.environ.get("EMONB_HEADLESS") == "1":  # the runner has its own bar; outputs stay free of others
        transformers.utils.logging.disable_progress_bar()
    device = get_device()  # first: it joins the other processes, which transformers' loading asks about
    options: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": attention_of(settings, device),
        "quantization_config": quantization_of(settings, device),
    }
    quantized = options["quantization_config"] is not None
    if quantized and not placed_by_launcher():
        options["device_map"] = {"": torch.cuda.current_device() if device.index is None else device.index}
    _check(settings, weights=True)
    model, report = _from_pretrained(AutoModelForImageTextToText, settings, output_loading_info=True, **options)
    inner = getattr(model, "model", None)
    offered = inspect.signature(inner.forward).parameters if inner is not None else {}
    if not {"mm_encoder_outputs", "mm_token_type_ids", "image_grid_thw"} <= set(offered):
        raise _wrong_model(settings, f"{type(model).__name__} does not take visual tokens")
    missing = sorted(report["missing_keys"])
    if missing and not placed_by_launcher():  # there, only one process reads the weights
        raise _missing(settings, f"{settings.base!r} lacks {len(missing)} tensors of the model, first {missing[0]}")
    if not quantized and not placed_by_launcher():
        model = model.to(device)
    return model.eval()


def attention_of(settings: VLMSettings, device: torch.device) -> str:
    """transformers' name of the attention code; "auto" is FlashAttention 2 where it can run, else sdpa.

    Raises:
        EmonbError: FlashAttention is asked for and cannot run.
    """
    lacking = [
        what
        for what, there in (
            ("a CUDA device", device.type == "cuda"),
            ("vlm.dtype bfloat16 or float16", settings.dtype != "float32"),
            ("the package flash-attn (`pip install flash-attn --no-build-isolation`)", is_flash_attn_2_available()),
        )
        if not there
    ]
    if settings.attention == "auto":
        return "sdpa" if lacking else "flash_attention_2"
    if settings.attention == "flash_attention_2" and lacking:
        raise EmonbError(f"setting vlm.attention: flash_attention_2 needs {', '.join(lacking)}; or write auto")
    return settings.attention


def quantization_of(settings: VLMSettings, device: torch.device) -> Any | None:
    """NF4 with double quantisation and bfloat16 compute (authors' code) on CUDA; None elsewhere.

    Raises:
        EmonbError: bitsandbytes is not installed.
    """
    if not settings.quantize_4bit or device.type != "cuda":
        return None
    if not is_bitsandbytes_available():
        raise EmonbError(
            "setting vlm.quantize_4bit: 4-bit loading on CUDA needs bitsandbytes; install it with "
            "`pip install -e '.[gpu]'` in the checkout, or set vlm.quantize_4bit to false"
        )
    from transformers import BitsAndBytesConfig

    # sharding takes floating-point weights only, all of one dtype (bitsandbytes' guide to FSDP-QLoRA)
    storage = {"bnb_4bit_quant_storage": getattr(torch, settings.dtype)} if sharded() else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **storage,
    )


def placed_by_launcher() -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP will put the weights on the devices, so that loading must not.

    FSDP does so only with `fsdp_cpu_ram_efficient_loading`, where one process reads the weights for all; the
    variables are those that `accelerate launch` sets and transformers reads.
    """
    on = {name for name, value in os.environ.items() if value.lower() in ("1", "true")}
    return sharded() and ("ACCELERATE_USE_FSDP" not in on or "FSDP_CPU_RAM_EFFICIENT_LOADING" in on)


def _from_pretrained(kind: Any, settings: VLMSettings, **options: Any) -> Any:
    try:
        return kind.from_pretrained(settings.checkpoint, local_files_only=hub_offline(), **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _missing(settings, f"cannot load {settings.base!r} ({in_short(error)})") from None


def _check(settings: VLMSettings, *, weights: bool) -> None:
    """What can be known before anything large is read: the config, and a folder's files."""
    folder = Path(settings.checkpoint)
    if folder.is_dir():
        if problem := _damage(folder, settings.base, weights=weights):
            raise _missing(settings, problem)
    else:
        _ask_hub(settings)
    try:
        config = AutoConfig.from_pretrained(settings.checkpoint, local_files_only=hub_offline())
    except (OSError, ValueError) as error:
        raise _missing(settings, f"cannot load the config of {settings.base!r} ({in_short(error)})") from None
    vision = getattr(config, "vision_config", None)
    if not hasattr(vision, "spatial_merge_size") or not hasattr(config, "image_token_id"):
        raise _wrong_model(settings, f"its config is that of a {config.model_type} model")


def _damage(folder: Path, name: str, *, weights: bool) -> str | None:
    """What is wrong with a checkpoint folder, or None; safetensors headers tell a file that was cut short."""
    if not (folder / "config.json").is_file():
        return f"the folder {name!r} holds no config.json, so it is no checkpoint"
    if not weights:
        return None
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if index.is_file():
        with suppress(ValueError, KeyError):
            wanted = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            if absent := sorted(wanted - {f.name for f in files}):
                return f"the folder {name!r} lacks {len(absent)} of {len(wanted)} weight files, first {absent[0]}"
    if not files and not list(folder.glob("*.bin")):
        return f"the folder {name!r} holds no weights (*.safetensors)"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name}/{file.name} is damaged or cut short ({in_short(error)}), delete it"
    return None


def _ask_hub(settings: VLMSettings) -> None:
    """One small file of the hub model, from the cache or the hub: is there such a model at all?"""
    name = settings.base
    try:
        hf_hub_download(name, "config.json", local_files_only=hub_offline())
    except RepositoryNotFoundError:
        raise _wrong_model(settings, "the hub has no model of this name, or it is not public") from None
    except ValueError:  # not the form of a hub name
        raise _missing(settings, f"there is no folder {name!r} here, and it is not a name on the hub") from None
    except OSError as error:
        reason = "the hub cannot be reached" if hub_offline() else in_short(error)
        raise _missing(
            settings, f"{name!r} is no folder here and not in the cache of downloaded models ({reason})"
        ) from None


def _missing(settings: VLMSettings, problem: str) -> EmonbError:
    name, folder = settings.base, Path(settings.base)
    if Path(settings.checkpoint).is_dir() or not HUB_NAME.fullmatch(name) or name.startswith("models/"):
        name = f"Qwen/{folder.name}" if folder.name.startswith("Qwen") else PAPER_BASE
        into = settings.base if folder.name.startswith("Qwen") else f"models/{name.split('/')[1]}"
    else:
        into = f"models/{name.split('/')[1]}"
    return missing_weights("vlm.base", problem, f"{name} --local-dir {into}", f"vlm: {{base: {into}}}")


def _wrong_model(settings: VLMSettings, problem: str) -> EmonbError:
    return EmonbError(
        f"setting vlm.base: {settings.base!r} cannot be used ({problem}); choose a Qwen2-VL, Qwen2.5-VL or Qwen3-VL "
        f"Instruct model, the paper's is {PAPER_BASE}"
    )
