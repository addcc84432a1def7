"""The language: text -> Expr, Problem."""

from unroll.language import constructors, show
from unroll.language.nodes import Expr

Expr.arithmetic = constructors  # what +, * and @ make of expressions
Expr.printer = show.text  # and how they read
