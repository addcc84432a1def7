"""The rewrites of the language: one record each. Adding one is one rule and one entry."""

from __future__ import annotations

import sympy as sp

from unroll.derivation.rewrites.bounded import incoherent, neumann, neumann_limit, spectral_bound, tight_frame
from unroll.derivation.rewrites.causal import causal_tokens, counted, gram_to_softmax, looks_ahead
from unroll.derivation.rewrites.exact import collected, expanded, push_through, shares, woodbury
from unroll.derivation.rewrites.frequencies import circulant_to_fft
from unroll.derivation.rewrites.record import Argument, Rewrite
from unroll.language.nodes import ONE

REWRITES: tuple[Rewrite, ...] = (
    Rewrite("push_through", "(a I + c X Y)⁻¹ X; log det(a I + c X Y)", "X (a I + c Y X)⁻¹; log det(a I + c Y X) + (n − p) log a", "exact", "", "", "Woodbury 1950; Henderson & Searle 1981, doi:10.1137/1023004", push_through, (Argument("to", "number"),)),
    Rewrite("woodbury", "(a I + c U Uᵀ)⁻¹ with U declared orthonormal", "(I − c/(a + c) U Uᵀ)/a", "exact", "", "", "Woodbury 1950", woodbury),
    Rewrite("expand", "A (B + C)", "A B + A C", "exact", "", "", "distributive law", expanded),
    Rewrite("shares", "softmax_k(a + b_k); Σ_k softmax_k(b_k) * A", "softmax_k(b_k); A", "exact", "", "", "shares add up to 1, and do not change with what all have in common", shares),
    Rewrite(
        "circulant_to_fft", "f(X) Y; log det f(X), with f(X) sums, products and inverses of shifts(X)", "ifft f(X̂_w) Ŷ_w; Σ_w log det f(X̂_w)",
        "exact", "", "", "Davis 1979, Circulant Matrices; Chan et al. 2022, ReduNet, arXiv:2105.10446", circulant_to_fft,
    ),
    Rewrite("collect", "A X + B X", "(A + B) X", "exact", "", "", "distributive law", collected, (Argument("on", "symbol", optional=False),)),
    Rewrite(
        "neumann", "(a I + M)⁻¹", "(I − M/a + … ± (M/a)^order)/a", "bounded", "‖M/a‖ < 1", "of the inverse, relative: at most rho^(order+1), rho = ‖M/a‖",
        "Neumann series; Yu et al. 2023, arXiv:2306.01129", neumann, (Argument("order", "count", sp.Integer(1)),), limit=neumann_limit,
    ),
    Rewrite(
        "tight_frame", "Σ_k A U_k U_kᵀ B", "A B", "bounded", "Σ U_k U_kᵀ = I", "at most ‖A‖ ‖Σ U_k U_kᵀ − I‖ ‖B‖",
        "Yu et al. 2023, arXiv:2306.01129", tight_frame, (Argument("of", "symbol", optional=False),),
    ),
    Rewrite(
        "incoherent", "Dᵀ D", "I", "bounded", "Dᵀ D = I", "‖Dᵀ D − I‖",
        "Yu et al. 2023, arXiv:2306.01129", incoherent, (Argument("of", "symbol", optional=False),),
    ),
    Rewrite(
        "spectral_bound", "log det(a I + c M)", "n log a + Σ_i log(1 + c/a (Qᵀ M Q)_ii)", "bounded", "Q Qᵀ = I", "an upper bound, equal where Q diagonalises M",
        "Wu et al. 2025, Token Statistics Transformer, arXiv:2412.17810", spectral_bound, (Argument("by", "symbol", optional=False),), "objective",
    ),
    Rewrite(
        "gram_to_softmax", "V Vᵀ V", "V softmax(scale Vᵀ V), down the columns", "heuristic", "", "no bound is known",
        "Yu et al. 2023, arXiv:2306.01129", gram_to_softmax, (Argument("scale", "number", ONE), Argument("causal", "flag", False)),
    ),
    Rewrite(
        "causal", "sums over tokens", "running sums: a token sees those up to it", "heuristic", "", "each token follows the step of the sequence up to it; of a sum within a sum, that up to the inner token",
        "Wu et al. 2025, Token Statistics Transformer, arXiv:2412.17810", causal_tokens, (Argument("over", "number", optional=False),), left=looks_ahead, rest=counted,
    ),
)  # fmt: skip


BY_NAME = {r.name: r for r in REWRITES}
