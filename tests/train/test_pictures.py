"""Pictures that stay on disk: pixel by pixel what was written, wherever they lie and whoever reads them."""

import gc
import io
import multiprocessing
import signal
import tarfile
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unroll.train.pictures as module
import unroll.train.shelves as shelves
from unroll.errors import SpecError
from unroll.model.module import Model
from unroll.spec.schema import Augment, Images, RandAugment
from unroll.train import Interrupted, evaluate, resume, train
from unroll.train.data import make_data
from unroll.train.engine import Batches
from unroll.train.samples import Shapes
from unroll.train.shelves import middle, part_of, read_picture

NONE = Shapes({})


def stand(step):
    """A trainer that stands at a step."""
    loop = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=step)))
    return SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop), global_rank=0, world_size=1)


# --- a folder of pictures --------------------------------------------------------------------------------------------


def paint(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def shown(path, size, channels):
    return read_picture(path, str(path), (size, size), channels, middle((size, size)))


def pets(folder, names=("cats", "dogs"), count=5, size=6):
    """{name of a class: pictures in the order of their files}."""
    draw, made = np.random.default_rng(0), {}
    for name in names:
        made[name] = draw.integers(256, size=(count, size, size, 3), dtype=np.uint8)
        for k, pixels in enumerate(made[name]):
            paint(folder / name / f"{k}.png", pixels)
    return made


def images(folder, **changes):
    return make_data(Images(source="images", folder=str(folder), **{"size": 6, "validation": 3.0, **changes}), NONE)


def test_pictures_come_back_pixel_by_pixel_with_the_class_of_their_folder(tmp_path):
    made = pets(tmp_path)
    data = images(tmp_path)
    assert (len(data.train), len(data.validation)) == (7, 3) and data.kept["classes"] == ["cats", "dogs"]
    assert data.sizes == {"classes": 2, "channels": 3, "height": 6, "width": 6}
    seen = set()
    for split in (data.train.whole(), data.validation.whole()):
        for image, label in zip(split.inputs["image"], split.labels.tolist(), strict=True):
            pixels = (image.permute(1, 2, 0).double().numpy() * 255).round().astype(np.uint8)
            (k,) = [k for k, own in enumerate(made[("cats", "dogs")[label]]) if (own == pixels).all()]
            seen.add((label, k))
    assert len(seen) == 10
    same, other = images(tmp_path), images(tmp_path, seed=1)
    assert torch.equal(same.train.whole().inputs["image"], data.train.whole().inputs["image"])
    assert not torch.equal(other.train.whole().inputs["image"], data.train.whole().inputs["image"])


def test_train_and_val_folders_are_the_split(tmp_path):
    made = pets(tmp_path / "train"), pets(tmp_path / "val", count=2)
    data = images(tmp_path)
    for split, part in zip((data.train.whole(), data.validation.whole()), made, strict=True):
        own = np.concatenate([part["cats"], part["dogs"]]).transpose(0, 3, 1, 2)
        assert np.array_equal((split.inputs["image"].double().numpy() * 255).round(), own)
        assert split.labels.tolist() == [0] * len(part["cats"]) + [1] * len(part["dogs"])


def test_grey_is_the_luma_of_the_colours(tmp_path):
    made = pets(tmp_path)
    data = images(tmp_path, channels=1)
    grey = np.concatenate([made["cats"], made["dogs"]]) @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    found = (
        torch.cat([part.whole().inputs["image"] for part in (data.train, data.validation)])[:, 0].double().numpy() * 255
    )
    for image in found:
        assert min(abs(image - own).max() for own in grey) <= 1


def test_a_palette_with_transparent_colours_is_a_picture(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(colours).convert("P").save(tmp_path / "p.png", transparency=bytes([0] * 10 + [255] * 246))
    found = shown(tmp_path / "p.png", 8, 1)[0]
    assert torch.allclose(found * 255, torch.from_numpy(colours).float(), atol=1.01)


def test_the_middle_square_of_an_upright_picture_is_scaled(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (200, 100, 50)
    paint(tmp_path / "wide.png", wide)
    expected = torch.tensor([200.0, 100, 50])[:, None, None].expand(3, 5, 5) / 255
    assert torch.allclose(shown(tmp_path / "wide.png", 5, 3), expected)
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:4] = 255  # the upper half is white; the file says: turn by 90 degrees clockwise
    tags = Image.Exif()
    tags[0x0112] = 6
    paint(tmp_path / "turned.png", half, exif=tags)
    turned = shown(tmp_path / "turned.png", 8, 1)[0]
    assert (turned[:, 4:] == 1).all() and (turned[:, :4] == 0).all()


def spoil(folder, kind):
    path = folder / "dogs" / "bad.png"
    match kind:
        case "words":
            path.write_text("no picture")
        case "cut short":
            path.write_bytes((folder / "dogs" / "0.png").read_bytes()[:60])
        case "sixteen bits":
            paint(path, np.zeros((6, 6), dtype=np.uint16))
        case "empty":
            path.write_bytes(b"")
        case "huge":
            paint(path, np.zeros((40, 40, 3), dtype=np.uint8))
    return path


@pytest.mark.parametrize("kind", ["words", "cut short", "sixteen bits", "empty", "huge"])
def test_a_file_that_is_no_picture_is_named(tmp_path, monkeypatch, kind):
    pets(tmp_path)
    path = spoil(tmp_path, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SpecError) as caught:
        images(tmp_path)
    assert caught.value.code == "E513" and str(path) in caught.value.message


def test_files_that_are_no_pictures_by_name_are_counted_and_hidden_ones_are_not(tmp_path):
    pets(tmp_path)
    (tmp_path / "cats" / "labels.txt").write_text("cats")
    (tmp_path / "cats" / ".hidden.txt").write_text("")
    (note,) = images(tmp_path).notes
    assert note.startswith("1 files are no pictures") and "labels.txt" in note


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: None, "E507", "holds 0 folders, one per class is needed"),
        (lambda p: pets(p, ("cats",)), "E507", "holds 1 folders"),
        (lambda p: (pets(p), (p / "birds").mkdir()), "E504", "birds' holds no picture"),
        (lambda p: (pets(p / "train"), pets(p / "val", ("cats", "birds"))), "E507", "classes: birds, dogs"),
        (lambda p: pets(p, count=1), "E504", "cannot hold out 3 of 2"),
    ],
)
def test_a_folder_without_classes_or_pictures_says_so(tmp_path, make, code, message):
    make(tmp_path)
    with pytest.raises(SpecError, match=message) as caught:
        images(tmp_path)
    assert caught.value.code == code


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match="there is no folder") as caught:
        images(tmp_path / "nowhere")
    assert caught.value.code == "E502"


