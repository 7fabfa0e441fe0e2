"""Parts of other vision transformers that our encoder does not have, by the names of their tensors."""

import re
from collections.abc import Iterable

from mae.errors import UserError, first_of

# What names contain, and what that is.
_PARTS = (
    (r"\.ls[12]\.|gamma_[12]$|layer_scale|lambda_?1$", "LayerScale"),
    (r"^(reg_token|register_tokens|embeddings\.register)|storage_tokens", "register tokens"),
    (r"rope|rotary|freqs_cis", "rotary positions (RoPE)"),
    (r"dist_token|distillation_token|head_dist|distillation_classifier", "a distillation token"),
    (r"^norm_pre\.|pre_layrnorm|ln_pre", "a norm before its blocks"),
    (r"(q_norm|k_norm)\.", "norms of queries and keys"),
    (r"(relative_position|rel_pos)", "relative positions"),
    (r"attn\.(q_bias|v_bias)$", "separate biases of queries and values"),
    (r"^attn_pool\.|^probe$", "pooling by attention"),
    (r"patch_embed\.(backbone|norm|proj\.[0-9]|proj[0-9])|patch_embeddings\.backbone|conv_proj\.[0-9]|conv_bn_relu",
     "an embedding of patches by several layers"),
    (r"mlp\.(w[0-9]+|fc1_[gx]|norm|gate)|mlp\.(weights_(in|out))", "gated layers (SwiGLU)"),
    (r"attn\.norm\.|mlp\.norm\.", "norms within its blocks"),
)  # fmt: skip
_NO_PART = (
    ("cls_token", "no class token"),
    ("pos_embed", "no table of positions"),
    ("blocks.0.attn.qkv.bias", "queries, keys and values without a bias"),
    ("patch_embed.proj.bias", "an embedding of patches without a bias"),
)


def parts_unlike_ours(names: Iterable[str]) -> list[str]:
    """Return in words what the tensors with these names, of another library, are that our encoder does not have."""
    given = list(names)
    found = ((next((name for name in given if re.search(pattern, name)), None), part) for pattern, part in _PARTS)
    return [f"{part} ({name})" for name, part in found if name is not None]


def require_plain(ours: Iterable[str], unknown: Iterable[str], source: str) -> None:
    """Raise a `UserError` that names the parts which our encoder does not have, or which it needs.

    Args:
        ours: Names of the tensors that our encoder has a place for, by our names.
        unknown: Names of the others in the file, without those that may be left behind.
        source: Place of the file.
    """
    known, others = set(ours), list(unknown)
    unlike = parts_unlike_ours(others) + [part for name, part in _NO_PART if name not in known]
    if unlike:
        raise UserError(f"{source} is not a plain ViT: it has {first_of(unlike, separator=', ')}; give another model")
    if others:
        raise UserError(
            f"{source} is not a plain ViT: it has tensors that are not known ({first_of(others, separator=', ')}); "
            "give another model"
        )
