"""Ground floor: is the Hugging Face hub within reach, and what to say when weights are not on this machine."""

from __future__ import annotations

import functools

from emonb.errors import EmonbError

__all__ = ["hub_offline", "in_short", "missing_weights"]

PATIENCE_S = 3.0  # for one look at the hub; ours


@functools.cache
def hub_offline() -> bool:
    """Whether only what is on this machine can be loaded: `HF_HUB_OFFLINE` is set, or the hub does not answer.

    One look, once per process: left alone, huggingface_hub tries each missing file six times (23 s a file).
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # the hub's HTTP library differs by version; whatever it raises, there was no answer
        return True
    return False


def missing_weights(setting: str, problem: str, fetch: str, value: str) -> EmonbError:
    """One message for all weights: what is wrong, the command, the setting, and the way without a network.

    Args:
        setting: full name of the setting, as `vlm.base`.
        problem: what is missing or damaged.
        fetch: arguments of `hf download`, with the folder.
        value: what to write into the setting afterwards, as YAML.
    """
    return EmonbError(
        f"setting {setting}: {problem}; fetch it with `hf download {fetch}` and write `{value}` into the profile's "
        "YAML file. No network here: run the command on a machine that has one and copy the folder"
    )


def in_short(error: Exception) -> str:
    """A library's error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
