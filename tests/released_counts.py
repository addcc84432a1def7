"""The shapes of the released networks: name → shape for one block and for a whole network, from the papers' tables.

`parameters(shapes)` counts them.  The names of a block's shapes are the arguments of its function in `released`.
Images are 224 x 224 with three channels and 1000 classes unless said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def within(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def stacked(prefix: str, layers: int, shapes: Shapes) -> Shapes:
    return {k: v for i in range(layers) for k, v in within(f"{prefix}.{i}", shapes).items()}


def norm(name: str, d: int) -> Shapes:
    return {f"{name}_w": (d,), f"{name}_b": (d,)}


def linear(name: str, d_in: int, d_out: int) -> Shapes:
    return {f"W_{name}": (d_out, d_in), f"b_{name}": (d_out,)}


# ---------------------------------------------------------------- blocks: the arguments of the functions in `released`


def crate_block(d: int, K: int, p: int) -> Shapes:
    return norm("norm1", d) | {"U": (K, d, p)} | linear("out", K * p, d) | norm("norm2", d) | {"D": (d, d)}


def crate_alpha_block(d: int, K: int, p: int, s: int) -> Shapes:
    attention = {"U": (K, d, p), "W_out": (d, K * p)}
    return norm("norm1", d) | attention | norm("norm2", d) | {"D": (d, s), "D_hat": (d, s)}


def mae_decoder_layer(d: int, K: int, p: int) -> Shapes:
    return norm("norm1", d) | {"D": (d, d)} | norm("norm2", d) | {"U": (K, d, p)} | linear("out", K * p, d)


def tost_attention(d: int, K: int, p: int) -> Shapes:
    return {"U": (K, d, p), "b_qkv": (K, p), "temp": (K,)} | linear("out", K * p, d)


def tost_causal_attention(d: int, K: int, p: int, T: int) -> Shapes:
    return tost_attention(d, K, p) | {"b_denom": (K, T)}


def gelu_mlp(d: int) -> Shapes:
    return norm("norm2", d) | linear("up", d, 4 * d) | linear("down", 4 * d, d) | {"gamma2": (d,)}


def tost_block(d: int, K: int, p: int) -> Shapes:
    return norm("norm1", d) | tost_attention(d, K, p) | {"gamma1": (d,)} | gelu_mlp(d)


def tost_causal_block(d: int, K: int, p: int, T: int) -> Shapes:
    return norm("norm1", d) | tost_causal_attention(d, K, p, T) | {"gamma1": (d,)} | gelu_mlp(d)


def class_attention_block(d: int) -> Shapes:
    """Attention of the class token over all tokens: one map to q, k and v, one map out, biases, and the MLP."""
    return norm("norm1", d) | linear("qkv", d, 3 * d) | linear("out", d, d) | {"gamma1": (d,)} | gelu_mlp(d)


def redunet_layer(d: int, K: int) -> Shapes:
    return {"E": (d, d), "C": (K, d, d), "gamma": (K,)}


# ---------------------------------------------------------------- whole networks


def head(d: int, classes: int) -> Shapes:
    return norm("head_norm", d) | linear("head", d, classes)


def crate(d: int, layers: int, K: int, patch: int = 16, classes: int = 1000, image: int = 224) -> Shapes:
    """LN → linear → LN of the patches, class token and positions, the blocks, LN and linear of the class token."""
    pixels, N = 3 * patch**2, (image // patch) ** 2
    embedding = norm("patch_norm", pixels) | linear("patch", pixels, d) | norm("token_norm", d)
    tokens = {"class_token": (1, d), "positions": (N + 1, d)}
    return embedding | tokens | stacked("layer", layers, crate_block(d, K, d // K)) | head(d, classes)


def crate_alpha(d: int, layers: int, K: int, patch: int = 16, classes: int = 1000, image: int = 224) -> Shapes:
    """Patches by a convolution with bias, no norm of the patches; s = 4d atoms."""
    embedding = linear("patch", 3 * patch**2, d)
    tokens = {"class_token": (1, d), "positions": ((image // patch) ** 2 + 1, d)}
    return embedding | tokens | stacked("layer", layers, crate_alpha_block(d, K, d // K, 4 * d)) | head(d, classes)


def crate_mae(d: int, layers: int, K: int, patch: int = 16, image: int = 224) -> Shapes:
    """Encoder and decoder of equal depth and width; `pretoken` and `positions` are in the checkpoint, but not used."""
    pixels, N = 3 * patch**2, (image // patch) ** 2
    encoder = linear("patch", pixels, d) | stacked("encoder", layers, crate_block(d, K, d // K)) | norm("norm", d)
    decoder = stacked("decoder", layers, mae_decoder_layer(d, K, d // K)) | norm("decoder_norm", d)
    tokens = {"class_token": (1, d), "mask_token": (1, d), "positions": (N + 1, d), "decoder_positions": (N + 1, d)}
    return encoder | decoder | tokens | linear("pretoken", d, d) | linear("pixels", d, pixels)


def conv_stem(d: int) -> Shapes:
    """Four 3 x 3 convolutions of stride two without bias, each with a batch norm: 3 → d/8 → d/4 → d/2 → d."""
    widths = (3, d // 8, d // 4, d // 2, d)
    pairs = enumerate(pairwise(widths))
    return {k: v for i, (a, b) in pairs for k, v in ({f"stem{i}": (b, a, 3, 3)} | norm(f"stem_norm{i}", b)).items()}


def tost(d: int, layers: int, K: int, classes: int = 1000) -> Shapes:
    """Convolution stem, Fourier positions (2 x 32 features, a linear map), the blocks, two class-attention blocks."""
    tokens = conv_stem(d) | linear("positions", 64, d) | {"class_token": (1, d)}
    blocks = stacked("layer", layers, tost_block(d, K, d // K)) | stacked("class", 2, class_attention_block(d))
    return tokens | blocks | head(d, classes)


def tost_language(d: int, layers: int, K: int, vocabulary: int = 50304, context: int = 1024) -> Shapes:
    """Token embedding tied to the head, the causal blocks, a last norm; positions (context, d) are not counted here."""
    blocks = stacked("layer", layers, tost_causal_block(d, K, d // K, context))
    return {"tokens": (vocabulary, d)} | blocks | norm("norm", d)


CRATE = {"tiny": (384, 12, 6), "small": (576, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}
CRATE_ALPHA = {
    "tiny": (192, 12, 3),
    "small": (576, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
CRATE_MAE = {"small": (576, 12, 12), "base": (768, 12, 12)}
TOST = {"tiny": (192, 12, 4), "small": (384, 12, 8), "medium": (512, 24, 8), "large": (768, 24, 16)}
TOST_LANGUAGE = {"base": (768, 12, 12), "medium": (1024, 24, 16)}
"""Name → (width d, layers, heads K)."""

PUBLISHED = {
    "crate tiny": (crate(*CRATE["tiny"]), 6_090_856, 6.09),
    "crate small": (crate(*CRATE["small"]), 13_116_328, 13.12),
    "crate base": (crate(*CRATE["base"]), 22_796_008, 22.80),
    "crate large": (crate(*CRATE["large"]), 77_641_192, 77.64),
    "crate-alpha base/16": (crate_alpha(*CRATE_ALPHA["base"]), 72_328_936, 72.33),
    "crate-alpha large/14": (crate_alpha(*CRATE_ALPHA["large"], patch=14), 253_650_920, 253.65),
    "crate-mae small": (crate_mae(*CRATE_MAE["small"]), 25_405_824, 25.406),
    "crate-mae base": (crate_mae(*CRATE_MAE["base"]), 44_638_464, 44.638),
    "tost tiny": (tost(*TOST["tiny"]), 5_769_328, 5.77),
    "tost small": (tost(*TOST["small"]), 22_589_944, 22.59),
    "tost medium": (tost(*TOST["medium"]), 71_481_064, 71.48),
    "tost large": (tost(*TOST["large"]), 160_286_920, 160.29),
    "tost language base": (tost_language(*TOST_LANGUAGE["base"]), 109_681_296, 109.68),
    "tost language medium": (tost_language(*TOST_LANGUAGE["medium"]), 303_884_672, 303.88),
}
"""Network → (its shapes, their exact count, the published figure in millions)."""
