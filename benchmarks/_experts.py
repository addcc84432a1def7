"""The modules that an expert writes by hand, from the papers' formulas: the emitted ones are measured against them.

B images, N tokens, d features, K heads of width p.  Parameters have the names of the released checkpoints, so that
the state of `Crate` is also a released one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor], Tensor]


def explicit(w_BKNp: Tensor) -> Tensor:
    """softmax(w wᵀ/√p) w with the N x N weights in memory."""
    return torch.softmax(w_BKNp @ w_BKNp.mT * w_BKNp.shape[-1] ** -0.5, -1) @ w_BKNp


def fused(w_BKNp: Tensor) -> Tensor:
    """The same through PyTorch's kernel."""
    return F.scaled_dot_product_attention(w_BKNp, w_BKNp, w_BKNp)


class SubspaceAttention(nn.Module):
    """MSSA: one map to queries, keys and values, one map out with bias."""

    def __init__(self, d: int, K: int, p: int, attend: Attend = explicit) -> None:
        super().__init__()
        self.K, self.attend = K, attend
        self.qkv = nn.Linear(d, K * p, bias=False)
        self.to_out = nn.Sequential(nn.Linear(K * p, d))

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.K, -1)).transpose(1, 2)
        return self.to_out(self.attend(w).transpose(1, 2).flatten(2))


class TokenStatistics(nn.Module):
    """TSSA: no N x N weights; memberships over the heads, second moments over the tokens."""

    def __init__(self, d: int, K: int, p: int) -> None:
        super().__init__()
        self.K = K
        self.qkv = nn.Linear(d, K * p)
        self.temp = nn.Parameter(torch.ones(K, 1))
        self.to_out = nn.Sequential(nn.Linear(K * p, d))

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.K, -1)).transpose(1, 2)
        square = w.square()
        share = square / square.sum(-2, keepdim=True).clamp_min(1e-24)
        members = torch.softmax(share.sum(-1) * self.temp, 1)
        weights = members / (members.sum(-1, keepdim=True) + 1e-8)
        moments = weights[:, :, None] @ square
        heads = -w * members[..., None] / (1 + moments)
        return self.to_out(heads.transpose(1, 2).flatten(2))


class Ista(nn.Module):
    """ReLU(x − ηDᵀ(Dx − x) − ηλ), η = λ = 0.1."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, d))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.linear(x, self.weight) - x
        return F.relu(x - 0.1 * (residual @ self.weight) - 0.01)


class Normed(nn.Module):
    def __init__(self, d: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(d), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Blocks(nn.Module):
    def __init__(self, d: int, layers: int, K: int, attend: Attend) -> None:
        super().__init__()
        pairs = ((SubspaceAttention(d, K, d // K, attend), Ista(d)) for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(Normed(d, part) for part in pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.layers:
            x = sparsify(x + attention(x))
        return x


class Patches(nn.Module):
    """(B, C, H, W) → (B, N, patch² C), the channel fastest."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        side = self.patch
        cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # B C h i w j
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Crate(nn.Module):
    """Images (B, 3, side, side) → logits (B, classes); CRATE-T unless said otherwise."""

    def __init__(
        self,
        attend: Attend = explicit,
        d: int = 384,
        layers: int = 12,
        K: int = 6,
        side: int = 224,
        patch: int = 16,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        pixels, N = 3 * patch**2, (side // patch) ** 2
        self.to_patch_embedding = nn.Sequential(
            Patches(patch), nn.LayerNorm(pixels), nn.Linear(pixels, d), nn.LayerNorm(d)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, N + 1, d))
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        self.transformer = Blocks(d, layers, K, attend)
        self.mlp_head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, classes))

    def forward(self, images: Tensor) -> Tensor:
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


def crate_products(
    B: int, N: int, d: int, K: int, layers: int, pixels: int, classes: int, backward: bool, device: str
) -> list[tuple[Tensor, Tensor]]:
    """The factors of every matrix product in `Crate`, N tokens with the class token; backward: of their gradients too.

    The gradient of C = A B is two products, G Bᵀ and Aᵀ G.
    """
    p = d // K
    tokens, square = (B * N, d), (d, d)
    layer = [
        (tokens, square),  # to the heads
        ((B, K, N, p), (B, K, p, N)),  # Gram matrices
        ((B, K, N, N), (B, K, N, p)),  # weighted sums
        (tokens, square),  # output map
        (tokens, square),  # D
        (tokens, square),  # Dᵀ
    ]
    ends = [((B * (N - 1), pixels), (pixels, d)), ((B, d), (d, classes))]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    pairs = [(draw(*a), draw(*b)) for a, b in (*layer * layers, *ends)]
    if not backward:
        return pairs
    results = [draw(*a.shape[:-1], b.shape[-1]) for a, b in pairs]
    left = [(g, b.mT) for g, (_, b) in zip(results, pairs, strict=True)]
    return pairs + left + [(a.mT, g) for g, (a, _) in zip(results, pairs, strict=True)]


def redunet_construct(
    z: Tensor, labels: Tensor, layers: int, eta: float = 0.5, eps2: float = 0.1, sharpness: float = 500.0
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """ReduNet as it is usually written: an inverse for all samples and one for each class, in a loop.

    z (m, d) of unit norm, labels (m,).  Returns the layers' (E (d, d), C (K, d, d)) and the features after the last.
    """
    (m, d), K = z.shape, int(labels.max()) + 1
    eye, operators = torch.eye(d, dtype=z.dtype, device=z.device), []
    for _ in range(layers):
        E = d / (m * eps2) * torch.linalg.inv(eye + d / (m * eps2) * z.T @ z)
        C = []
        for k in range(K):
            z_k = z[labels == k]
            a = d / (len(z_k) * eps2)
            C.append(a * torch.linalg.inv(eye + a * z_k.T @ z_k))
        operators.append((E, torch.stack(C)))
        near = torch.stack([z @ C_k for C_k in C], 1)  # (m, K, d)
        soft = torch.softmax(-sharpness * near.norm(dim=-1).clamp_min(1e-8), -1)
        share = torch.bincount(labels, minlength=K).to(z) / m
        z = F.normalize(z + eta * (z @ E - ((share * soft)[..., None] * near).sum(1)), dim=-1)
    return operators, z
