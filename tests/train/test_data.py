"""Data: statistics as asked for, the same bits for the same seed, and one clear message for every bad file."""

import numpy as np
import pytest
import torch

from unroll.errors import SpecError
from unroll.spec.schema import Augment, Characters, Digits, Files, Patches, Synthetic
from unroll.train.data import SOURCES, make_data, whitening
from unroll.train.samples import Shapes, Split, package

SHAPES = Shapes({"x": (64,)}, {"z": (128,)}, {"A": (64, 128)})
NONE = Shapes({})


def patches(**changes):
    return Patches(**{"source": "patches", "train": 5000, "validation": 500, **changes})


def synthetic(**changes):
    return Synthetic(**{"source": "synthetic", "train": 3000, "validation": 100, **changes})


def test_every_source_has_its_own_settings_record_and_a_line_about_it():
    assert [s.name for s in SOURCES] == [
        "patches",
        "digits",
        "images",
        "text",
        "tokens",
        "synthetic",
        "low_rank",
        "file",
    ]
    assert all(s.about for s in SOURCES)


@pytest.mark.parametrize("settings", [patches(), Digits(source="digits"), synthetic(snr=20.0)], ids=lambda s: s.source)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(settings):
    torch.manual_seed(1)
    one = make_data(settings, SHAPES)
    before = torch.get_rng_state()
    two = make_data(settings, SHAPES)
    assert torch.equal(before, torch.get_rng_state())  # the global random state is left alone
    other = make_data(settings.model_copy(update={"seed": 1}), SHAPES)
    for split in ("train", "validation"):
        a, b, c = (getattr(d, split).inputs["x"] for d in (one, two, other))
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_whitened_patches_have_a_covariance_near_the_identity(kind):
    x = make_data(patches(whiten=kind, norm="none", eps=1e-7, train=20_000), SHAPES).train.inputs["x"]
    values = torch.linalg.eigvalsh(x.mT.cov())
    assert values[0].abs() < 1e-6  # the direction of the mean, which was removed
    assert torch.allclose(values[1:], torch.ones(63, dtype=torch.float64), atol=0.02)


def test_whitening_shrinks_each_eigenvalue_as_stated():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 7)
    c = torch.linalg.eigvalsh(x.mT.cov())
    w = whitening(x, "zca", 0.1)
    assert torch.allclose(torch.linalg.eigvalsh((x @ w.mT).mT.cov()), c / (c + 0.1 * c[-1]))
    assert torch.allclose(w, w.mT)


def test_patches_have_unit_length_and_the_held_out_ones_are_none_of_the_training_ones():
    data = make_data(patches(), SHAPES)
    train, held = data.train.inputs["x"], data.validation.inputs["x"]
    assert train.shape == (5000, 64) and held.shape == (500, 64)
    assert torch.allclose(train.norm(dim=1), torch.ones(5000, dtype=torch.float64))
    assert torch.cdist(held, train).min() > 1e-3


def test_digits_are_grey_in_zero_to_one_and_all_there():
    data = make_data(Digits(source="digits"), SHAPES)
    assert len(data.train) + len(data.validation) == 1797
    assert data.train.inputs["x"].min() == 0 and data.train.inputs["x"].max() == 1


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_the_condition_number_is_exact(condition):
    A = make_data(synthetic(condition=condition), SHAPES).parameters["A"]
    assert torch.linalg.cond(A).item() == pytest.approx(condition, rel=1e-9)
    assert A.square().sum().item() == pytest.approx(128)


def test_without_a_condition_number_columns_have_unit_length():
    A = make_data(synthetic(), SHAPES).parameters["A"]
    assert torch.allclose(A.norm(dim=0), torch.ones(128, dtype=torch.float64))


@pytest.mark.parametrize("snr", [0.0, 20.0, 40.0])
def test_the_signal_to_noise_ratio_is_as_asked(snr):
    data = make_data(synthetic(snr=snr), SHAPES)
    clean = data.train.targets["z"] @ data.parameters["A"].mT
    noise = data.train.inputs["x"] - clean
    measured = 10 * (clean.square().sum() / noise.square().sum()).log10()
    assert measured.item() == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_codes_are_bernoulli_gaussian_and_signals_their_images(nonnegative):
    data = make_data(synthetic(sparsity=0.1, nonnegative=nonnegative), SHAPES)
    z = data.train.targets["z"]
    assert (z != 0).double().mean().item() == pytest.approx(0.1, abs=0.003)
    assert z[z != 0].square().mean().item() == pytest.approx(1, abs=0.03)
    assert (z.min() >= 0) == nonnegative
    assert torch.allclose(z @ data.parameters["A"].mT, data.train.inputs["x"])


