"""Calculus: an expression -> its gradient, curvature and proximal step.

in    an expression that is a number, and the symbol it is a function of
out   `gradient.gradient`: the gradient, an expression.  `curvature`: low <= Hessian <= high, as expressions.
      `prox.plan`: the proximal step of a matrix term, from `prox_scalar.derive_prox` of scalar formulas
open  gradient.py first; then prox.py (lifts of scalar proxes) and prox_scalar.py (how one is derived)

Scalars are SymPy's here: signs.py and pieces.py decide where a formula switches, roots.py solves each piece, verify.py holds
the result against brute force, prox_source.py and torch_text.py write it as torch.
"""