# --- tar files and arrays --------------------------------------------------------------------------------------------


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def pixels(count=6, height=5, width=7, channels=3, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, height, width, channels), dtype=np.uint8)


def written(folder, form, made, labels):
    """The same pictures in another place -> the settings that read them."""
    if form == "numbers":
        for s, rows in enumerate(np.array_split(np.arange(len(made)), 2)):
            own = {f"{k:03}.seg.png": png(made[k]) for k in rows} | {f"{k:03}.cls": b"%d" % labels[k] for k in rows}
            pack(folder / f"{s}.tar", own)
        return {"shards": (str(folder / "*.tar"),), "size": made.shape[1:3]}
    if form == "names":
        pack(folder / "0.tar", {f"all/{'ab'[labels[k]]}/{k:03}.png": png(p) for k, p in enumerate(made)})
        return {"shards": (str(folder / "0.tar"),), "size": made.shape[1:3]}
    if form == "folder":
        for k, p in enumerate(made):
            paint(folder / "top" / "ab"[labels[k]] / f"{k}.png", p)
        return {"folder": str(folder / "top"), "size": made.shape[1:3]}
    if form == "npz":
        np.savez(folder / "x.npz", image=made, labels=labels)
        return {"arrays": (str(folder / "x.npz"), str(folder / "x.npz"))}
    first = form == "channels_first"
    np.save(folder / "x.npy", made.transpose(0, 3, 1, 2) if first else made)
    np.save(folder / "y.npy", labels[:, None])  # a column, as some sets have it
    return {"arrays": (str(folder / "x.npy"), str(folder / "y.npy")), "order": form}


