"""Laws: what a derived network should obey, tried on one spec against answers that know nothing of the derivation.

in    a spec
out   `laws.check`: a `Check`, a row for each law
open  laws.py
"""
