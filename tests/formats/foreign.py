"""Tiny models of other libraries, with the names that their published files have."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import encoder_part, file_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATION = {"mean": MEAN, "std": STD}
SETTINGS = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=12, decoder_depth=1, decoder_heads=3
)
# Decoders of 192 channels have 6 heads, as no tensor shows.
PUBLISHED = MaskedAutoencoderSettings(
    width=192, depth=1, heads=3, patch_size=(4,), decoder_width=192, decoder_depth=1, decoder_heads=6
)
_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
_DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 48,
}


def shaken(model: nn.Module) -> nn.Module:
    """The model with weights that are all different from zero and one, without dropout."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def published(settings: MaskedAutoencoderSettings = PUBLISHED) -> dict[str, Tensor]:
    """Tensors of encoder and decoder as the original MAE code names them."""
    torch.manual_seed(0)
    return file_tensors(shaken(MaskedAutoencoder(settings, (16, 16), 3)))


def published_file(path: Path, whole: bool = False, **arguments: Any) -> Path:
    """A file as the original MAE code publishes it: the encoder, or a checkpoint of its training with the decoder."""
    weights = published()
    if not whole:
        torch.save({"model": encoder_part(weights)}, path)
        return path
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 799, "args": Namespace(**arguments)}, path)
    return path


def timm_vit(**changes: Any) -> VisionTransformer:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return shaken(VisionTransformer(**(shape | changes)))


def timm_folder(folder: Path, classes: int = 5, labels: list[str] | None = None, **arguments: Any) -> VisionTransformer:
    """A folder as timm's save_for_hf writes it, and the model in it."""
    model = shaken(
        timm.create_model(
            "vit_tiny_patch16_224", num_classes=classes, img_size=16, patch_size=4, depth=2, embed_dim=16, num_heads=2,
            **arguments,
        )
    )  # fmt: skip
    args = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2} | arguments
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": classes,
        "global_pool": "token",
        "model_args": args,
        "pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 0.9, "mean": list(MEAN), "std": list(STD)},
    }
    if labels is not None:
        config["label_names"] = labels
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def torchvision_vit(classes: int = 5) -> nn.Module:
    return shaken(torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64, num_classes=classes))


def vit_classifier(**changes: Any) -> ViTForImageClassification:
    return shaken(ViTForImageClassification(ViTConfig(**(_SHAPE | changes))))


def vit_mae(**changes: Any) -> ViTMAEForPreTraining:
    return shaken(ViTMAEForPreTraining(ViTMAEConfig(**(_SHAPE | _DECODER | changes))))


def transformers_folder(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """A folder as save_pretrained writes it, with the preparation of the images."""
    model.save_pretrained(folder, **options)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 20}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "do_normalize": True,
        "image_mean": list(MEAN), "image_std": list(STD), "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
