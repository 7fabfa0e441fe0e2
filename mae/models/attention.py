"""Attention weights of one block of an encoder."""

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def attention_weights(
    encoder: VisionTransformer, images: Float[Tensor, "batch channels height width"], block: int = -1
) -> Float[Tensor, "batch heads tokens tokens"]:
    """Return how much each token (first axis of the two) attends to each other token, in one block.

    The weights are softmax(q k^T / sqrt(head width)) of arXiv 1706.03762, and each row sums to 1. They are computed a
    second time from the block's input, because fused attention does not give them.
    """
    attention = encoder.blocks[block].attn
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        encoder.forward_features(images)
    finally:
        hook.remove()
    batch, tokens, width = inputs[0].shape
    heads = attention.num_heads
    qkv = attention.qkv(inputs[0]).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    weights: Tensor = torch.softmax(query * attention.scale @ key.transpose(-2, -1), dim=-1)
    return weights
