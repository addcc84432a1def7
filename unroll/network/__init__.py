"""Networks: text -> nn.Module, with what the problem says of it: trace, objective, save.

in    a `Program`, and values of parameters and scalars
out   `network.network`: a `Network`.  `loss.loss`: the objective alone, as a module to be minimised
open  network.py first; then trace.py (what every layer did) and values.py (what is refused before a network is made)

evaluate.py and stepwise.py run the mathematics as it is written, slowly: what emitted text is held against.
"""