def read(**settings):
    return make_data(Images(source="images", **{"validation": 2.0, **settings}), NONE)


FORMS = ["folder", "numbers", "names", "npz", "channels_last", "channels_first"]


@pytest.mark.parametrize("form", FORMS)
def test_pictures_are_the_same_wherever_they_lie(tmp_path, form):
    made, labels = pixels(), np.array([0, 1, 1, 0, 1, 0])
    data = read(**written(tmp_path, form, made, labels))
    seen = set()
    for split in (data.train, data.validation):
        assert torch.equal(split.labels, split.whole().labels)
        for image, label in zip(split.whole().inputs["image"], split.labels.tolist(), strict=True):
            own = (image.permute(1, 2, 0).numpy() * 255).round()
            (k,) = [k for k in range(6) if (own == made[k]).all()]
            assert labels[k] == label
            seen.add(k)
    assert seen == set(range(6)) and len(data.validation) == 2
    assert data.sizes == {"classes": 2, "channels": 3, "height": 5, "width": 7}
    assert data.kept["classes"] == (["a", "b"] if form in ("folder", "names") else ["0", "1"])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_out_may_lie_elsewhere(tmp_path, form):
    parts = []
    for part, count in (("one", 6), ("two", 3)):
        (tmp_path / part).mkdir()
        parts.append(written(tmp_path / part, form, pixels(count), np.array([0, 1, 1, 0, 1, 0])[:count]))
    held = next(parts[1][word] for word in ("folder", "shards", "arrays") if word in parts[1])
    data = read(**parts[0], held=(held,) if isinstance(held, str) else held)
    assert (len(data.train), len(data.validation)) == (6, 3)
    assert torch.equal(data.validation.whole().inputs["image"], data.train.whole().inputs["image"][:3]) == (
        form not in ("folder",)  # which lie by class
    )


def test_numbers_of_an_array_become_zero_to_one_and_fractions_stay(tmp_path):
    labels = np.arange(4)
    np.save(tmp_path / "y.npy", labels)
    for kind, white in (("uint8", 255), ("uint16", 65535), (">u2", 65535), ("bool", 1), ("float64", 1.0)):
        made = np.zeros((4, 3, 5), dtype=kind)
        made[:, 0, 0] = white
        np.save(tmp_path / "x.npy", made)
        shelves._mapped.cache_clear()
        image = read(arrays=(str(tmp_path / "x.npy"), str(tmp_path / "y.npy")), validation=1.0).train[:].inputs["image"]
        assert image.shape == (3, 1, 3, 5) and image.dtype == torch.float32
        assert (image[:, 0, 0, 0] == 1).all() and image.sum() == 3, kind


