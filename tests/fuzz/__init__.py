"""Random objectives, as a user would write them, each derived thing against a second source: `python -m tests.fuzz --help`.

drawing.py    a random spec as YAML text, with values for all that it declares
oracle.py     the value of a formula by Python and torch alone: nothing of the engine is asked
checks.py     gradient, prox, curvature, solve, rewrites, learn: what the engine says against what the oracle finds
judging.py    what came out of each, and the count of it
__main__.py   many of them, in two processes
"""
