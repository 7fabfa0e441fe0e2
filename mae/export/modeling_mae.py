"""Image classifier: a vision transformer whose head reads the cls token, the mean of the patch tokens, or both.

Load it with `AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MaeClassifierConfig(PretrainedConfig):
    """Sizes of the transformer, tokens that its head reads (`cls`, `avg` or `cls+avg`), and kind of head."""

    model_type = "mae_classifier"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        image_size: int | list[int] = 224,
        patch_size: int | list[int] = 16,
        num_channels: int = 3,
        layer_norm_eps: float = 1e-6,
        pool: Literal["cls", "avg", "cls+avg"] = "cls",
        head: Literal["linear", "mlp"] = "linear",
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.layer_norm_eps = layer_norm_eps
        self.pool = pool
        self.head = head
        super().__init__(**kwargs)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: MaeClassifierConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what each token reads from all: [batch tokens width] -> the same."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value)
        return self.proj(read.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block that norms before attention and before the MLP."""

    def __init__(self, config: MaeClassifierConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after this block: [batch tokens width] -> the same."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Module):
    """Linear layer over the pixels of each patch."""

    def __init__(self, config: MaeClassifierConfig) -> None:
        super().__init__()
        patch = pair(config.patch_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Return one token per patch, row by row: [batch channels height width] -> [batch patches width]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class MaeClassifier(PreTrainedModel):
    """Vision transformer with a classification head."""

    config_class = MaeClassifierConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]  # noqa: RUF012 (as in transformers)
    _supports_sdpa = True

    def __init__(self, config: MaeClassifierConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        (height, image_width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
        patches = (height // patch_height) * (image_width // patch_width)
        self.image_size = (height, image_width)
        self.num_labels = config.num_labels
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        # The mean of the patch tokens is normed after it is taken, unless the head reads the cls token too.
        self.norm = nn.Identity() if config.pool == "avg" else nn.LayerNorm(width, eps)
        self.fc_norm = nn.LayerNorm(width, eps) if config.pool == "avg" else nn.Identity()
        features = 2 * width if config.pool == "cls+avg" else width
        is_mlp, classes = config.head == "mlp", config.num_labels
        self.head = mlp(features, width, classes) if is_mlp else nn.Linear(features, classes)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: Any
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Return the logits of normalised images [batch channels height width], and the loss if there are labels."""
        if tuple(pixel_values.shape[2:]) != self.image_size:
            raise ValueError(f"images are {tuple(pixel_values.shape[2:])}, this model reads {self.image_size}")
        patches = self.patch_embed(pixel_values.to(self.cls_token.dtype))
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        logits = self.head(self.pool(self.norm(tokens)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def pool(self, tokens: Tensor) -> Tensor:
        """Return what the head reads: [batch tokens width] -> [batch features]."""
        cls_token, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
        if self.config.pool == "cls+avg":
            return torch.cat([cls_token, mean], dim=1)
        return self.fc_norm(mean) if self.config.pool == "avg" else cls_token


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return two linear layers with a GELU between them."""
    layers = OrderedDict[str, nn.Module](fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, out))
    return nn.Sequential(layers)


def pair(size: int | list[int]) -> tuple[int, int]:
    """Return height and width of a size, of which one number may be given."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