def damaged(folder, kind):
    """Settings that read something wrong, its code, and what the message names."""
    made, labels = pixels(), np.array([0, 1, 1, 0, 1, 0])
    tar, x, y = (str(folder / name) for name in ("0.tar", "x.npy", "y.npy"))
    np.save(x, made)
    np.save(y, labels)
    shards, arrays = {"shards": (tar,), "size": 5}, {"arrays": (x, y)}
    match kind:
        case "no tar":
            return shards, "E502", "no file '.*0.tar'"
        case "text":
            (folder / "0.tar").write_text("no archive" * 100)
            return shards, "E503", "0.tar' cannot be read as a tar file"
        case "compressed":
            with tarfile.open(tar, "w:gz") as archive:
                archive.add(x, "x.png")
            return shards, "E503", "0.tar' cannot be read"
        case "empty tar":
            pack(tar, {"a.txt": b""})
            return shards, "E504", "0.tar: no picture in 1 tar files"
        case "no class":
            pack(tar, {"a.png": png(made[0]), "b.png": png(made[1])})
            return shards, "E507", "0.tar: a.png' has no class"
        case "one without a class":
            pack(tar, {"a.png": png(made[0]), "a.cls": b"0", "b.png": png(made[1])})
            return shards, "E507", "0.tar: b.png' has no class"
        case "no number":
            pack(tar, {"a.png": png(made[0]), "a.cls": b"cat"})
            return shards, "E506", "a.cls' holds 'cat'"
        case "broken picture":
            body = png(made[0])
            pack(tar, {"a/0.png": body, "a/1.png": body[:-40], "b/0.png": body, "b/1.png": b""})
            return shards, "E513", "0.tar: (a|b)/1.png'"
        case "objects":
            np.save(x, np.array([{}] * 6), allow_pickle=True)
            return arrays, "E503", "x.npy' is no array"
        case "one axis":
            np.save(x, np.zeros(6))
            return arrays, "E504", "x.npy' is 6"
        case "no images":
            np.save(x, np.zeros((0, 5, 5)))
            return arrays, "E504", "x.npy' is 0 × 5 × 5"
        case "few labels":
            np.save(y, labels[:5])
            return arrays, "E504", "y.npy' is 5, and there are 6 images"
        case "fractions":
            np.save(y, labels / 2)
            return arrays, "E506", "y.npy' holds float64"
        case "complex":
            np.save(x, made.astype(complex))
            return arrays, "E506", "x.npy' holds complex128"
        case "nan":
            np.save(x, np.where(made == made[3, 2, 2, 1], np.nan, made))
            return arrays, "E505", "x.npy' has values that are not finite in picture"
        case "other shape":
            np.save(folder / "z.npy", made[:, :4])
            return arrays | {"held": (str(folder / "z.npy"), y)}, "E504", "x.npy' and '.*z.npy' differ in the shape"
        case "which array":
            np.savez(folder / "x.npz", one=made, two=labels)
            return {"arrays": (str(folder / "x.npz"), y)}, "E507", "holds no array 'image'"
        case "nothing":
            return {"size": 5}, "E511", "needs one of folder:, shards: and arrays:"
        case "two places":
            return arrays | {"shards": (tar,)}, "E511", "and has shards and arrays"
        case "size of an array":
            return arrays | {"size": 5}, "E511", "size: arrays are as they are"
        case "channels of an array":
            return arrays | {"channels": 3}, "E511", "channels: arrays are as they are"
        case "held of an array":
            return arrays | {"held": (x,)}, "E511", "held: 1 files"
        case "no size":
            pets(folder / "top")
            return {"folder": str(folder / "top")}, "E511", "size: is needed"
        case "order of a folder":
            pets(folder / "top")
            return {"folder": str(folder / "top"), "size": 5, "order": "channels_first"}, "E511", "order: is for arrays"
        case "held twice":
            pets(folder / "top" / "train")
            pets(folder / "top" / "val")
            return {"folder": str(folder / "top"), "size": 5, "held": (tar,)}, "E511", "has a folder val already"
        case "two labels":
            pack(tar, {"a.png": png(made[0]), "a.cls": b"0", "a.x.cls": b"1"})
            return shards, "E506", "0.tar' holds a second label for one picture, a.x.cls"
        case "a mask":
            pack(tar, {"a.png": png(made[0]), "a.mask.png": png(made[1]), "a.cls": b"0"})
            return shards, "E507", "0.tar' holds a.png and a.mask.png, with one label for both"
        case "numbers of pictures":
            pack(tar, {"a.png": png(made[0]), "a.cls": b"0", "b.png": png(made[1]), "b.cls": b"9" * 20})
            return shards, "E506", "a label is 99,999,999,999,999,999,999, and there are 2 pictures"
        case "identifiers":
            np.save(y, labels + 1_000_000)
            return arrays, "E506", "y.npy': a label is 1,000,001, and there are 6 pictures"
        case "wide numbers":
            np.save(y, labels.astype(np.uint64) + np.uint64(2**63))
            return arrays, "E506", "a label is 9,223,372,036,854,775,809,"
        case "no labels":
            np.save(y, labels - 2)
            return arrays, "E507", "y.npy': all labels are below 0"
        case "other classes":
            pets(folder / "top")
            pets(folder / "held", ("cats", "birds"))
            settings = {"folder": str(folder / "top"), "size": 5, "held": (str(folder / "held"),)}
            return settings, "E507", "differs in its classes: birds, dogs"


