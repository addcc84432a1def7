"""The white-box networks as they were released, and the formulas that they come from, written out by hand.

Plain functions on tensors: the answer that what the compiler emits is held against.  Nothing here imports `unroll`.
Tokens are rows.  d features, N tokens, K heads or classes of width p, s atoms, m samples; `...` any batch.
  x, z    (..., N, d)     tokens                          U       (K, d, p)   one basis per head, U_k
  D       (d, s)          dictionary, one atom a column   W_out   (d, K p)    output map, head k in columns kp:(k+1)p
In formulas tokens are columns, as in the papers: Z = zᵀ.  `eps2` is always the ε² of the papers.
Each function says which formula it is; where the released network differs from the derived one, it is the released one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# ---------------------------------------------------------------- rates and their gradients


def half_logdet(gram: Tensor, weight: float | Tensor) -> Tensor:
    """½ logdet(I + weight·gram) of a symmetric positive semidefinite (..., n, n); returns (...)."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(eye + weight * gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def coding_rate(z: Tensor, eps2: float) -> Tensor:
    """R(Z) = ½ logdet(I + d/(Nε²) ZZᵀ), on the smaller side.  z (..., N, d); returns (...)."""
    N, d = z.shape[-2:]
    return half_logdet(z.mT @ z if d <= N else z @ z.mT, d / (N * eps2))


def coding_rate_gradient(z: Tensor, eps2: float) -> Tensor:
    """∇R(Z) = α(I + αZZᵀ)⁻¹Z, α = d/(Nε²).  z (..., N, d)."""
    N, d = z.shape[-2:]
    a = d / (N * eps2)
    return z @ (a * torch.linalg.inv(torch.eye(d, dtype=z.dtype) + a * z.mT @ z))


def class_rate(z: Tensor, members: Tensor, eps2: float) -> Tensor:
    """R^c(Z|Π) = Σ_k tr(Π_k)/(2N) logdet(I + d/(tr(Π_k)ε²) ZΠ_kZᵀ).

    z (N, d).  members (N, K), entry (i, k) = (Π_k)_ii ≥ 0: one-hot labels or soft memberships.  Returns ().
    """
    N, d = z.shape
    grams = torch.einsum("nd,nk,ne->kde", z, members, z)
    size = members.sum(0)
    return (size / N * half_logdet(grams, (d / (size * eps2))[:, None, None])).sum()


def class_rate_gradient(z: Tensor, members: Tensor, eps2: float) -> Tensor:
    """∇R^c(Z|Π) = Σ_k γ_k C_k Z Π_k, γ_k = tr(Π_k)/N, C_k = α_k(I + α_kZΠ_kZᵀ)⁻¹, α_k = d/(tr(Π_k)ε²).  z (N, d)."""
    N, d = z.shape
    out = torch.zeros_like(z)
    for pi in members.mT:
        a = d / (pi.sum() * eps2)
        C = a * torch.linalg.inv(torch.eye(d, dtype=z.dtype) + a * (pi[:, None] * z).mT @ z)
        out = out + pi.sum() / N * pi[:, None] * (z @ C)
    return out


def subspace_rate(z: Tensor, U: Tensor, eps2: float) -> Tensor:
    """R^c(Z|U) = ½ Σ_k logdet(I_N + c (U_kᵀZ)ᵀ(U_kᵀZ)), c = p/(Nε²).  z (..., N, d), U (K, d, p); returns (...)."""
    return coding_rate(in_heads(z, U), eps2).sum(-1)


def subspace_rate_gradient(z: Tensor, U: Tensor, eps2: float) -> Tensor:
    """∇R^c(Z|U) = c Σ_k U_k U_kᵀZ (I_N + c (U_kᵀZ)ᵀ(U_kᵀZ))⁻¹, the N x N form.  z (..., N, d)."""
    v = in_heads(z, U)
    N, p = v.shape[-2:]
    c = p / (N * eps2)
    return from_heads(c * torch.linalg.inv(torch.eye(N, dtype=z.dtype) + c * v @ v.mT) @ v, U)


def subspace_rate_gradient_small(z: Tensor, U: Tensor, eps2: float) -> Tensor:
    """The same after push-through: c Σ_k U_k (I_p + c (U_kᵀZ)(U_kᵀZ)ᵀ)⁻¹ U_kᵀZ.  z (..., N, d)."""
    v = in_heads(z, U)
    N, p = v.shape[-2:]
    c = p / (N * eps2)
    return from_heads(c * v @ torch.linalg.inv(torch.eye(p, dtype=z.dtype) + c * v.mT @ v), U)