def test_a_given_matrix_is_used():
    A = torch.eye(64).repeat(1, 2)
    data = make_data(synthetic(), SHAPES, {"A": A})
    assert torch.equal(data.parameters["A"], A.double())


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_arrays_come_back_from_files_with_inputs_and_targets_in_step(tmp_path, suffix):
    x = np.arange(40.0).reshape(20, 2)
    z, A = 10 * x[:, :1], np.ones((2, 1), dtype=np.int64)
    paths = {name: tmp_path / f"{name}.{suffix}" for name in ("x", "z", "A")}
    for (name, path), value in zip(paths.items(), (x, z, A), strict=True):
        if suffix == "npy":
            np.save(path, value)
        elif suffix == "npz":
            np.savez(path, **{name: value, "other": value})
        else:
            torch.save({name: torch.from_numpy(value)}, path)
    shapes = Shapes({"x": (2,)}, {"z": (1,)}, {"A": (2, 1)})
    data = make_data(Files(source="file", files={k: str(v) for k, v in paths.items()}, validation=5.0), shapes)
    assert (len(data.train), len(data.validation)) == (15, 5)
    assert torch.equal(data.train.targets["z"], 10 * data.train.inputs["x"][:, :1])
    both = torch.cat([data.train.inputs["x"], data.validation.inputs["x"]])
    assert sorted(both.flatten().tolist()) == list(range(40))
    assert torch.equal(data.parameters["A"], torch.ones(2, 1, dtype=torch.float64))


class Runs:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def bad(tmp_path, kind):
    path = tmp_path / ("x.pt" if "torch" in kind else "x.txt" if kind == "suffix" else "x.npy")
    good = np.zeros((10, 2))
    match kind:
        case "missing":
            return path, "E502"
        case "suffix":
            path.write_text("1 2 3")
            return path, "E503"
        case "cut short":
            np.save(path, good)
            path.write_bytes(path.read_bytes()[:60])
            return path, "E503"
        case "empty":
            path.write_bytes(b"")
            return path, "E503"
        case "objects":
            np.save(path, np.array([Runs(str(tmp_path / "ran"))] * 3, dtype=object))
            return path, "E506"
        case "torch objects":
            torch.save(Runs(str(tmp_path / "ran")), path)
            return path, "E503"
        case "torch text":
            torch.save("hello", path)
            return path, "E506"
        case "complex":
            np.save(path, good + 1j)
            return path, "E506"
        case "words":
            np.save(path, np.array(["a", "b"]))
            return path, "E506"
        case "shape":
            np.save(path, np.zeros((10, 3)))
            return path, "E504"
        case "scalar":
            np.save(path, np.float64(3))
            return path, "E504"
        case "nan":
            good[3, 1] = np.nan
            np.save(path, good)
            return path, "E505"


KINDS = [
    "missing",
    "suffix",
    "cut short",
    "empty",
    "objects",
    "torch objects",
    "torch text",
    "complex",
    "words",
    "shape",
]


@pytest.mark.parametrize("kind", [*KINDS, "scalar", "nan"])
def test_a_bad_file_gets_its_code_and_runs_nothing(tmp_path, kind):
    path, code = bad(tmp_path, kind)
    with pytest.raises(SpecError) as caught:
        make_data(Files(source="file", files={"x": str(path)}), Shapes({"x": (2,)}))
    assert caught.value.code == code
    assert not (tmp_path / "ran").exists()


def test_a_value_that_is_not_finite_is_at_its_place_in_the_file(tmp_path):
    values = np.ones((50, 2))
    values[3, 1] = np.inf
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(SpecError, match=r"E505.* 1 values .*\(3, 1\)"):
        make_data(Files(source="file", files={"x": str(tmp_path / "x.npy")}), Shapes({"x": (2,)}))


@pytest.mark.parametrize(
    ("files", "message"),
    [({"y": "a.npy"}, "'y' is no name of this problem"), ({}, "no file for the input x")],
)
def test_files_for_wrong_names_are_refused(files, message):
    with pytest.raises(SpecError, match=message):
        make_data(Files(source="file", files=files), SHAPES)


def test_inputs_and_targets_of_different_length_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((10, 64)))
    np.save(tmp_path / "z.npy", np.zeros((9, 128)))
    settings = Files(source="file", files={k: str(tmp_path / f"{k}.npy") for k in "xz"})
    with pytest.raises(SpecError, match="x has 10, z has 9"):
        make_data(settings, SHAPES)


@pytest.mark.parametrize(
    ("settings", "shapes", "message"),
    [
        (patches(size=6), SHAPES, "x is 36, the problem declares 64"),
        (patches(), Shapes({"x": (64,), "y": (64,)}), "which input do the samples feed"),
        (patches(train=10_000_000), SHAPES, "10,000,000 patches were asked for"),
        (synthetic(), Shapes({"x": (64,)}), "the problem has no such x, z and A"),
        (synthetic(), Shapes({"x": (None,)}, {"z": (8,)}, {"A": (None, 8)}), "the size of x is open"),
        (Digits(source="digits", input="y"), SHAPES, "'y' is no input"),
        (synthetic(input="y"), SHAPES, "'y' is no input"),
        (Files(source="file", files={"x": "a.npy"}, input="x"), SHAPES, "files: names the inputs already"),
    ],
)
def test_data_that_do_not_fit_the_problem_say_why(settings, shapes, message):
    with pytest.raises(SpecError, match=message):
        make_data(settings, shapes)