@pytest.mark.parametrize(
    "kind",
    [
        "no tar",
        "text",
        "compressed",
        "empty tar",
        "no class",
        "one without a class",
        "no number",
        "broken picture",
        "objects",
        "one axis",
        "no images",
        "few labels",
        "fractions",
        "complex",
        "nan",
        "other shape",
        "which array",
        "nothing",
        "two places",
        "size of an array",
        "channels of an array",
        "held of an array",
        "no size",
        "order of a folder",
        "held twice",
        "two labels",
        "a mask",
        "numbers of pictures",
        "identifiers",
        "wide numbers",
        "no labels",
        "other classes",
    ],
)
def test_what_is_wrong_is_named(tmp_path, kind):
    settings, code, message = damaged(tmp_path, kind)
    with pytest.raises(SpecError, match=message) as caught:
        read(**settings)
    assert caught.value.code == code


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 6), (6, 3), (1, 9)])
def test_the_middle_has_the_proportions_that_are_asked_for(height, width):
    for wide, high in ((40, 30), (30, 40), (7, 50), (3, 3)):
        left, top, right, bottom = middle((height, width))(wide, high)
        assert 0 <= left < right <= wide and 0 <= top < bottom <= high
        assert right - left == wide or bottom - top == high
        assert abs((right - left) * height - (bottom - top) * width) <= max(height, width)
        assert abs(left + right - wide) <= 1 and abs(top + bottom - high) <= 1


def test_a_part_of_an_array_is_what_pillow_makes_of_it():
    image = torch.rand(1, 12, 20)
    assert torch.equal(part_of(image, (12, 20), lambda w, h: (0, 0, w, h)), image)
    found = part_of(image, (4, 6), lambda w, h: (3, 1, 15, 9))
    own = Image.fromarray(image[0, 1:9, 3:15].numpy()).resize((6, 4), Image.Resampling.BICUBIC)
    part = image[0, 1:9, 3:15]
    assert torch.allclose(found[0], torch.from_numpy(np.array(own)).clamp(part.min(), part.max()), atol=1e-5)


EVERYTHING = Augment(crop=(0.3, 1.0), shift=2, flip=True, rand_augment=RandAugment(), erase=0.5, mixup=0.8, cutmix=1.0)


# --- by other processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "numbers", "channels_last"])
def test_batches_are_the_same_whoever_reads_them(tmp_path, form):
    data = read(**written(tmp_path, form, pixels(10), np.arange(10) % 2), augment=EVERYTHING, normalise="data")
    before = torch.get_rng_state()
    alone, others = (list(Batches(data.train, data.change, 3, 5, 5, stand(1), workers=n)) for n in (0, 2))
    assert torch.equal(before, torch.get_rng_state()) and len(alone) == 4
    for a, b in zip(alone, others, strict=True):
        assert torch.equal(a.inputs["image"], b.inputs["image"]) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(*pair) for pair in zip(a.mixed, b.mixed, strict=True))
    held = [replace(data.validation, workers=n).to(torch.float64) for n in (0, 2)]
    for a, b in zip(*(h.batches(1) for h in held), strict=True):
        assert torch.equal(a.inputs["image"], b.inputs["image"]) and a.inputs["image"].dtype == torch.float64