def subspace_rate_gradient_neumann(z: Tensor, U: Tensor, eps2: float) -> Tensor:
    """First order of the inverse: c Σ_k U_k U_kᵀZ (I − c (U_kᵀZ)ᵀ(U_kᵀZ)); means something only if c‖U_kᵀZ‖² < 1."""
    v = in_heads(z, U)
    N, p = v.shape[-2:]
    c = p / (N * eps2)
    return from_heads(c * v - c**2 * v @ (v.mT @ v), U)


def variational_rate(z: Tensor, U: Tensor, members: Tensor) -> Tensor:
    """R^var(Z, Π) = ½ Σ_k (N_k/N) Σ_i log(1 + (1/N_k)(U_kᵀZ Diag(π_k) ZᵀU_k)_ii), N_k = ⟨π_k, 1⟩.

    z (N, d), U (K, d, p), members (K, N): rows are π_k.  Returns ().
    """
    size = members.sum(-1)
    moments = torch.einsum("knp,kn->kp", in_heads(z, U) ** 2, members) / size[:, None]
    return 0.5 * (size / z.shape[0] * torch.log1p(moments).sum(-1)).sum()


# ---------------------------------------------------------------- what the transformers share


def in_heads(z: Tensor, U: Tensor) -> Tensor:
    """U_kᵀz of every token: (..., N, d), (K, d, p) → (..., K, N, p)."""
    return torch.einsum("...nd,kdp->...knp", z, U)


def from_heads(v: Tensor, U: Tensor) -> Tensor:
    """Σ_k U_k v_k of every token: (..., K, N, p), (K, d, p) → (..., N, d)."""
    return torch.einsum("...knp,kdp->...nd", v, U)


def side_by_side(v: Tensor) -> Tensor:
    """The heads of a token one after another: (..., K, N, p) → (..., N, K p)."""
    return v.transpose(-3, -2).flatten(-2)


def bases(W: Tensor, K: int) -> Tensor:
    """The U_k in a released map W (K p, d), rows kp:(k+1)p of which are U_kᵀ; returns (K, d, p)."""
    return W.unflatten(0, (K, -1)).mT


