"""Emission: Graph' -> text, one nn.Module that needs torch only, as a person who knows the paper would have written it.

in    problem, step, sizes
out   `program.build`: a `Program`, the graph of a layer and the text of its class.  `objective.term_source`: the text of the terms
open  program.py first; then, in the order of the data: module.py (what is written), section.py (a graph -> lines), layer.py,
      forward.py, initialise.py, construction.py (lines -> methods), text.py (methods -> the whole)
"""
