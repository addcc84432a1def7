"""What a spec may say: one frozen record per section, one line per field.

A field that is added here is at once checked, offered by editors (`spec.schema.json`, see `write_schema`) and
settable from the command line by its dotted path. An objective and a spec are the same record.
"""

from __future__ import annotations

import json
import keyword
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_DIM = 10_000_000
MAX_FORMULA = 10_000
SIGNATURE = re.compile(r"\s*(\w+)\s*\(\s*(\w+(?:\s*,\s*\w+)*)\s*\)\s*")


class Record(BaseModel):
    """Every section: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


# --- what a value may be -------------------------------------------------------------------------------------------


def _name(text: str) -> str:
    """A name that can be used in formulas and, mangled in one place, in the emitted code."""
    if keyword.iskeyword(text):
        hint = "write 'lam'" if text == "lambda" else f"write '{text}_'"
        message = "'{word}' is a word of Python and cannot be a name"
        raise PydanticCustomError("E206", message, {"word": text, "hint": hint})
    if not text.isidentifier() or text.startswith("_") or len(text) > 64:
        rule = "a letter (Greek too), then letters, digits and _, 64 at most"
        raise PydanticCustomError("E206", "'{word}' cannot be a name", {"word": text[:64], "hint": f"names are {rule}"})
    if (same := unicodedata.normalize("NFKC", text)) != text:
        hint = f"write '{same}'"
        raise PydanticCustomError("E206", "'{word}' is spelt with look-alike letters", {"word": text, "hint": hint})
    return text


def _signature(text: str) -> str:
    match = SIGNATURE.fullmatch(text)
    if not match:
        hint = 'write its arguments with it: "R(Y)"'
        raise PydanticCustomError("E206", "'{word}' does not declare a function", {"word": text[:64], "hint": hint})
    words = [_name(word) for word in re.findall(r"\w+", text)]
    if len(set(words)) < len(words):
        raise PydanticCustomError("E206", "'{word}' uses a name twice", {"word": text[:64]})
    return text


def _number_is_formula(value: object) -> object:
    return value if isinstance(value, bool) or not isinstance(value, int | float) else str(value)


def _short_tensor(value: object) -> object:
    return {"shape": value} if isinstance(value, tuple) else value


def _short_scalar(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"default": value, "positive": value > 0}
    return {} if value is None else value


def _finite_size(value: int | str) -> int | str:
    if isinstance(value, int) and not 1 <= value <= MAX_DIM:
        context = {"most": f"{MAX_DIM:,}", "value": f"{value:,}"}
        raise PydanticCustomError("E205", "a size is between 1 and {most}, not {value}", context)
    if isinstance(value, str) and re.fullmatch(r"[-+\d_,. ]*", value):
        hint = f"write {re.sub(r'[^0-9]', '', value) or 'n'}"
        raise PydanticCustomError("E203", "'{word}' is not a whole number", {"word": value[:40], "hint": hint})
    return value


Name = Annotated[str, AfterValidator(_name)]
Signature = Annotated[str, AfterValidator(_signature)]
Formula = Annotated[
    str,
    BeforeValidator(_number_is_formula, json_schema_input_type=str | float),
    Field(min_length=1, max_length=MAX_FORMULA),
]
Text = Annotated[str, Field(max_length=MAX_FORMULA)]
Size = Annotated[int | str, AfterValidator(_finite_size)]
Shape = Annotated[tuple[Size, ...], Field(max_length=3)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


# --- the objective -------------------------------------------------------------------------------------------------


class Tensor(Record):
    """A variable or an input, in the shape that formulas see; `[n]` is short for `{shape: [n]}`."""

    shape: Shape
    about: Text = ""


class Parameter(Tensor):
    """A given tensor. A leading dim that `sum(... for k in K)` runs over makes it a family."""

    columns: Literal["unit"] | None = None
    """columns of length one"""
    orthonormal: bool = False
    """orthonormal columns"""
    symmetric: bool = False
    positive: bool = False
    """no negative entries"""
    init: Literal["gaussian", "unit_columns", "orthonormal", "identity", "zeros", "ones"] | None = None
    """its value where none is given"""


class Number(Record):
    """A scalar of the objective; `0.1` is short for `{default: 0.1, positive: true}`."""

    default: float | None = None
    positive: bool = False
    min: float | None = None
    max: float | None = None
    about: Text = ""


TensorField = Annotated[Tensor, BeforeValidator(_short_tensor, json_schema_input_type=Shape | Tensor)]
ParameterField = Annotated[Parameter, BeforeValidator(_short_tensor, json_schema_input_type=Shape | Parameter)]
NumberField = Annotated[Number, BeforeValidator(_short_scalar, json_schema_input_type=float | Number | None)]


# --- the network ---------------------------------------------------------------------------------------------------


class Learn(Record):
    """A free parameter in place of a derived sub-expression; it starts at the value that it replaces."""

    replaces: Formula
    """the sub-expression, as `unroll show` prints it or any text equal to it"""
    share: Literal["layers", "none"] = "none"
    """layers: one for all; none: one per layer"""
    where: str | None = None
    """which occurrences: gradient, prox, output ..; all if left out"""
    shape: Shape | None = None
    """expand a scalar to this shape"""
    positive: bool = False
    symmetric: bool = False
    columns: Literal["unit"] | None = None
    bias: bool = False
    about: Text = ""


class Surrogate(Record):
    """A term replaced by a simpler one, under a stated assumption."""

    replaces: Name
    by: Formula
    assumes: Formula


class Scheme(Record):
    """The steps of an algorithm: what `unroll` and each of its blocks have in common."""

    step: Formula = "1/L"
    """step size: 1/L (the Lipschitz constant is derived), a number, or a formula"""
    momentum: Formula | None = None
    restart: str | None = None
    rewrites: tuple[Formula, ...] = ()
    """named identities and approximations, in this order"""
    learn: dict[Name, Learn] = {}
    gauge: dict[Name, Formula] = {}
    normalise: str | None = None


class Block(Scheme):
    """One half-step of an alternating layer."""

    block: Name
    algorithm: str
    terms: tuple[Name, ...] = ()
    steps: Count = 1
    surrogate: Surrogate | None = None
    constraint: Formula | None = None
    start: Formula | None = None


class Unroll(Scheme):
    """How the objective becomes layers."""

    algorithm: str | None = None
    layers: Annotated[int, Field(ge=1, le=10_000)] | Literal["equilibrium"]
    start: dict[Name, Formula] = {}
    """variable -> its value before the first layer; zero if left out"""
    parametrisation: str | None = None
    """a preset of `learn` (and more); what is written here goes before it"""
    blocks: tuple[Block, ...] = ()


# --- data ----------------------------------------------------------------------------------------------------------


class Dictionary(Record):
    """Learn a parameter from the data before the network: sparse codes and unit-column steps in turn."""

    learn: Name
    """the parameter, such as A"""
    rounds: Count = 100
    batch: Count = 2048
    unused: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """an atom used more rarely than this is replaced"""
    seed: Seed = 0


class DataSettings(Record):
    """What every source of data has."""

    input: Name | None = None
    """the input that samples are fed to; may be left out where there is one"""
    dictionary: Dictionary | None = None


class Patches(DataSettings):
    """Square grey patches of scikit-learn's two photographs."""

    source: Literal["patches"]
    size: Annotated[int, Field(ge=2, le=64)] = 8
    train: Count = 20_000
    validation: Count = 4_096
    whiten: Literal["zca", "pca", "none"] = "zca"
    eps: Positive = 1e-3
    """added to each eigenvalue, in units of the largest one"""
    norm: Literal["unit", "none"] = "unit"
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.02
    """patches with a smaller standard deviation are left out"""
    seed: Seed = 0