def layer_norm(z: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """(z − mean z)/√(var z + eps) ⊙ w + b over the features, with the biased variance.  w, b (d,) or ()."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * w + b


def mssa(y: Tensor, U: Tensor, W_out: Tensor | None, b_out: Tensor | None = None, causal: bool = False) -> Tensor:
    """W_out concat_k[V_k softmax_col(p^{-1/2} V_kᵀV_k)] + b_out 1ᵀ, V_k = U_kᵀY: queries, keys and values are one.

    y (..., N, d).  causal: token i attends to tokens j ≤ i only.  W_out None: no output map (one head, p = d).
    """
    v = in_heads(y, U)
    logits = v @ v.mT / v.shape[-1] ** 0.5
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=y.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    heads = side_by_side(weights / weights.sum(-1, keepdim=True) @ v)
    out = heads if W_out is None else heads @ W_out.mT
    return out if b_out is None else out + b_out


def ista_step(x: Tensor, D: Tensor, eta: float, lam: float) -> Tensor:
    """ReLU(X − ηDᵀ(DX − X) − ηλ): one step on ½‖X − DA‖² + λ‖A‖₁, A ≥ 0, from A = X.  x (..., N, d), D (d, d)."""
    residual = x @ D.mT - x
    return (x - eta * residual @ D - eta * lam).clamp_min(0)


# ---------------------------------------------------------------- CRATE and its relatives


def crate_block(
    x: Tensor,
    norm1_w: Tensor,
    norm1_b: Tensor,
    U: Tensor,
    W_out: Tensor | None,
    b_out: Tensor | None,
    norm2_w: Tensor,
    norm2_b: Tensor,
    D: Tensor,
    eta: float = 0.1,
    lam: float = 0.1,
    causal: bool = False,
) -> Tensor:
    """Z½ = Z + MSSA(LN₁ Z | U, W_out, b_out);  Z⁺ = ISTA(LN₂ Z½ | D), which has no residual around it.

    x (..., N, d), norms (d,), U (K, d, p), W_out (d, K p), b_out (d,), D (d, d); returns (..., N, d), ≥ 0.
    """
    half = x + mssa(layer_norm(x, norm1_w, norm1_b), U, W_out, b_out, causal)
    return ista_step(layer_norm(half, norm2_w, norm2_b), D, eta, lam)


def crate_causal_block(x: Tensor, **parameters: Tensor) -> Tensor:
    """`crate_block` whose softmax runs over past tokens only; the parameters are the same."""
    return crate_block(x, **parameters, causal=True)


def crate_alpha_block(
    x: Tensor,
    norm1_w: Tensor,
    norm1_b: Tensor,
    U: Tensor,
    W_out: Tensor,
    norm2_w: Tensor,
    norm2_b: Tensor,
    D: Tensor,
    D_hat: Tensor,
    eta: float = 0.1,
    lam: float = 0.1,
    steps: int = 2,
) -> Tensor:
    """Z½ = Z + MSSA(LN₁ Z) with no biases;  Z⁺ = Z½ + D̂A^T, A^{t+1} = ReLU(A^t − ηDᵀ(DA^t − LN₂ Z½) − ηλ), A⁰ = 0.

    x (..., N, d), U (K, d, p), W_out (d, K p), D and D_hat (d, s); T = steps; layer norms with eps 1e-6.
    """
    half = x + mssa(layer_norm(x, norm1_w, norm1_b, 1e-6), U, W_out)
    y = layer_norm(half, norm2_w, norm2_b, 1e-6)
    code = y.new_zeros(*y.shape[:-1], D.shape[1])
    for _ in range(steps):
        code = (code - eta * (code @ D.mT - y) @ D - eta * lam).clamp_min(0)
    return half + code @ D_hat.mT


def mae_decoder_layer(
    x: Tensor,
    norm1_w: Tensor,
    norm1_b: Tensor,
    D: Tensor,
    norm2_w: Tensor,
    norm2_b: Tensor,
    U: Tensor,
    W_out: Tensor,
    b_out: Tensor,
) -> Tensor:
    """Z½ = D LN₁(Z), no residual;  Z⁺ = Z½ − MSSA(LN₂ Z½).  x (..., N, d), D (d, d), U (K, d, p), W_out (d, K p)."""
    half = layer_norm(x, norm1_w, norm1_b) @ D.mT
    return half - mssa(layer_norm(half, norm2_w, norm2_b), U, W_out, b_out)


def sines_of_places(side: int, d: int) -> Tensor:
    """The fixed positions of masked autoencoders: (1, 1 + side², d), 0 for the class token; of a patch at (row, column)
    sines and cosines of ω·column, then of ω·row, ω_i = 10000^(−4i/d)."""
    out = torch.zeros(1, 1 + side * side, d, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            angles = [[x * 10000 ** (-4 * i / d) for i in range(d // 4)] for x in (column, row)]
            waves = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            out[0, 1 + row * side + column] = torch.tensor(waves, dtype=torch.float64)
    return out


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean square error over the masked patches alone.  prediction, target (B, N, q), mask (B, N) of 0 and 1."""
    return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()


def aot_step(z: Tensor, U: Tensor, eta: float, tau: float) -> Tensor:
    """Z + η Σ_k U_k V_k φ(V_kᵀV_k), V_k = U_kᵀZ, φ = τ1{softmax_col > τ}: attention alone.  z (N, d), U (K, d, p)."""
    v = in_heads(z, U)
    gate = tau * (torch.softmax(v @ v.mT, -1) > tau).to(z.dtype)
    return z + eta * from_heads(gate @ v, U)


# ---------------------------------------------------------------- ToST


def tost_attention(
    y: Tensor,
    U: Tensor,
    b_qkv: Tensor,
    temp: Tensor,
    W_out: Tensor,
    b_out: Tensor,
    eps: float = 1e-8,
) -> Tensor:
    """TSSA = −W_out concat_k[D_k W_k Diag(π_k)] + b_out, W_k = U_kᵀY + b_k, with

    Π = softmax_k(temp_k Σ_i (W_k,ij/‖W_k,i·‖)²), every coordinate i normalised over the tokens j,
    D_k = Diag(1/(1 + W_k^{⊙2} π_k/(⟨π_k, 1⟩ + eps))).
    y (..., N, d), U (K, d, p), b_qkv (K, p), temp (K,), W_out (d, K p), b_out (d,); returns (..., N, d).
    """
    w = in_heads(y, U) + b_qkv[:, None, :]
    unit = w / torch.sqrt((w**2).sum(-2, keepdim=True)).clamp_min(1e-12)
    members = torch.softmax(temp[:, None] * (unit**2).sum(-1), dim=-2)  # (..., K, N), sums to one over the heads
    moments = (members[..., None] * w**2).sum(-2) / (members.sum(-1, keepdim=True) + eps)
    heads = -w * members[..., None] / (1 + moments[..., None, :])
    return side_by_side(heads) @ W_out.mT + b_out


def tost_causal_attention(
    y: Tensor,
    U: Tensor,
    b_qkv: Tensor,
    temp: Tensor,
    b_denom: Tensor,
    W_out: Tensor,
    b_out: Tensor,
    eps: float = 1e-8,
) -> Tensor:
    """TSSA where every sum over tokens runs to the token itself, its norm and its second moment alike:

    Π_k,t = softmax_k(temp_k Σ_i [W_k,it²/Σ_{j≤t} W_k,ij² + b_denom_k,t]),
    out_t = −W_out concat_k[W_k,t Π_k,t/(1 + Σ_{j≤t} Π_k,j W_k,j²/(Σ_{j≤t} Π_k,j + eps))] + b_out.
    y (..., N, d), U (K, d, p), b_qkv (K, p), temp (K,), b_denom (K, T) with T ≥ N: an offset per position.
    """
    w = in_heads(y, U) + b_qkv[:, None, :]
    share = w**2 / (w**2).cumsum(-2).clamp_min(1e-12) + b_denom[:, : w.shape[-2], None]
    members = torch.softmax(temp[:, None] * share.sum(-1), dim=-2)[..., None]  # (..., K, N, 1)
    moments = (w**2 * members).cumsum(-2) / (members.cumsum(-2) + eps)
    return side_by_side(-w * members / (1 + moments)) @ W_out.mT + b_out


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the normal distribution function."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def tost_block(
    x: Tensor,
    norm1_w: Tensor,
    norm1_b: Tensor,
    U: Tensor,
    b_qkv: Tensor,
    temp: Tensor,
    W_out: Tensor,
    b_out: Tensor,
    gamma1: Tensor,
    norm2_w: Tensor,
    norm2_b: Tensor,
    W_up: Tensor,
    b_up: Tensor,
    W_down: Tensor,
    b_down: Tensor,
    gamma2: Tensor,
) -> Tensor:
    """Z½ = Z + γ₁ ⊙ TSSA(LN₁ Z);  Z⁺ = Z½ + γ₂ ⊙ MLP(LN₂ Z½), MLP = W_down GELU(W_up · + b_up) + b_down.

    x (..., N, d), W_up (4d, d), W_down (d, 4d), gammas (d,), layer norms with eps 1e-6, the rest as `tost_attention`.
    """
    half = x + gamma1 * tost_attention(layer_norm(x, norm1_w, norm1_b, 1e-6), U, b_qkv, temp, W_out, b_out)
    y = layer_norm(half, norm2_w, norm2_b, 1e-6)
    return half + gamma2 * (gelu(y @ W_up.mT + b_up) @ W_down.mT + b_down)


