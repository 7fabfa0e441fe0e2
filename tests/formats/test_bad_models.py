"""Files and folders that cannot be read are refused in one line that says what they are."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from formats.foreign import NORMALIZATION, published, timm_folder, timm_vit, transformers_folder, vit_classifier
from mae.errors import UserError
from mae.formats.addresses import HUB
from mae.formats.opening import Normalization, open_model
from mae.formats.restricted import read_checkpoint
from mae.inference.model import load
from mae.models.weights import encoder_part

BARE = encoder_part(published())


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Trap:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.canary,)


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\7" * 99, "is not an intact safetensors file, nor any other file of weights that is known"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS in place of the file"),
        (b"\n<!DOCTYPE html>", "is a web page, probably in place of a download that failed"),
        (b"\x1f\x8b\x08", "is a gzip file"),
        (save(BARE)[:2000], "is not an intact safetensors file"),
        (save({}), "holds no weights"),
        (save({"x": torch.zeros(2)}), "is no plain ViT that is known: it has x; give a run of mae"),
        (b"PK\x03\x04 and so on", "is not an intact PyTorch checkpoint"),
        (saved([1, 2]), "holds a list instead of tensors by name"),
        (saved({"a": 1}), "holds no weights"),
        (saved({"model": {0: torch.zeros(2)}, 1: "text"}), "holds no weights"),
        (saved(BARE | {"norm.bias": torch.zeros(192, device="meta")}), "norm.bias without its values; allowed: fl"),
        (saved(BARE | {"norm.bias": torch.zeros(192).to_sparse()}), "holds norm.bias sparse; allowed: floating-point"),
        (saved({"a": torch.zeros(99)})[:-400], "is not an intact PyTorch checkpoint"),
        (pickle.dumps({"a": 1}), "is no checkpoint of tensors and plain values"),
    ],
)
def test_it_is_said_what_a_file_is(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    assert words in refusal(path)


def test_a_flipped_byte_of_a_checkpoint_is_told_unless_it_was_saved_without_sums(tmp_path: Path) -> None:
    path, content = tmp_path / "weights.pth", {"a": torch.zeros(99)}
    data = bytearray(saved(content))
    data[data.index(bytes(4 * 99)) + 200] ^= 1
    path.write_bytes(data)
    message = refusal(path)
    assert "is not an intact PyTorch checkpoint: Bad CRC-32 for file '" in message
    assert message.endswith("it is not opened: copy or download it again")
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(saved(content))
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path).keys() == content.keys()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_code_is_refused_by_the_name_of_it(protocol: int, tmp_path: Path) -> None:
    path, canary = tmp_path / "trap.pth", tmp_path / "canary"
    torch.save({"model": BARE, "optimizer": Trap(canary)}, path, pickle_protocol=protocol)
    assert ("asks for code (" if protocol == 2 else "is no checkpoint of tensors and plain values") in refusal(path)
    path.write_bytes(pickle.dumps({"model": Trap(canary)}, protocol=protocol))
    assert "; it is not opened" in refusal(path)
    path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    assert "asks for code (os.system); it is not opened" in refusal(path)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "asks for code (torch.nn.modules.linear.Linear)" in refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"init_values": 1e-5}, "LayerScale (blocks.0.ls1.gamma)"),
        ({"reg_tokens": 4}, "register tokens (reg_token)"),
        ({"qkv_bias": False}, "queries, keys and values without a bias"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"pre_norm": True}, "a norm before its blocks (norm_pre.bias), an embedding of patches without a bias"),
        ({"qk_norm": True}, "norms of queries and keys (blocks.0.attn.k_norm.bias)"),
        ({"pos_embed": "none"}, "no table of positions"),
        ({"global_pool": "map"}, "pooling by attention (attn_pool.kv.bias)"),
    ],
)
def test_other_vits_are_refused_by_what_they_have(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    save_file(timm_vit(**changes).state_dict(), tmp_path / "w.safetensors")
    assert f"w.safetensors is not a plain ViT: it has {part}" in refusal(tmp_path / "w.safetensors", heads=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.0.mlp.fc2.bias"), "is not a plain ViT: blocks.0.mlp.fc2.bias is missing"),
        (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
        (lambda w: w.update({"blocks.0.extra.weight": torch.zeros(2)}), "tensors that are not known (blocks.0.extra"),
        (lambda w: w.update({"rope.freqs": torch.zeros(2)}), "rotary positions (RoPE) (rope.freqs)"),
        (lambda w: w.update({"dist_token": torch.zeros(2)}), "a distillation token (dist_token)"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), "norm.bias is [3] instead of [192]"),
        (lambda w: w.update({"norm.bias": torch.zeros(192, dtype=torch.int8)}), "holds norm.bias as torch.int8"),
        (
            lambda w: w.update({"pos_embed": torch.zeros(1, 14, 192)}),
            "has 14 positions for patches of 4x4, which is no",
        ),
        (lambda w: w.update({"pos_embed": torch.zeros(17, 192)}), "pos_embed is [17, 192], with 3 axes expected"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(192, 48)}), "with 4 axes expected"),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    change: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
) -> None:
    weights = dict(BARE)
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    assert words in refusal(tmp_path / "w.safetensors")


def test_what_no_tensor_shows_is_asked_for(tmp_path: Path) -> None:
    save_file(timm_vit(num_classes=0).state_dict(), tmp_path / "narrow.safetensors")
    words = "width 16 does not tell; set model.heads (in mae evaluate: data.heads; in mae embed,"
    assert words in refusal(tmp_path / "narrow.safetensors")
    assert "which 3 heads do not divide" in refusal(tmp_path / "narrow.safetensors", heads=3)
    moco = timm_vit(num_classes=0, embed_dim=384, depth=1, num_heads=12).state_dict()
    torch.save({"state_dict": {f"module.base_encoder.{n}": t for n, t in moco.items()}}, tmp_path / "moco.pth")
    assert "width 384 does not tell" in refusal(tmp_path / "moco.pth")  # MoCo v3's ViT-S has 12 heads, others have 6
    with pytest.raises(UserError, match=r"does not say how its images were normalised; set data.mean .* 0.485 0.456"):
        load(tmp_path / "narrow.safetensors", heads=2)
    with pytest.raises(UserError, match="mean and std are given together"):
        load(tmp_path / "narrow.safetensors", mean=(0.5,), heads=2)
    for mean, std in (((float("nan"), 0.5, 0.5), (0.5,) * 3), ((0.5,) * 3, (0.5, float("nan"), 0.5))):
        assert "allowed: " in refusal(tmp_path / "narrow.safetensors", heads=2, normalization=Normalization(mean, std))
    one = Normalization((0.5,), (0.5,))
    assert "has 3 channels, but 1 means and 1 deviations" in refusal(
        tmp_path / "narrow.safetensors", heads=2, normalization=one
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "resnet50"}, "is of resnet50, which is not a ViT of timm"),
        (
            {"architecture": "deit3_small_patch16_224"},
            "is of deit3_small_patch16_224, which is not a plain ViT: its pos_embed is",
        ),
        ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "which is not a plain ViT"),
        ({"model_args": {"act_layer": "silu"}}, "has model_args that a plain ViT has not: act_layer silu"),
        ({"model_args": {"checkpoint_path": "x"}}, "has model_args that a plain ViT has not: checkpoint_path x"),
        *(
            ({"model_args": {"depth": depth}}, f"has depth {depth}; allowed: 1 to 1000")
            for depth in ("many", 0, 200_000)
        ),
        ({"model_args": {"mlp_ratio": "many"}}, "describes no ViT that timm can build"),
        ({"model_args": {"mlp_ratio": float("inf")}}, "describes no ViT that timm can build"),
        ({"model_args": {"img_size": []}}, "describes no ViT that timm can build"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"img_size": 64}}, "of two models; put the config"),
    ],
)
def test_a_folder_of_timm_of_another_kind(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm")
    config = tmp_path / "timm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert words in refusal(tmp_path / "timm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "dinov2"}, "is of model_type dinov2; allowed: vit, vit_mae"),
        ({"hidden_act": "quick_gelu"}, "has hidden_act quick_gelu; a model that can be read has gelu"),
        ({"qkv_bias": False}, "has qkv_bias False"),
        ({"num_attention_heads": 3}, "which 3 heads do not divide"),
        ({"image_size": 64}, "its config says 64x64"),
        ({"hidden_size": 768}, "says width 768, but its tensors have 16: they are of two models"),
        ({"num_hidden_layers": 12}, "says depth 12, but its tensors have"),
        ({"patch_size": 32}, "says patch_size (32, 32), but its tensors have"),
        ({"layer_norm_eps": -1}, "has layer_norm_eps -1; allowed: 0 or a small number above it"),
    ],
)
def test_a_folder_of_transformers_of_another_kind(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "vit", vit_classifier())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}'),
        *(json.dumps({"weight_map": {"a": name}}) for name in ("../other.safetensors", "..", "", "a\0b", 3)),
    ],
)
def test_damaged_texts_beside_weights(text: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "vit", vit_classifier())
    if "weight_map" in text:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)
        assert "is not an index of weights" in refusal(folder)
    else:
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder)


def test_a_tensor_is_taken_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "vit", vit_classifier())
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors")
    save_file({name: torch.full_like(weights[name], 7.0)}, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"other": "b.safetensors"}}))
    assert "says that other is in b.safetensors, which holds no such tensor" in refusal(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
    save_file(weights | {"module.cls": torch.zeros(1), "cls": torch.zeros(1)}, folder / "a.safetensors")
    assert "holds cls twice, with and without module. or _orig_mod." in refusal(folder)


def test_addresses_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "cannot be fetched, and the cache ($HF_HOME) does not hold it" in refusal(f"{HUB}someone/something")
    assert "cannot be fetched" in refusal("timm:vit_base_patch16_224.mae")
    assert "is no address on the hub; allowed: hub:OWNER/NAME" in refusal(f"{HUB}something")
    assert "timm:vit_none is no model of timm" in refusal("timm:vit_none")
    assert "allowed: vit_tiny_patch16_224.augreg" in refusal("timm:vit_tiny_patch16_224.none")
    assert refusal(tmp_path / "nothing").endswith(
        "does not exist; give the folder of a finished run, or a .safetensors file"
    )


def test_a_cached_model_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for owner, name, address in (
        ("someone", "vit", f"{HUB}someone/vit"),
        ("timm", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm:vit_tiny_patch16_224"),
    ):
        repository = tmp_path / f"models--{owner}--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        timm_folder(repository / "snapshots" / ("0" * 40))
        stored = open_model(address)
        assert stored.description.mean == NORMALIZATION["mean"]
        assert stored.beside("export-timm") == Path("export-timm")
