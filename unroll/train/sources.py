"""What the sources of data are, without what it takes to read them: `unroll list` is fast."""

ABOUT = {
    "patches": "whitened patches of scikit-learn's sample photographs",
    "digits": "scikit-learn's 8 x 8 handwritten digits",
    "images": "pictures that stay on disk: a folder for each class, tar files, or an array with labels",
    "text": "characters of Python's documentation, of its library, or of your own file",
    "tokens": "arrays of tokens that a tokenizer made, which stay on disk; whole documents or any stretch",
    "synthetic": "x = A z + noise with a sparse z that is known",
    "low_rank": "Y = L R' + S with factors L, R that are known and sparse errors S of any size",
    "file": "your arrays: .npy, .npz, .pt",
}