# ---------------------------------------------------------------- whole networks, from their state dicts

State = Mapping[str, Tensor]


def part(w: State, prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


def depth(w: State, prefix: str) -> int:
    """How many layers are numbered after the prefix."""
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in w if k.startswith(prefix))


def tost_stem(w: State, images: Tensor) -> Tensor:
    """Convolutions 3 x 3 of stride 2, each with a batch norm by its running statistics, GELU between: (B, d, H/16, W/16)."""
    x = images
    for i in range(0, depth(w, "patch_embed.proj."), 2):
        x = gelu(x) if i else x
        x = F.conv2d(x, w[f"patch_embed.proj.{i}.0.weight"], stride=2, padding=1)
        n = part(w, f"patch_embed.proj.{i}.1.")
        mean, var, scale, bias = (n[k][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean) / torch.sqrt(var + 1e-5) * scale + bias
    return x


def fourier_places(rows: int, columns: int, waves: int = 32) -> Tensor:
    """(rows, columns, 2 waves): of the row, then of the column, wave i of place j of n (from 1) is

    sin(2πj/(n + 1e-6)/10000^(i/waves)) for even i, cos of the wave before for odd i.
    """

    def wave(j: int, n: int, i: int) -> float:
        angle = 2 * math.pi * j / (n + 1e-6) / 10000 ** ((i - i % 2) / waves)
        return math.cos(angle) if i % 2 else math.sin(angle)

    out = torch.empty(rows, columns, 2 * waves, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            of_row = [wave(r + 1, rows, i) for i in range(waves)]
            of_both = of_row + [wave(c + 1, columns, i) for i in range(waves)]
            out[r, c] = torch.tensor(of_both, dtype=torch.float64)
    return out


def class_attention(x: Tensor, w: State, K: int) -> Tensor:
    """The class token, first of x (B, 1 + N, d), reads all tokens: softmax(q_k·K_k/√p)V_k of each head, and a map."""
    q, keys, values = (t.unflatten(-1, (K, -1)) for t in (x @ w["qkv.weight"].mT + w["qkv.bias"]).chunk(3, -1))
    logits = torch.einsum("bkp,bnkp->bkn", q[:, 0], keys) / q.shape[-1] ** 0.5
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    read = torch.einsum("bkn,bnkp->bkp", weights / weights.sum(-1, keepdim=True), values).flatten(1)
    return read @ w["proj.weight"].mT + w["proj.bias"]


def class_attention_block(x: Tensor, w: State, K: int) -> Tensor:
    """Y = LN₁ X, X½ = LN₂(X + γ₁ ⊙ [attention of the class token, the others of Y]);  X⁺ = X½ + [γ₂ ⊙ MLP(class), the others of X½]."""
    y = layer_norm(x, w["norm1.weight"], w["norm1.bias"], 1e-6)
    update = torch.cat([class_attention(y, part(w, "attn."), K)[:, None], y[:, 1:]], 1)
    half = layer_norm(x + w["gamma1"] * update, w["norm2.weight"], w["norm2.bias"], 1e-6)
    first = gelu(half[:, :1] @ w["mlp.fc1.weight"].mT + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].mT + w["mlp.fc2.bias"]
    return half + torch.cat([w["gamma2"] * first, half[:, 1:]], 1)


def tost_classifier(images: Tensor, w: State, K: int) -> Tensor:
    """Stem, Fourier positions, `tost_block`s, then a class token and its blocks, a norm and a linear map: (B, classes)."""
    x = tost_stem(w, images)
    places = fourier_places(*x.shape[-2:]).to(x)
    places = places @ w["pos_embeder.token_projection.weight"].flatten(1).mT + w["pos_embeder.token_projection.bias"]
    x = (x.movedim(1, -1) + places).flatten(1, 2)
    for i in range(depth(w, "blocks.")):
        b = part(w, f"blocks.{i}.")
        x = tost_block(
            x, b["norm1.weight"], b["norm1.bias"], bases(b["attn.qkv.weight"], K), b["attn.qkv.bias"].unflatten(0, (K, -1)),
            b["attn.temp"][:, 0], b["attn.to_out.0.weight"], b["attn.to_out.0.bias"], b["gamma1"], b["norm2.weight"], b["norm2.bias"],
            b["mlp.fc1.weight"], b["mlp.fc1.bias"], b["mlp.fc2.weight"], b["mlp.fc2.bias"], b["gamma2"],
        )  # fmt: skip
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], 1)
    for i in range(depth(w, "cls_attn_blocks.")):
        x = class_attention_block(x, part(w, f"cls_attn_blocks.{i}."), K)
    return layer_norm(x, w["norm.weight"], w["norm.bias"], 1e-6)[:, 0] @ w["head.weight"].mT + w["head.bias"]


