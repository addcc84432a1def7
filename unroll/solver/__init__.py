"""Solving: the iteration of one layer, to convergence.

in    a spec, inputs, parameters
out   `solve.solve`: a `Solution`, with how far it is from the optimum at most
open  solve.py first; certificate.py derives the duality gap
"""