class Augment(Record):
    """Training pictures are changed at random, anew in every step."""

    shift: Annotated[int, Field(ge=0, le=64)] = 0
    """largest shift in pixels, up, down, left and right; zeros come in at the border"""
    flip: bool = False
    """left and right swapped, every second time"""


class Digits(DataSettings):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, with their labels."""

    source: Literal["digits"]
    form: Literal["vectors", "images"] = "vectors"
    """vectors of 64 for an input of the problem, or images of 1 x 8 x 8 for the input `image` of a model"""
    validation: Annotated[int, Field(ge=1, le=1_700)] = 297
    norm: Literal["unit", "none"] = "none"
    augment: Augment | None = None
    """of images only"""
    seed: Seed = 0


class Images(DataSettings):
    """A folder of pictures, FOLDER/CLASS/FILE; or FOLDER/train/CLASS/FILE and FOLDER/val/CLASS/FILE."""

    source: Literal["images"]
    folder: str
    size: Annotated[int, Field(ge=2, le=1024)]
    """pixels of a side: the middle square of a picture is scaled to it"""
    channels: Literal[1, 3] = 3
    """1 grey, 3 colour"""
    validation: Positive = 0.1
    """how many are held out where there are no train and val; below 1, a share of all"""
    augment: Augment | None = None
    seed: Seed = 0


class Characters(DataSettings):
    """Text, one token per character; the end of it is held out."""

    source: Literal["text"]
    text: str
    """`python documentation`, `python library`, or the path of a UTF-8 file"""
    length: Annotated[int, Field(ge=1, le=65_536)] = 128
    """characters in a sample"""
    characters: Count | None = None
    """read so many from the start; all if left out"""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """the share that is held out"""


class Synthetic(DataSettings):
    """x = A z + noise with sparse z; sizes are those of the problem."""

    source: Literal["synthetic"]
    train: Count = 20_000
    validation: Count = 2_000
    sparsity: Share = 0.1
    """probability that an entry of z is not zero"""
    snr: float | None = None
    """in dB; no noise if left out"""
    condition: Annotated[float, Field(ge=1)] | None = None
    """ratio of the extreme singular values of A; unit columns if left out"""
    nonnegative: bool = False
    seed: Seed = 0


class Files(DataSettings):
    """Arrays from .npy, .npz and .pt files, stored batch first."""

    source: Literal["file"]
    files: dict[Name, str]
    """name of an input, variable or parameter -> path"""
    validation: Positive = 0.1
    """how many samples are held out; below 1, a share of all"""
    seed: Seed = 0


Data = Annotated[Patches | Digits | Images | Characters | Synthetic | Files, Field(discriminator="source")]


# --- training ------------------------------------------------------------------------------------------------------


class Rates(Record):
    """Learning rates by kind of parameter."""

    matrices: Positive = 1e-3
    """of biases, norms and positions too"""
    scalars: Positive = 1e-2
    """of learned step sizes and thresholds"""


class Train(Record):
    """How the free parameters are fitted."""

    loss: Literal["mse", "nmse", "objective", "cross_entropy", "masked_mse"] = "nmse"
    """mse, nmse: against the true or converged value; objective: no target needed; of a model, cross_entropy: against
    labels or the next character, masked_mse: of the patches that were hidden"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """cross_entropy: this share of each label is spread over all classes; not in what is measured on held-out data"""
    target: Literal["truth", "optimum"] | None = None
    """what mse and nmse compare with; if left out, the truth where the data have it, else the converged optimum"""
    layer_weights: Literal["last", "uniform", "linear"] | tuple[Annotated[float, Field(ge=0)], ...] = "last"
    """what the loss of each layer counts"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive | Rates = Rates()
    """one number is for matrices; learned step sizes and thresholds then learn ten times as fast"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """how the learning rate falls: over the steps, or over the minutes where only they are given"""
    warmup: Annotated[int, Field(ge=0)] = 0
    """steps in which the learning rate grows from 0"""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """the share of the learning rate at which the cosine ends"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of sgd"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """of matrices alone; run.json lists which parameters those are"""
    stages: Literal["end_to_end", "layerwise"] = "end_to_end"
    refine: Share = 0.5
    """layerwise: the share of the steps in which, at the end, all layers are trained together"""
    epochs: Count | None = None
    """20 if neither epochs, steps nor minutes are given"""
    steps: Count | None = None
    """in place of epochs"""
    batch: Count = 256
    """samples per step, over all devices together"""
    validate_every: Count | None = None
    """steps between two measurements on held-out data; an epoch, but at most 500, if left out"""
    keep: Literal["best", "last"] = "best"
    """which weights remain: the best on held-out data, or the last"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """measure and keep the mean of the weights of all steps, each counting this much less than the next"""
    baselines: tuple[str, ...] = ("fista",)
    """algorithms of the same depth that the closing table compares with"""
    tensorboard: bool = False
    seed: Seed = 0
    patience: Count | None = None
    """stop after so many measurements without improvement"""
    clip: Positive | None = None
    """largest norm of a gradient"""
    minutes: Positive | None = None
    """stop after so much time"""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"


# --- the whole -----------------------------------------------------------------------------------------------------


class Document(Record):
    """An optimisation problem and, if it is to become a network, how."""

    use: str | None = None
    """the objective or spec that this one builds on: a name of the library or the path of a .yaml file"""
    objective: str | None = None
    """name of the objective"""
    name: str | None = None
    """name of the network; the file's name if left out"""
    about: Text = ""
    source: Text = ""
    tags: tuple[str, ...] = ()
    dims: dict[Name, Size] = {}
    """size, or the word dynamic, or what the size means"""
    variables: dict[Name, TensorField] = {}
    inputs: dict[Name, TensorField] = {}
    parameters: dict[Name, ParameterField] = {}
    scalars: dict[Name, NumberField] = {}
    functions: dict[Signature, Formula] = {}
    """"R(Y)": formula"""
    minimize: Formula | dict[Name, Formula] | None = None
    """the objective, or its terms by name"""
    maximize: Formula | dict[Name, Formula] | None = None
    constraints: tuple[Formula, ...] = ()
    unroll: Unroll | None = None
    data: Data | None = None
    train: Train | None = None
    model: dict[str, Any] = {}
    weights: dict[str, Any] = {}


def schema_text() -> str:
    """The JSON Schema of a spec, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schema(path: Path = Path(__file__).parent / "spec.schema.json") -> None:
    path.write_text(schema_text(), encoding="utf-8")