def tost_writer(words: Tensor, w: State, K: int) -> Tensor:
    """Table and positions, causal blocks with layer norms of eps 1e-5, a norm, the products with the table: (B, T, vocabulary)."""
    x = w["transformer.wte.weight"][words] + w["transformer.wpe.weight"][: words.shape[-1]]
    for i in range(depth(w, "transformer.h.")):
        b = part(w, f"transformer.h.{i}.")
        y = layer_norm(x, b["ln_1.weight"], b["ln_1.bias"])
        x = x + b["gamma1"] * tost_causal_attention(
            y, bases(b["attn.c_attn.weight"], K), b["attn.c_attn.bias"].unflatten(0, (K, -1)), b["attn.temp"][:, 0],
            b["attn.denom_bias"][..., 0], b["attn.c_proj.weight"], b["attn.c_proj.bias"],
        )  # fmt: skip
        y = layer_norm(x, b["ln_2.weight"], b["ln_2.bias"])
        y = gelu(y @ b["mlp.c_fc.weight"].mT + b["mlp.c_fc.bias"]) @ b["mlp.c_proj.weight"].mT + b["mlp.c_proj.bias"]
        x = x + b["gamma2"] * y
    return layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"]) @ w["lm_head.weight"].mT


# ---------------------------------------------------------------- ReduNet


def unit_rows(z: Tensor) -> Tensor:
    """z/‖z‖ of every row (…, d)."""
    return z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def redunet_operators(z: Tensor, members: Tensor, eps2: float) -> tuple[Tensor, Tensor, Tensor]:
    """E = α(I + αZZᵀ)⁻¹, C_k = α_k(I + α_kZΠ_kZᵀ)⁻¹, γ_k = N_k/N;  α = d/(Nε²), α_k = d/(N_kε²).

    z (N, d), members (N, K).  Returns E (d, d), C (K, d, d), gamma (K,).
    """
    N, d = z.shape
    eye, size = torch.eye(d, dtype=z.dtype, device=z.device), members.sum(0)
    a, a_k = d / (N * eps2), (d / (size * eps2))[:, None, None]
    grams = torch.einsum("nd,nk,ne->kde", z, members, z)
    return a * torch.linalg.inv(eye + a * z.mT @ z), a_k * torch.linalg.inv(eye + a_k * grams), size / N


