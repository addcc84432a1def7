"""Derivation: Problem -> Step, one iteration as assignments to states.

in    a problem, and what the spec says under `unroll:`
out   `derive.derive`: a `Derivation` that prints itself, and in it the `step.Step` of one layer
open  derive.py first; then, in the order of the data: algorithms.py (a problem -> one iteration), blocks.py (several, one
      after the other), rewrites/ (named identities and approximations), learning.py (a parameter in place of an expression)
"""
