"""Transformer blocks of the decoders, their starting weights, and how many operations they take."""

from functools import partial

from jaxtyping import Float, Int64
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from mae.models.patches import take

layer_norm = partial(nn.LayerNorm, eps=1e-6)
"""Layer norm with the epsilon of the encoder and of all published weights."""

_MLP_RATIO = 4


class DecoderBlock(Block):  # type: ignore[misc]  # timm is not typed
    """timm's block of self-attention, which can compute some tokens only; of the others it needs keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qkv_bias=True, norm_layer=layer_norm)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], ids: Int64[Tensor, "batch taken"] | None = None
    ) -> Float[Tensor, "batch out width"]:
        """Return all tokens, or those at `ids`, which have the same values either way."""
        if ids is None:
            everything: Tensor = super().forward(tokens)
            return everything
        normed = self.norm1(tokens)
        qkv, width = self.attn.qkv, tokens.shape[2]
        query = functional.linear(take(normed, ids), qkv.weight[:width], qkv.bias[:width])
        key_value = functional.linear(normed, qkv.weight[width:], qkv.bias[width:])
        taken = take(tokens, ids) + self.attn.proj(attend(query, key_value, self.attn.num_heads))
        done: Tensor = taken + self.mlp(self.norm2(taken))
        return done


class CrossAttention(nn.Module):
    """Attention from one sequence to another, which may have another width."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], memory: Float[Tensor, "batch visible memory_width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return for each token what it gathers from `memory`."""
        gathered: Tensor = self.proj(attend(self.q(tokens), self.kv(memory), self.heads))
        return gathered


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens attend to the memory, not to each other (CrossMAE, arXiv 2401.14391)."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.cross_attn = CrossAttention(width, heads, memory_width)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, _MLP_RATIO * width)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], memory: Float[Tensor, "batch visible memory_width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after attention to `memory`, which is normed already, and the MLP."""
        tokens = tokens + self.cross_attn(self.norm1(tokens), memory)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens


def attend(
    query: Float[Tensor, "batch tokens width"], key_value: Float[Tensor, "batch memory 2*width"], heads: int
) -> Float[Tensor, "batch tokens width"]:
    """Return multi-head attention of projected queries to projected keys and values, keys first, by torch's kernels."""
    batch, tokens, width = query.shape
    q = query.view(batch, tokens, heads, width // heads).transpose(1, 2)
    k, v = key_value.view(batch, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def init_weights(module: nn.Module) -> None:
    """Initialise a layer: Xavier-uniform linear weights and zero biases (arXiv 2111.06377, appendix A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """Count the operations of a linear layer: two per multiply-add."""
    return 2 * tokens * inputs * outputs


def block_flops(tokens: int, memory: int, width: int, memory_width: int) -> int:
    """Count the operations of a block: attention of `tokens` to a `memory` of tokens of `memory_width`, and an MLP."""
    queries_and_outputs = 2 * linear_flops(tokens, width, width)
    keys_and_values = linear_flops(memory, memory_width, 2 * width)
    scores_and_sums = 2 * linear_flops(tokens, width, memory)
    mlp = 2 * linear_flops(tokens, width, _MLP_RATIO * width)
    return queries_and_outputs + keys_and_values + scores_and_sums + mlp