def redunet_memberships(z: Tensor, C: Tensor, sharpness: float = 500.0) -> Tensor:
    """π_k(z) = softmax_k(−sharpness max(‖C_k z‖, 1e-8)).  z (..., N, d), C (K, d, d); returns (..., N, K)."""
    norms = torch.einsum("kde,...ne->...nkd", C, z).norm(dim=-1).clamp_min(1e-8)
    return torch.softmax(-sharpness * norms, -1)


def redunet_layer(
    z: Tensor,
    E: Tensor,
    C: Tensor,
    gamma: Tensor,
    eta: float = 0.5,
    sharpness: float = 500.0,
    members: Tensor | None = None,
) -> Tensor:
    """Z⁺ = P_S(Z + η(EZ − Σ_k γ_k C_k Z Diag(π_k))).

    z (..., N, d), E (d, d), C (K, d, d), gamma (K,).  members (..., N, K) known: projected gradient ascent on ΔR;
    None: the released forward, which estimates them from z itself.
    """
    pi = redunet_memberships(z, C, sharpness) if members is None else members
    compressed = torch.einsum("k,...nk,kde,...ne->...nd", gamma, pi, C, z)
    return unit_rows(z + eta * (z @ E.mT - compressed))


def redunet_construct(
    z: Tensor,
    members: Tensor,
    layers: int,
    eta: float = 0.5,
    eps2: float = 0.1,
    sharpness: float = 500.0,
    exact: bool = True,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Tensor]]:
    """Layer by layer: operators from the features at hand and the labels, then the features through the layer.

    z (N, d), members (N, K).  exact: the update uses the labels too (the gradient flow); else, as released, the
    memberships that it estimates.  Returns the layers' (E, C, gamma) and the features before the first and after each.
    """
    z = unit_rows(z)
    operators, features = [], [z]
    for _ in range(layers):
        operators.append(redunet_operators(z, members, eps2))
        z = redunet_layer(z, *operators[-1], eta, sharpness, members if exact else None)
        features.append(z)
    return operators, features


def redunet_spectral_operators(v: Tensor, members: Tensor, eps2: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """E(ω) = α(I + α·factor Σ_i v_i(ω)v_i(ω)ᴴ)⁻¹, C_k(ω) with Σ_i π_ik and α_k;  α = C/(mε²), α_k = C/(m_kε²).

    v (m, C, T) complex: orthonormal transforms of m signals of C channels (in two dimensions T = H W frequencies, in
    one row); members (m, K).  factor T: the operators of all cyclic shifts of the signals; 1: the released ones, whose
    ε² is T times larger so.  Returns E (T, C, C), C (K, T, C, C), gamma (K,).
    """
    m, channels, _ = v.shape
    eye, size = torch.eye(channels, dtype=v.dtype, device=v.device), members.sum(0)
    a, a_k = channels / (m * eps2), (channels / (size * eps2))[:, None, None, None]
    grams = factor * torch.einsum("mct,mk,met->ktce", v, members.to(v.dtype), v.conj())
    return a * torch.linalg.inv(eye + a * grams.sum(0)), a_k * torch.linalg.inv(eye + a_k * grams), size / m


def redunet_spectral_layer(
    v: Tensor, E: Tensor, C: Tensor, gamma: Tensor, eta: float = 0.5, sharpness: float = 500.0
) -> Tensor:
    """V⁺ = P_S(V + η(EV − Σ_k γ_k π_k ⊙ C_kV)) at every frequency; π_k = softmax_k(−sharpness ‖C_kV‖) over all of them.

    v (..., C, T) complex, the operators as `redunet_spectral_operators` returns them.
    """
    near = torch.einsum("ktce,...et->...kct", C, v)
    norms = torch.linalg.vector_norm(near, dim=(-2, -1)).clamp_min(1e-8)
    weights = gamma * torch.softmax(-sharpness * norms, -1)
    step = v + eta * (torch.einsum("tce,...et->...ct", E, v) - (weights[..., None, None] * near).sum(-3))
    return step / torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)


# ---------------------------------------------------------------- power iterations and dictionaries


