"""What stands around the layers: parts (what each line of `model:` holds and does) -> source (one class) -> module.

image, words or vectors -> tokens (+ mask, class token, positions) -> layers -> head, or decoder -> pixels
"""
