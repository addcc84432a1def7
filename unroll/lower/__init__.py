"""Lowering: Step -> Graph -> Graph', tensor operations with named axes.

in    the step of one layer; the terms of an objective
out   `graph.lower_step`, `graph.lower_terms`: a `Graph`.  `passes.optimise`: the same values for less work
open  graph.py first; then operations.py (what a node may be, and its text) and passes.py (one function each)
"""