def test_a_missing_package_names_the_extra_to_install():
    with pytest.raises(SpecError, match="unroll-compiler\\[train\\]") as caught:
        package("no_such_package_at_all", "data: source: patches")
    assert caught.value.code == "E501"


def test_the_summary_names_shape_range_and_type():
    rows = make_data(Digits(source="digits"), SHAPES).summary()
    assert rows[0] == ("train", "x", "1,500 × 64", "0 .. 1", "float64")
    assert rows[1] == ("train label", "label", "1,500", "0 .. 9", "int64")


# --- digits with labels ----------------------------------------------------------------------------------------------


def test_digits_as_images_are_the_vectors_row_by_row_with_the_labels_of_scikit_learn():
    from sklearn.datasets import load_digits

    flat, data = make_data(Digits(source="digits"), SHAPES), make_data(Digits(source="digits", form="images"), NONE)
    raw = {tuple(row): label for row, label in zip(load_digits().data / 16, load_digits().target, strict=True)}
    for vectors, images in ((flat.train, data.train), (flat.validation, data.validation)):
        image = images.inputs["image"]
        assert image.shape[1:] == (1, 8, 8) and torch.equal(image.flatten(1), vectors.inputs["x"])
        assert torch.equal(images.labels, vectors.labels)
        assert [raw[tuple(row)] for row in image.flatten(1).tolist()] == images.labels.tolist()
    assert data.sizes == {"classes": 10, "channels": 1, "height": 8, "width": 8}


def test_vectors_are_not_augmented():
    with pytest.raises(SpecError, match="augment: changes images") as caught:
        make_data(Digits(source="digits", augment=Augment(shift=1)), SHAPES)
    assert caught.value.code == "E511"


def test_numbers_keep_their_kind_where_the_rest_changes_dtype():
    split = Split({"x": torch.zeros(2, dtype=torch.float64), "t": torch.zeros(2).long()}, labels=torch.zeros(2).long())
    for like in (torch.float32, torch.zeros(1), torch.device("cpu")):
        moved = split.to(like)
        assert moved.inputs["t"].dtype == moved.labels.dtype == torch.int64
    assert split.to(torch.float32).inputs["x"].dtype == torch.float32 == split.to(torch.zeros(1)).inputs["x"].dtype


# --- text ------------------------------------------------------------------------------------------------------------


def characters(source, **changes):
    return make_data(Characters(source="text", text=str(source), **{"length": 8, **changes}), NONE)


def decode(codes, data):
    return "".join(data.kept["vocabulary"][k] for k in codes.flatten().tolist())


def test_a_text_is_split_by_position_and_comes_back_from_its_codes(tmp_path):
    words = "Ω and ñ, 漢字 and 🎉.\n" * 30 + "zebra? Ω" * 8
    (tmp_path / "mine.txt").write_text(words, encoding="utf-8")
    data = characters(tmp_path / "mine.txt")
    cut = len(words) - round(0.1 * len(words))
    train, held = data.train.whole(), data.validation
    assert decode(data.train.codes, data) == words[:cut] and torch.equal(train.labels, data.train.codes[None, 1:])
    shown = "".join(c if c in words[:cut] else "\ufffd" for c in words[cut:])
    count = (len(shown) - 1) // 8 * 8
    assert decode(held.inputs["tokens"], data) == shown[:count] and decode(held.labels, data) == shown[1 : count + 1]
    assert data.sizes == {"vocabulary": 1 + len(set(words[:cut])), "tokens": 8}
    assert data.notes == (f"{shown.count(chr(0xFFFD))} characters that are held out do not occur in training",)


@pytest.mark.parametrize(("source", "known"), [("python documentation", "Boolean"), ("python library", "def ")])
def test_texts_of_python_are_read_without_a_file(source, known):
    data = characters(source, characters=200_000)
    assert known in decode(data.train.codes, data) and len(data.train.codes) == 180_000
    assert characters(source, characters=200_000).kept == data.kept


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (None, "E502", "there is no file"),
        (b"\xff\xfe\xfa" * 100, "E503", "is not text in UTF-8"),
        (b"short", "E504", "5 characters are too few for samples of 8"),
        (b"x" * 70, "E504", "70 characters are too few"),
    ],
)
def test_a_text_that_cannot_be_read_or_split_says_why(tmp_path, body, code, message):
    if body is not None:
        (tmp_path / "mine.txt").write_bytes(body)
    with pytest.raises(SpecError, match=message) as caught:
        characters(tmp_path / "mine.txt")
    assert caught.value.code == code
