"""Rewrites: Step -> Step', by named identities and named approximations.

in    an expression, and a line of `rewrites:`
out   `rewriting.apply`: the expression rewritten, and every place where the rule matched, to be measured
open  catalogue.py first: one record each; then the file of its kind: exact.py, frequencies.py, bounded.py, causal.py
"""
