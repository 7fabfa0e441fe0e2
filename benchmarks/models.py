"""Two models to compare ours with, both with copies of its weights: a plain one, and the one of `transformers`.

Both return a loss, the prediction of every patch (`logits`) and a mask that is 1 where a patch was hidden.
"""

import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.weights import file_tensors

NORM_EPS, VARIANCE_EPS = 1e-6, 1e-6


class PlainOutput(NamedTuple):
    loss: Tensor
    logits: Tensor
    mask: Tensor


class PlainMaskedAutoencoder(nn.Module):
    """The method as its paper (arXiv 2111.06377) and its first code have it, without our savings.

    Every patch is embedded, and the kept tokens are gathered. A second argsort inverts the shuffle. All tokens pass all
    blocks of the decoder. Every patch is predicted, and the loss of visible patches is multiplied by zero. `attention`
    is softmax(q k) v in separate operations (manual), or torch's fused kernel (sdpa).
    """

    def __init__(self, model: MaskedAutoencoder, attention: Literal["manual", "sdpa"] = "manual") -> None:
        """Copy `model`, whose decoder must be `self`."""
        super().__init__()
        encoder: Any = model.encoder
        decoder: Any = model.decoder
        projection, (decoder_width, width) = encoder.patch_embed.proj, decoder.decoder_embed.weight.shape
        self.patch_size, self.kept, self.norm_pix_loss = model.patch_size, model.kept, model.norm_pix_loss
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(projection.in_channels, width, model.patch_size, stride=model.patch_size)}
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty_like(encoder.pos_embed), requires_grad=False)
        self.blocks = plain_blocks(encoder.blocks, width, attention)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(torch.empty_like(decoder.decoder_pos_embed), requires_grad=False)
        self.decoder_blocks = plain_blocks(decoder.decoder_blocks, decoder_width, attention)
        self.decoder_norm = nn.LayerNorm(decoder_width, NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_width, decoder.decoder_pred.out_features)
        self.load_state_dict(file_tensors(model))

    def forward(self, images: Tensor, noise: Tensor) -> PlainOutput:
        """Take normalised images [batch, channels, height, width] and uniform noise [batch, patches]."""
        encoded, mask, ids_restore = self.encode(images, noise)
        logits = self.decode(encoded, ids_restore)
        error = (logits - self.target(images)).square().mean(dim=2)
        return PlainOutput((error * mask).sum() / mask.sum(), logits, mask)

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        visible = tokens.gather(1, ids_shuffle[:, : self.kept, None].repeat(1, 1, tokens.shape[2]))
        mask = torch.ones_like(noise)
        mask[:, : self.kept] = 0
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        encoded = self.norm(self.blocks(torch.cat([cls_token, visible], dim=1)))
        return encoded, mask.gather(1, ids_restore), ids_restore

    def decode(self, encoded: Tensor, ids_restore: Tensor) -> Tensor:
        tokens = self.decoder_embed(encoded)
        batch, patches = ids_restore.shape
        mask_tokens = self.mask_token.repeat(batch, patches - self.kept, 1)
        shuffled = torch.cat([tokens[:, 1:], mask_tokens], dim=1)
        restored = shuffled.gather(1, ids_restore[:, :, None].repeat(1, 1, tokens.shape[2]))
        sequence = torch.cat([tokens[:, :1], restored], dim=1) + self.decoder_pos_embed
        predicted: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(sequence)))[:, 1:]
        return predicted

    def target(self, images: Tensor) -> Tensor:
        down, across = self.patch_size
        cells = images.unfold(2, down, down).unfold(3, across, across)  # batch, channels, rows, columns, down, across
        pixels = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        if not self.norm_pix_loss:
            return pixels
        mean, variance = pixels.mean(dim=2, keepdim=True), pixels.var(dim=2, keepdim=True)
        return (pixels - mean) / (variance + VARIANCE_EPS) ** 0.5


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, attention: Literal["manual", "sdpa"]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attn = PlainAttention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        layers = OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, attention: Literal["manual", "sdpa"]) -> None:
        super().__init__()
        self.heads, self.fused = heads, attention == "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = (query @ key.transpose(2, 3)) * query.shape[3] ** -0.5
            mixed = scores.softmax(dim=3) @ value
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


def plain_blocks(blocks: Any, width: int, attention: Literal["manual", "sdpa"]) -> nn.Sequential:
    """Return plain blocks, as many as `blocks` has and of the same shape."""
    return nn.Sequential(
        *(PlainBlock(width, block.attn.num_heads, block.mlp.fc1.out_features, attention) for block in blocks)
    )


# Our names in a file -> names of the weights in `transformers`.
RENAMED = [
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def published_names(name: str) -> list[str]:
    """Return the name in `transformers` of the tensor `name` of our files, or three names for queries, keys, values."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")]
    return [name]


def published_weights(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Return copies of our weights by the names of `transformers`."""
    weights: dict[str, Tensor] = {}
    for ours, tensor in file_tensors(model).items():
        names = published_names(ours)
        weights |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return weights


def transformers_model(model: MaskedAutoencoder, attention: Literal["eager", "sdpa"] = "eager") -> nn.Module:
    """Return the model of `transformers` with our weights.

    They pass through a file, since `transformers` initialises this model wrongly but loads it correctly.
    """
    # Only this function needs the package.
    from transformers import ViTMAEConfig, ViTMAEForPreTraining  # noqa: PLC0415

    encoder: Any = model.encoder
    decoder: Any = model.decoder
    projection, block, decoder_block = encoder.patch_embed.proj, encoder.blocks[0], decoder.decoder_blocks[0]
    config = ViTMAEConfig(
        hidden_size=projection.out_channels,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        decoder_hidden_size=decoder.decoder_embed.out_features,
        decoder_num_hidden_layers=len(decoder.decoder_blocks),
        decoder_num_attention_heads=decoder_block.attn.num_heads,
        decoder_intermediate_size=decoder_block.mlp.fc1.out_features,
        image_size=model.grid[0] * model.patch_size[0],
        patch_size=model.patch_size[0],
        num_channels=projection.in_channels,
        # The number of kept patches is rounded down; half a patch more makes it ours in spite of rounding errors.
        mask_ratio=1 - (model.kept + 0.5) / model.patches,
        norm_pix_loss=model.norm_pix_loss,
        layer_norm_eps=NORM_EPS,
    )
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        save_file(published_weights(model), Path(name) / "model.safetensors", metadata={"format": "pt"})
        theirs, report = ViTMAEForPreTraining.from_pretrained(
            name, attn_implementation=attention, output_loading_info=True
        )
    assert not any(report.values()), report
    model_of_theirs: nn.Module = theirs
    return model_of_theirs
