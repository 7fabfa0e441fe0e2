"""Addresses of models on the Hugging Face hub: `hub:OWNER/NAME` and `timm:NAME`.

Files are taken from the local cache, or fetched into it if the hub can be reached; HF_HUB_OFFLINE=1 forbids fetching.
"""

import re
from pathlib import Path

import timm

from mae.errors import UserError, first_of

HUB, TIMM = "hub:", "timm:"
_CONFIGS = ["config.json", "preprocessor_config.json"]
# In this order: the first kind that a model has is fetched.
_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_MOST_OFFERED = 5


def is_address(source: str) -> bool:
    """Return whether a source is an address instead of a path."""
    return source.startswith((HUB, TIMM))


def fetched(source: str) -> Path:
    """Return the local folder of the model at an address.

    Raises:
        UserError: if the address names no model, or the hub cannot be reached and the cache does not hold it.
    """
    name = source.removeprefix(HUB) if source.startswith(HUB) else _hub_name(source.removeprefix(TIMM))
    if not _NAME.fullmatch(name):
        raise UserError(f"{source} is no address on the hub; allowed: {HUB}OWNER/NAME, with @REVISION if needed")
    repository, _, revision = name.partition("@")
    # It takes a second to import.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    for weights in _WEIGHTS:
        try:
            folder = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=[*_CONFIGS, *weights])
            )
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{source} cannot be fetched, and the cache ($HF_HOME) does not hold it: {reason}; "
                "fetch it where the hub can be reached, or give a folder or a file"
            ) from None
        if any(any(folder.glob(pattern)) for pattern in weights):
            return folder
    raise UserError(
        f"{source} holds no weights of a known name: {first_of([each for kind in _WEIGHTS for each in kind])}"
    )


def _hub_name(name: str) -> str:
    """Return the hub's name of a model of timm, whose own name may be without the tag of its weights."""
    try:
        given = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, ValueError, KeyError):
        given = None
    if given is None or not given.hf_hub_id:
        known = timm.list_pretrained(f"{name.partition('.')[0]}*") or timm.list_pretrained("vit_base_patch16*")
        raise UserError(
            f"{TIMM}{name} is no model of timm {timm.__version__} with weights on the hub; "
            f"allowed: {first_of(known, _MOST_OFFERED, ', ')}"
        )
    hub = str(given.hf_hub_id)
    return f"{hub}{given.architecture}.{given.tag}" if hub.endswith("/") else hub