def power_step(U: Tensor, x: Tensor) -> Tensor:
    """U⁺ = qr(XXᵀU), for one column XXᵀu/‖XXᵀu‖.  x (N, d) samples as rows, U (d, r)."""
    Q, R = torch.linalg.qr(x.mT @ (x @ U))
    return Q * R.diagonal().sign()


def msp_step(A: Tensor, x: Tensor) -> Tensor:
    """A⁺ = P_O[(AX)^{⊙3}Xᵀ]: the gradient of ¼‖AX‖₄⁴, projected (UVᵀ of its SVD).  A (d, d), x (N, d)."""
    left, _, right = torch.linalg.svd(((x @ A.mT) ** 3).mT @ x)
    return left @ right


def fastica_step(u: Tensor, x: Tensor) -> Tensor:
    """u⁺ = P_S[(1/N) X (Xᵀu)^{⊙3} − 3u] on white data.  u (d,), x (N, d)."""
    v = x.mT @ (x @ u) ** 3 / len(x) - 3 * u
    return v / v.norm()


def soft_threshold(v: Tensor, t: float | Tensor) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def unit_ball_columns(A: Tensor) -> Tensor:
    """A_j/max(‖A_j‖, 1) for every column."""
    return A / A.norm(dim=0).clamp_min(1)


def palm_step(A: Tensor, z: Tensor, x: Tensor, lam: float, codes: int, atoms: int) -> tuple[Tensor, Tensor]:
    """On ‖X − AZ‖² + λ‖Z‖₁ (no ½), ‖A_j‖ ≤ 1: `codes` steps Z ← S_{ηλ}(Z − 2ηAᵀ(AZ − X)), η = 1/(2‖A‖²), then

    `atoms` steps A ← P(A − 2τ(AZ − X)Zᵀ), τ = 1/(2‖Z‖²).  A (D, s), z (N, s), x (N, D); returns (A, z).
    """
    eta = 1 / (2 * torch.linalg.matrix_norm(A, 2) ** 2)
    for _ in range(codes):
        z = soft_threshold(z - 2 * eta * (z @ A.mT - x) @ A, eta * lam)
    tau = 1 / (2 * torch.linalg.matrix_norm(z, 2) ** 2)
    for _ in range(atoms):
        A = unit_ball_columns(A - 2 * tau * (z @ A.mT - x).mT @ z)
    return A, z


