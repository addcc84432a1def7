"""The language: text -> Expr, Problem.

in    the formulas and declarations of a spec
out   `parse.parse`: an expression.  `problem.from_spec`: a `Problem`, its objective as named terms
open  nodes.py first (what an expression is); then constructors.py (the normal form), parse.py, functions.py, show.py
"""

from unroll.language import constructors, show
from unroll.language.nodes import Expr

Expr.arithmetic = constructors  # what +, * and @ make of expressions
Expr.printer = show.text  # and how they read
