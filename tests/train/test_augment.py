"""What training changes about images, each against its definition; and the scale in which a network sees them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import unroll
from unroll.errors import SpecError
from unroll.spec.schema import Augment, Digits, Images, RandAugment, Train
from unroll.train import evaluate, losses, train
from unroll.train.augment import crops, erased, flipped, mixed, operations, pasted, rand_augmented
from unroll.train.data import make_data
from unroll.train.engine import fit
from unroll.train.pictures import change_of
from unroll.train.samples import Shapes, Split


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=60, channels=3, height=12, width=20):
    return torch.rand(count, channels, height, width, generator=draw(1))


def test_a_flip_with_the_same_numbers_undoes_itself():
    image = images()
    once = flipped(image, draw())
    assert not torch.equal(once, image) and torch.equal(flipped(once, draw()), image)


@pytest.mark.parametrize("picture", [(400, 300), (300, 400), (33, 1000)])
def test_crops_have_their_areas_and_proportions(picture):
    w, h = picture
    shares = []
    for view in crops(Augment(crop=(0.1, 0.5)), (8, 8), 300, draw()):
        left, top, right, bottom = view(w, h)
        assert 0 <= left < right <= w and 0 <= top < bottom <= h
        shares.append((right - left) * (bottom - top) / (w * h))
        fits = 0.73 < (right - left) / (bottom - top) < 1.37
        assert fits or (right - left, bottom - top) == (33, 33)  # the middle, where none of ten fits
    if w == 33:
        assert min(shares) == max(shares)
    else:
        assert 0.09 < min(shares) < 0.15 and 0.45 < max(shares) < 0.51
        assert abs(np.mean(shares) - 0.3) < 0.03  # uniform


def test_a_picture_is_cropped_before_it_is_scaled(tmp_path):
    for k in range(2):
        (tmp_path / "ab"[k]).mkdir()
        pixels = np.random.default_rng(k).integers(256, size=(40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "ab"[k] / "0.png")
    settings = Images(source="images", folder=str(tmp_path), size=8, validation=1.0, augment=Augment(crop=(0.2, 0.6)))
    data = make_data(settings, Shapes({}))
    found = data.change(data.train, torch.tensor([0]), draw(3)).inputs["image"][0]
    (view,) = crops(settings.augment, (8, 8), 1, draw(3))
    name = "ab"[int(data.train.labels[0])]
    with Image.open(tmp_path / name / "0.png") as picture:
        own = picture.crop(view(60, 40)).resize((8, 8), Image.Resampling.BICUBIC)
    assert torch.equal(found, torch.from_numpy(np.array(own)).permute(2, 0, 1) / 255)


def test_what_is_erased_is_one_rectangle_of_the_stated_area():
    image = images(400) + 1
    found = erased(image, 0.5, draw())
    gone = (found == 0).all(1)
    assert torch.equal(found, torch.where(gone[:, None], 0, image))
    areas = []
    for mask in gone[gone.any(-1).any(-1)]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None]) and mask.sum() == rows.sum() * columns.sum()
        assert rows.nonzero().diff(dim=0).le(1).all() and columns.nonzero().diff(dim=0).le(1).all()
        areas.append(float(mask.double().mean()))
    assert 150 < len(areas) < 250 and min(areas) > 0.01 and 0.25 < max(areas) < 0.36


def test_a_mixture_is_the_convex_combination_that_its_labels_say():
    image = images().double()
    found, other, share = mixed(image, 0.8, draw())
    assert sorted(other.tolist()) == list(range(60)) and (share >= 0).all() and (share <= 1).all()
    for k in range(60):
        s = float(share[k])
        assert torch.allclose(found[k], s * image[k] + (1 - s) * image[other[k]])
    assert share.std() > 0.2  # of Beta(0.8, 0.8): 0.31


def test_the_share_of_a_pasted_picture_is_its_area():
    image = images().double()
    found, other, share = pasted(image, 1.0, draw())
    for k in range(60):
        own, its = (found[k] == image[k]).all(0), (found[k] == image[other[k]]).all(0)
        assert (own | its).all()
        if k != other[k]:
            assert abs(float(own.double().mean()) - float(share[k])) < 1e-12
    assert share.min() < 0.3 and share.max() > 0.9


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_mixture_is_that_of_labels_in_shares(smoothing):
    torch.manual_seed(0)
    logits, labels, other = torch.randn(7, 4).double(), torch.randint(4, (7,)), torch.randint(4, (7,))
    share = torch.rand(7).double()
    loss = losses.find_loss("cross_entropy")
    batch = Split({"x": logits}, labels=labels, mixed=(other, share))
    own = torch.nn.functional.one_hot(labels, 4) * share[:, None]
    own = own + torch.nn.functional.one_hot(other, 4) * (1 - share)[:, None]
    settings = Train(loss="cross_entropy", label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(logits, own, label_smoothing=smoothing)
    assert torch.allclose(loss.value(None, batch, logits, settings), expected)
    labels = torch.where(torch.arange(7) < 3, -1, labels)  # without a label, its share counts in nothing
    found = loss.value(None, Split({"x": logits}, labels=labels, mixed=(other, share)), logits, settings)
    rows = torch.where(labels[:, None] >= 0, own, torch.nn.functional.one_hot(other, 4) * (1 - share)[:, None])
    flat = rows * (1 - smoothing) + smoothing / 4 * rows.sum(1, keepdim=True)
    assert torch.allclose(found, -(flat * logits.log_softmax(1)).sum() / rows.sum())


# --- RandAugment -----------------------------------------------------------------------------------------------------


def numbers(picture):
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("m", [0.6, -0.6])
def test_operations_are_what_their_names_say(m):
    x = np.random.default_rng(0).integers(20, 230, size=(9, 11, 3), dtype=np.uint8)
    own, do = x.astype(int), operations()
    grey = (own @ np.array([299, 587, 114]) / 1000)[..., None]

    def blend(base):
        return np.clip(base + (1 + 0.9 * m) * (own - base), 0, 255)

    expected = {
        "identity": own,
        "brightness": blend(0),
        "color": blend(grey),
        "contrast": blend(grey.mean()),
        "posterize": own & ~0b11,  # 6 of 8 bits
        "solarize": np.where(own < 102.4, own, 255 - own),
        "autocontrast": np.clip((own - own.min((0, 1))) * 255 / np.ptp(own, axis=(0, 1)), 0, 255),
    }
    for name, value in expected.items():
        assert abs(numbers(do[name](Image.fromarray(x), m)) - value).max() <= 2, name
    for axis, name in ((1, "translate_x"), (0, "translate_y")):
        by = round(0.45 * m * x.shape[axis])
        rolled = np.roll(own, -by, axis)
        lost = [slice(None)] * 2
        lost[axis] = slice(-by, None) if by > 0 else slice(None, -by)
        rolled[tuple(lost)] = 0
        assert (numbers(do[name](Image.fromarray(x), m)) == rolled).all(), name
    dark = (np.random.default_rng(1).random((40, 50)) ** 2 * 200).astype(np.uint8)
    level = numbers(do["equalize"](Image.fromarray(dark), m)).ravel()
    assert (np.diff(level[np.argsort(dark.ravel(), kind="stable")]) >= 0).all()
    assert abs(np.quantile(level, [0.25, 0.5, 0.75]) - [64, 128, 191]).max() < 25
    for name in ("shear_x", "shear_y", "rotate"):  # pixels move, none is new
        there = numbers(do[name](Image.fromarray(x[:, :, 0]), m))
        assert (there != own[..., 0]).any() and set(there.ravel()) <= {0, *own[..., 0].ravel()}, name


def test_at_strength_zero_most_operations_do_nothing():
    x = Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 11, 3), dtype=np.uint8))
    for name, do in operations().items():
        assert name in ("autocontrast", "equalize") or (numbers(do(x, 0)) == numbers(x)).all(), name
    assert len(operations()) == 14


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_gets_operations_of_its_own(channels):
    image = (images(200, channels) * 255).round() / 255
    found = rand_augmented(image, RandAugment(operations=1, strength=0.5), draw())
    seen = set()
    for before, after in zip(image, found, strict=True):
        own = (before * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(own if channels == 3 else own[..., 0])
        made = {
            (n, s): numbers(do(picture, s * 0.5)).reshape(own.shape) for n, do in operations().items() for s in (1, -1)
        }
        after = (after * 255).round().permute(1, 2, 0).numpy()
        seen |= (names := {n for (n, s), value in made.items() if (value == after).all()})
        assert names
    assert len(seen) == 14


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "channels", "message"),
    [
        ({"rand_augment": RandAugment()}, 2, "1 or 3 channels, these have 2"),
        ({"crop": (0.9, 0.1)}, 3, "the smaller share comes first"),
    ],
)
def test_what_does_not_fit_is_refused(augment, channels, message):
    with pytest.raises(SpecError, match=message) as caught:
        change_of(Augment(**augment), "image", channels)
    assert caught.value.code == "E511"


def test_values_that_no_picture_has_are_not_cut_off():
    with pytest.raises(SpecError, match=r"these are 0 \.\. 1\.5") as caught:
        rand_augmented(torch.tensor([[[[0.0, 1.5]]]]), RandAugment(), draw())
    assert caught.value.code == "E505"


@pytest.mark.parametrize("mix", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixtures_need_a_loss_that_knows_labels_in_shares(tmp_path, mix):
    net = unroll.compile("crate_mae_digits", overrides=["unroll.layers=1"])
    data = make_data(Digits(source="digits", form="images", augment=Augment(**mix)), Shapes({}))
    with pytest.raises(SpecError, match="loss: masked_mse does not know") as caught:
        fit(net, data, Train(loss="masked_mse", steps=1), tmp_path)
    assert caught.value.code == "E511"


EVERYTHING = Augment(crop=(0.3, 1.0), shift=1, flip=True, rand_augment=RandAugment(), erase=0.5, mixup=0.8, cutmix=1.0)


def test_all_of_it_at_once_on_digits_is_a_function_of_the_step():
    data = make_data(Digits(source="digits", form="images", augment=EVERYTHING), Shapes({}))
    one, same, other = (data.change(data.train, torch.arange(20), draw(s)) for s in (4, 4, 5))
    assert torch.equal(one.inputs["image"], same.inputs["image"]) and torch.equal(one.mixed[1], same.mixed[1])
    assert not torch.equal(one.inputs["image"], other.inputs["image"])
    assert one.inputs["image"].shape == (20, 1, 8, 8) and torch.equal(one.labels, data.train.labels[:20])
    half = one[torch.arange(0, 20, 2)].to(torch.float32)
    assert torch.equal(half.mixed[0], one.mixed[0][::2]) and half.mixed[1].dtype == torch.float32


# --- mean and standard deviation -------------------------------------------------------------------------------------


def arrays(folder, made, labels=None):
    np.save(folder / "x.npy", made)
    np.save(folder / "y.npy", np.arange(len(made)) % 2 if labels is None else labels)
    return {"source": "images", "arrays": (str(folder / "x.npy"), str(folder / "y.npy")), "validation": 10.0}


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_of_the_training_pictures_the_mean_is_zero_and_the_deviation_one(tmp_path, unit):
    made = unit * (np.random.default_rng(0).random((50, 4, 6, 2)) * np.array([1.0, 5.0]) + np.array([3.0, -2.0]))
    data = make_data(Images(**arrays(tmp_path, made), normalise="data"), Shapes({}))
    image = data.train.whole().inputs["image"].double()
    assert torch.allclose(image.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-5)
    assert torch.allclose(image.std((0, 2, 3), correction=0), torch.ones(2).double(), atol=1e-5)
    kept = data.kept["normalise"]
    held = data.validation.whole().inputs["image"].double()
    back = held * torch.tensor(kept["std"])[:, None, None] + torch.tensor(kept["mean"])[:, None, None]
    rows = made.transpose(0, 3, 1, 2).reshape(50, -1)
    for row in back.flatten(1).numpy():
        assert abs(rows - row).max(1).min() < 1e-5 * unit


def test_numbers_are_taken_as_they_are_and_what_is_erased_is_the_mean(tmp_path):
    made = np.full((20, 6, 6, 3), 51, dtype=np.uint8)
    settings = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}
    data = make_data(Images(**arrays(tmp_path, made), normalise=settings, augment=Augment(erase=1.0)), Shapes({}))
    expected = torch.tensor([0.2, 0.0, -0.05])[:, None, None].expand(3, 6, 6)
    assert torch.allclose(data.validation.whole().inputs["image"][0], expected)
    (changed,) = data.change(data.train, torch.tensor([0]), draw()).inputs["image"]
    gone = (changed == 0).all(0)
    assert gone.any() and not gone.all() and torch.allclose(changed[:, ~gone], expected[:, ~gone])


@pytest.mark.parametrize(
    ("normalise", "code", "message"),
    [
        ({"mean": (0.0, 0.0), "std": (1.0,)}, "E511", "mean: 2 numbers for 3 channels"),
        ("data", "E504", "the same value in channel 1"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(tmp_path, normalise, code, message):
    made = np.random.default_rng(0).random((20, 4, 4, 3))
    made[..., 1] = 0.3
    with pytest.raises(SpecError, match=message) as caught:
        make_data(Images(**arrays(tmp_path, made), normalise=normalise), Shapes({}))
    assert caught.value.code == code


SPEC = """
name: pets
use: crate
dims: {d: 8, K: 2, p: 4}
unroll: {layers: 1}
model:
  embed: {kind: patches, image: [3, 6, 6], patch: 3, norm: after}
  head: {kind: mean, classes: 2}
data: {source: images, arrays: [X, Y], normalise: data}
train: {loss: cross_entropy, steps: 20, batch: 10, keep: last}
"""


def test_a_run_keeps_the_scale_and_is_measured_in_it(tmp_path):
    made = np.random.default_rng(0).integers(256, size=(60, 6, 6, 3), dtype=np.uint8)
    arrays(tmp_path, made)
    spec = SPEC.replace("X", str(tmp_path / "x.npy")).replace("Y", str(tmp_path / "y.npy"))
    run = train(spec, out=tmp_path / "run", quiet=True)
    kept = json.loads((tmp_path / "run" / "data.json").read_text())["normalise"]
    assert np.allclose(kept["mean"], made.mean((0, 1, 2)) / 255, atol=0.02) and np.allclose(
        kept["std"], 0.29, atol=0.02
    )
    rows = [{**r.to_dict(), "micros": 0} for r in evaluate(tmp_path / "run", quiet=True).table]
    assert rows == [{**r.to_dict(), "micros": 0} for r in run.table]