def sparse_autoencoder(h: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z = ReLU(W_enc(h − b) + b_enc), ĥ = W_dec z + b.  h (..., D), W_enc (s, D), W_dec (D, s); returns (z, ĥ)."""
    z = ((h - b) @ W_enc.mT + b_enc).clamp_min(0)
    return z, z @ W_dec.mT + b


# ---------------------------------------------------------------- denoisers and energies


def mixture_denoiser(x: Tensor, U: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x₀ | αx₀ + σg = x] for x₀ from the even mixture of N(0, U_kU_kᵀ), U_k orthonormal:

    α/(α² + σ²) Σ_k softmax_k(α²‖U_kᵀx‖²/(2σ²(α² + σ²))) U_kU_kᵀx.  x (..., N, d), U (K, d, p).
    """
    v = in_heads(x, U)
    total = alpha**2 + sigma**2
    weights = torch.softmax(alpha**2 / (2 * sigma**2 * total) * (v**2).sum(-1), dim=-2)
    return alpha / total * from_heads(weights[..., None] * v, U)


def ddim_step(x: Tensor, U: Tensor, now: tuple[float, float], then: tuple[float, float]) -> Tensor:
    """x' = (σ'/σ)x + (α' − σ'α/σ) x̄(x), x̄ the mixture's denoiser.  now = (α, σ), then = (α', σ')."""
    (a, s), (a_then, s_then) = now, then
    return s_then / s * x + (a_then - s_then * a / s) * mixture_denoiser(x, U, a, s)


def energy_transformer_energy(g: Tensor, W_q: Tensor, W_k: Tensor, Xi: Tensor, beta: float) -> Tensor:
    """−β⁻¹ Σ_{k, query} log Σ_key exp(β q·k) − ½ Σ ReLU(gΞ)².  g (..., N, d), W_q, W_k (K, d, p), Xi (d, s)."""
    logits = beta * in_heads(g, W_q) @ in_heads(g, W_k).mT
    memory = 0.5 * (g @ Xi).clamp_min(0).square().sum((-2, -1))
    return -torch.logsumexp(logits, -1).sum((-2, -1)) / beta - memory


def energy_transformer_step(
    x: Tensor,
    norm_w: Tensor,
    norm_b: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    Xi: Tensor,
    beta: float,
    step: float,
) -> Tensor:
    """x⁺ = x − step ∂E/∂g at g = LN(x): the gradient is in g, it moves x.  x (..., N, d), norm_w (d,) or ().

    −∂E/∂g = Σ_k [S_k K_k W_q,kᵀ + S_kᵀ Q_k W_k,kᵀ] + ReLU(gΞ)Ξᵀ, S_k = softmax(β Q_k K_kᵀ) over the keys.
    """
    g = layer_norm(x, norm_w, norm_b)
    q, k = in_heads(g, W_q), in_heads(g, W_k)
    weights = torch.softmax(beta * q @ k.mT, -1)
    attention = from_heads(weights @ k, W_q) + from_heads(weights.mT @ q, W_k)
    return x + step * (attention + (g @ Xi).clamp_min(0) @ Xi.mT)


def hopfield_step(x: Tensor, Xi: Tensor, beta: float) -> Tensor:
    """x⁺ = Ξ softmax(βΞᵀx): one concave-convex step on −lse(β, Ξᵀx) + ½‖x‖².  x (..., d), Xi (d, s) patterns."""
    return torch.softmax(beta * x @ Xi, -1) @ Xi.mT


# ---------------------------------------------------------------- losses


def rate_reduction(z: Tensor, members: Tensor, eps2: float) -> Tensor:
    """ΔR = R(Z) − R^c(Z|Π).  z (N, d), members (N, K)."""
    return coding_rate(z, eps2) - class_rate(z, members, eps2)


def mcr2_loss(z: Tensor, members: Tensor, eps2: float, gam1: float = 1.0, gam2: float = 1.0) -> Tensor:
    """−gam2 ½logdet(I + gam1 d/(Nε²) ZZᵀ) + R^c(Z|Π), minimised; gam1 is inside the first logdet alone."""
    return class_rate(z, members, eps2) - gam2 * coding_rate(z, eps2 / gam1)


def mcr2_regularised(z: Tensor, members: Tensor, eps2: float, lam: float) -> Tensor:
    """R(Z) − R^c(Z|Π) − (λ/2)‖Z‖²_F, to be maximised."""
    return rate_reduction(z, members, eps2) - lam / 2 * (z**2).sum()


def simdino_loss(
    teacher: Tensor, student: Tensor, eps2: float, gamma: float, workers: int = 1, mean: bool = False
) -> Tensor:
    """−(mean cosine of teacher and student over pairs of different views) − γ (p + Nm)/(pNm) mean_v R(Z_v).

    teacher (V, m, p): V global views, no gradient.  student (W, m, p): W ≥ V views, the first V the same global ones.
    R(Z_v) = ½logdet(I + p/(mNε²) Z_vᵀZ_v) of the student's global views, rows of unit norm; N = workers.
    mean: of the mean of both networks' instead (expa_type 1, main_dino.py).
    """
    V, m, p = teacher.shape
    t, s = unit_rows(teacher).detach(), unit_rows(student)
    cosines = torch.einsum("vmp,wmp->vw", t, s) / m
    pairs = (1 - torch.eye(V, len(s), dtype=t.dtype, device=t.device)) * cosines
    z = (s[:V] + t) / 2 if mean else s[:V]
    rates = half_logdet(z.mT @ z, p / (m * workers * eps2))
    scale = (p + workers * m) / (p * workers * m)
    return -pairs.sum() / (V * len(s) - V) - gamma * scale * rates.mean()


def rate_distance(z: Tensor, z_hat: Tensor, eps2: float) -> Tensor:
    """ΔR(Z, Ẑ) = R(Z ∪ Ẑ) − ½(R(Z) + R(Ẑ)) of two sets of equal size.  z, z_hat (N, d)."""
    return coding_rate(torch.cat([z, z_hat]), eps2) - (coding_rate(z, eps2) + coding_rate(z_hat, eps2)) / 2


def ctrl_multi(z: Tensor, z_hat: Tensor, members: Tensor, eps2: float) -> Tensor:
    """ΔR(Z) + ΔR(Ẑ) + Σ_k ΔR(Z_k, Ẑ_k): the encoder's maximum, the decoder's minimum.  members (N, K), one-hot."""
    classes = [rate_distance(z[pi > 0], z_hat[pi > 0], eps2) for pi in members.mT]
    return rate_reduction(z, members, eps2) + rate_reduction(z_hat, members, eps2) + torch.stack(classes).sum()


def ctrl_binary(z: Tensor, z_hat: Tensor, eps2: float) -> Tensor:
    """ΔR(Z, Ẑ): the encoder's maximum, the decoder's minimum."""
    return rate_distance(z, z_hat, eps2)
