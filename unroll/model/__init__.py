"""Models: what stands around the layers.

in    the sections `model:` and `weights:` of a spec, and the networks of its layers
out   `module.model`: a `Model`.  `weights.restore_weights`: released weights in it.  `whitebox.white_box`: what it does to its objective
open  source.py first: parts (parts.py: what each line of `model:` holds and does) -> the text of one class; module.py loads it
"""