def test_what_is_wrong_is_named_by_other_processes_too(tmp_path, monkeypatch):
    pets(tmp_path, count=20)
    (tmp_path / "cats" / "7.png").write_bytes(b"")
    monkeypatch.setattr(module, "SHOWN", 1)  # only two are looked at before the training
    data = images(tmp_path)
    with pytest.raises(SpecError, match=r"cats/7.png' cannot be read as a picture") as caught:
        list(Batches(data.train, None, 5, 0, 14, stand(0), workers=2))
    assert caught.value.code == "E513"


SPEC = """
name: pets
use: crate
dims: {d: 8, K: 2, p: 4}
unroll: {layers: 1}
model:
  embed: {kind: patches, image: [3, 6, 6], patch: 3, norm: after}
  head: {kind: mean, classes: 2}
data: {source: images, folder: FOLDER, size: 6, augment: {crop: [0.3, 1.0], rand_augment: {}, mixup: 0.2, cutmix: 1.0}, workers: 2}
train: {loss: cross_entropy, steps: 9, batch: 4, validate_every: 4, keep: last}
"""


def interrupt(spec, at, folder, monkeypatch):
    """Ctrl-C in the forward pass of a step, and going on."""
    forward, calls = Model.forward, []

    def interrupted(self, *args, **more):
        calls.append(self.training)
        if calls.count(True) == at:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **more)

    monkeypatch.setattr(Model, "forward", interrupted)
    with pytest.raises(Interrupted):
        train(spec, out=folder, quiet=True)
    monkeypatch.setattr(Model, "forward", forward)
    assert not (folder / "weights.safetensors").exists()


def test_a_run_with_workers_goes_on_to_the_bit_and_leaves_no_process(tmp_path, monkeypatch):
    pets(tmp_path / "pets", count=9)
    spec = SPEC.replace("FOLDER", str(tmp_path / "pets"))
    whole = train(spec, overrides=["data.workers=0"], out=tmp_path / "whole", quiet=True)
    interrupt(spec, 6, tmp_path / "cut", monkeypatch)
    resume(tmp_path / "cut", quiet=True)
    interrupt(spec, 6, tmp_path / "other", monkeypatch)
    resume(tmp_path / "other", overrides=["data.workers=0"], quiet=True)
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut", "other")]
    for cut in weights[1:]:
        assert all(torch.equal(weights[0][k], cut[k]) for k in weights[0])
    gc.collect()
    assert not multiprocessing.active_children() and whole.closing.rows
    paint(tmp_path / "pets" / "cats" / "new.png", pixels(1, 6, 6)[0])
    with pytest.raises(SpecError, match="pictures differ") as caught:
        evaluate(tmp_path / "cut", quiet=True)
    assert caught.value.code == "E514"


def test_pictures_are_not_held(tmp_path):
    """60 MB of pictures in tar files: only their places are held, and a batch while it is needed."""
    body = io.BytesIO()
    Image.fromarray(np.zeros((320, 320, 3), dtype=np.uint8)).save(body, format="bmp")
    for s in range(10):
        pack(tmp_path / f"{s}.tar", {f"{'ab'[k % 2]}/{s}_{k}.bmp": body.getvalue() for k in range(20)})
    tracemalloc.start()
    try:
        data = read(shards=(str(tmp_path / "*.tar"),), size=16, validation=0.1)
        for batch in Batches(data.train, None, 20, 0, 9, stand(0)):
            assert batch.inputs["image"].shape == (20, 3, 16, 16)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data.train) == 180 and held < 1e6 and most < 3e6
