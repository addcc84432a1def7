"""What a spec may say: one frozen record per section, one line per field.

A field that is added here is at once checked, offered by editors (`spec.schema.json`, see `write_schema`) and
settable from the command line by its dotted path. An objective and a spec are the same record.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_DIM = 10_000_000
MAX_FORMULA = 10_000
SIGNATURE = re.compile(r"\s*(\w+)\s*\(\s*(\w+(?:\s*,\s*\w+)*)\s*\)\s*")
GROUPS = r"\s*(?:(?:\w+|\(\s*\w+(?:\s+\w+)*\s*\))\s*)+"
AXES = re.compile(f"{GROUPS}->{GROUPS}")
PART = re.compile(r"\s*\d*\s*:\s*\d*\s*(?:,\s*\d*\s*:\s*\d*\s*)*")


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


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _short_norm(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


def _short_start(value: object) -> object:
    return {"start": value} if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _target(text: str) -> str:
    name, bracket, index = text.partition("[")
    _name(name)
    if bracket:
        _name(index.removesuffix("]"))
    return text


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


def _axes(text: str) -> str:
    sides = [re.findall(r"\w+", side) for side in text.split("->")]
    names = [[n for n in side if n != "1"] for side in sides]
    if text and (
        not AXES.fullmatch(text) or sorted(names[0]) != sorted(names[1]) or len(set(names[0])) < len(names[0])
    ):
        hint = 'the same names on both sides, such as "(k p) d -> k d p"'
        raise PydanticCustomError(
            "E221", "'{word}' does not say which axis goes where", {"word": text[:80], "hint": hint}
        )
    return text


def _part(text: str) -> str:
    if text and not PART.fullmatch(text):
        hint = 'a range for each axis, such as "0:384, :"'
        raise PydanticCustomError("E221", "'{word}' is not a part of a tensor", {"word": text[:80], "hint": hint})
    return text


def _even(value: int) -> int:
    if value % 2:
        raise PydanticCustomError("E205", "sines and cosines in turn are an even number, not {value}", {"value": value})
    return value


def _factor(value: float) -> float:
    if not value or not math.isfinite(value):
        raise PydanticCustomError("E205", "a factor is a number, and not 0")
    return value


def _image(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) != 3:
        raise PydanticCustomError("E203", "an image is [channels, height, width]", {"hint": "write [3, 224, 224]"})
    return value


Name = Annotated[str, AfterValidator(_name)]
Target = Annotated[str, AfterValidator(_target)]
"""a name, or the member of an indexed one: w[j]"""
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
Drawn = Literal["torch", "xavier", "kaiming", "normal"]
Share = Annotated[float, Field(gt=0, le=1)]
Spread = Annotated[float, Field(ge=0)]
Image = Annotated[tuple[Count, ...], AfterValidator(_image)]
"""channels, height, width"""
Axes = Annotated[Text, AfterValidator(_axes)]
Part = Annotated[Text, AfterValidator(_part)]
Factor = Annotated[float, AfterValidator(_factor)]


# --- the objective -------------------------------------------------------------------------------------------------


class Tensor(Record):
    """A variable or an input, in the shape that formulas see; `[n]` is short for `{shape: [n]}`."""

    shape: Shape
    family: Size | None = None
    """how many of them there are: a family, of which formulas take one member, M[k]"""
    stored: Literal["as_written", "tokens_first"] | None = None
    """of a matrix, how it is given: with its axes in the order of its shape, or tokens (columns) first, as variables and inputs are"""
    positive: bool = False
    """no negative entries"""
    mask: bool = False
    """of an input [N], N a dynamic size: 1 for what is there, 0 for padding, which whatever is worked out over N leaves out"""
    about: Text = ""

    @property
    def given(self) -> tuple[int | str, ...]:
        """Its sizes in the order in which a variable or an input is given, that of a family first."""
        shape = self.shape if self.family is None else (self.family, *self.shape)
        matrix = len(shape) - (self.family is not None or len(shape) == 3)
        return shape if self.stored == "as_written" or matrix < 2 else (*shape[:-2], shape[-1], shape[-2])


class Parameter(Tensor):
    """A given tensor. A leading dim that `sum(... for k in K)` runs over makes it a family."""

    columns: Literal["unit"] | None = None
    """columns of length one"""
    orthonormal: bool = False
    """orthonormal columns"""
    symmetric: bool = False
    init: Literal["gaussian", "unit_columns", "orthonormal", "tight_frame", "identity", "zeros", "ones"] | None = None
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


class Given(Record):
    """A number in the place of a derived sub-expression."""

    replaces: Formula
    """the sub-expression, as `unroll show` prints it or any text equal to it; a family by its name"""
    in_: str | None = Field(default=None, alias="in")
    """the update of the algorithm in which it stands, as it is before others are put into it; or `start`: where variable and states start"""
    where: str | None = None
    """which occurrences: gradient (what is fed to the prox), prox, output (the outermost factor); all if left out"""
    start: Formula | None = None
    """what it starts at, in place of the value that it replaces; may depend on `layer`: a departure from the algorithm"""
    positive: bool | None = None
    """kept above 0; if left out, a number is where the derivation used its sign, as the strength of a proximal step"""
    bounds: str | None = None
    """what keeps it where it is: softplus (as `positive`), exp, sigmoid(a, b), clamp(a), box(a, b)"""
    about: Text = ""


class Function(Record):
    """A function of one number, by its values at knots that are even on a range: straight between them, or a spline; straight on beyond."""

    knots: Annotated[int, Field(ge=2, le=100_000)] = 101
    range: tuple[float, float]
    """the first knot and the last"""
    degree: Literal[1, 3] = 1
    """1: straight between knots; 3: a cubic spline, the values its coefficients"""
    odd: bool = False
    """f(-x) = -f(x): the values above 0 alone are learned"""
    monotone: bool = False
    """nowhere falling: it is then the proximal step of some penalty"""
    nonexpansive: bool = False
    """slopes between 0 and 1: it is then the proximal step of a convex penalty"""


class Rank(Record):
    """Of a change that is learned: a product of two factors."""

    rank: Count
    """columns of the first factor, rows of the second"""


class Learn(Given):
    """A free parameter in place of a derived sub-expression; it starts at the value that it replaces."""

    share: Literal["layers", "none"] = "none"
    """layers: one for all; none: one per layer"""
    transposed: bool = True
    """its transpose too; false: as it is written alone, so that A.T is learned and A is not"""
    init: Literal["value", "data", "gaussian", "uniform", "zeros", "ones"] = "value"
    """what it starts at: the value that it replaces; the same, worked out on data layer by layer (`net.construct`), where that
    depends on the variable; or a draw of its own in each layer, of variance 1 over its rows, or over fan_in"""
    function: Function | None = None
    """a function of each entry is learned, in the place of a proximal step (`replaces: prox`) or of a formula of one number, `tanh(u)`, u any entry;
    `shape: [n]`: another one for each row"""
    fixed: bool = False
    """not learned: `start` stands in its place for good"""
    scale: Positive = 1.0
    """factor of a drawn start, and of ones"""
    fan_in: Formula | None = None
    """of a drawn start: how many numbers each of its outputs adds, as K*p where all K maps into the output are drawn as one; its rows, if left out"""
    shape: Shape | Rank | None = None
    """[n]: a number for each entry, row or group in the place of one; of a matrix, {rank: r}: what it starts at stays, and a change of this rank is learned, W + W_up @ W_down, from 0"""
    symmetric: bool = False
    columns: Literal["unit"] | None = None
    bias: bool = False
    """add a free vector after the replaced matrix; it starts at 0"""


class Control(Record):
    """A recurrent cell that gives numbers for each sample, anew in each layer; its state lives on from layer to layer."""

    cell: Literal["lstm"] = "lstm"
    hidden: Annotated[int, Field(ge=1, le=4096)] = 32
    """entries of its state"""
    reads: Annotated[tuple[Formula, ...], Field(min_length=1, max_length=16)]
    """numbers of each sample, as they are where the layer begins"""
    gives: Annotated[dict[Name, Given], Field(min_length=1)]
    """name of a number -> what it takes the place of; it starts at that value"""
    about: Text = ""


class Surrogate(Record):
    """Terms replaced by a simpler one, under a stated assumption. NAME0 is the value of the variable NAME where the block begins."""

    replaces: Annotated[tuple[Name, ...], BeforeValidator(_one_or_more, json_schema_input_type=Name | tuple[Name, ...])]
    by: Formula
    """in the sense of the objective: what is maximised, where that is"""
    assumes: Formula
    """a rewrite that says under which assumption, such as incoherent(D)"""


class Normalise(Record):
    """A norm of the variable, where a block begins or ends; `layer_norm` is short for `{kind: layer_norm}`."""

    kind: Literal["layer_norm", "rms_norm", "sphere"]
    eps: Annotated[float, Field(ge=0)] = 1e-5
    affine: bool = True
    """with a free weight and bias (not for sphere)"""
    axis: Literal["columns", "rows"] = "columns"
    """what is normalised: each column (a token), or each row"""
    when: Literal["before", "after"] = "before"


NormaliseField = Annotated[Normalise, BeforeValidator(_short_norm, json_schema_input_type=str | Normalise)]


class Gauge(Record):
    """z <- residual * z + update * (the rest of the derived step), in place of the derived weights."""

    residual: Formula | None = None
    """a number, or a vector with an entry for each row; of the variable before any norm"""
    update: Formula | None = None


class Start(Record):
    """A state of an algorithm, and where it starts; `w: K @ z` is short for `{start: K @ z}`."""

    start: Formula | None = None
    """its first value: in letters of the algorithm, numbers and states above it"""
    like: Formula | None = None
    """as large as this; it starts at 0, or at `start` in every entry"""
    number: Formula | None = None
    """of a state that is one number, the same for every sample: its first value"""
    scaled_by: Formula | None = None
    """numbers that it is a multiple of: 1 / rho. Where they change from layer to layer, what they are multiplied with stays"""


StateField = Annotated[Start, BeforeValidator(_short_start, json_schema_input_type=str | float | Start)]


class Scheme(Record):
    """The steps of an algorithm: what `unroll` and each of its blocks have in common."""

    step: Formula = "1/L"
    """step size: 1/L (the Lipschitz constant is derived), a number, or a formula"""
    momentum: Formula | None = None
    restart: str | None = None
    rewrites: tuple[Formula, ...] = ()
    """named identities and approximations, in this order"""
    split: dict[Name, tuple[Name, ...]] = {}
    """letter of the algorithm -> the terms it takes; the rest is dealt out"""
    numbers: dict[Name, Formula] = {}
    """number of the algorithm -> its value, in place of the algorithm's own; `step: 0.1` is short for `numbers: {step: 0.1}`"""
    updates: dict[Target, Formula] = {}
    """update of the algorithm -> what stands in its place; `derived` is what was there: a declared departure. Another name is an
    update of the spec's own, before the next one that is named here"""
    states: dict[Target, StateField] = {}
    """states of the spec's own, for `updates`"""
    learn: dict[Name, Learn] = {}
    control: Control | None = None
    """a recurrent cell that gives some numbers, in place of learning them"""
    keep: dict[Name, Formula] = {}
    """quantities that `net.construct` works out on the data in every layer, for use in estimates: sum(Pi[k]) / N for k in K"""
    estimate: dict[Name, Formula] = {}
    """input -> a formula for it in the variable and in what is learned, where it is not known (memberships of new samples)"""
    gauge: Gauge | None = None
    """weights chosen by hand: of the variable itself, and of the rest of the step"""
    normalise: NormaliseField | None = None
    dropout: Formula = "0"
    """share of the entries of the update that training leaves out; may depend on `layer` and `layers`"""
    drop_path: Formula = "0"
    """chance that training leaves out the whole update of a sample: 0.1 * layer / layers"""


class Block(Scheme):
    """One part of a layer: some terms, an algorithm, and what of it is learned. Blocks follow one another."""

    block: Name
    algorithm: str | None = None
    """a name, a path, or auto; a block without one leaves what its output says: declared, not derived"""
    over: Name | None = None
    """the variable it is about; may be left out where there is one"""
    variable: dict[Name, TensorField] = {}
    """a variable of this block alone, in place of `over`"""
    terms: tuple[Name, ...] = ()
    """the terms it takes; all that depend on its variable if left out"""
    steps: Count = 1
    surrogate: Surrogate | None = None
    constraint: Formula | None = None
    start: Formula | None = None
    """of its iteration; if left out, the variable as the block before left it, 0 for a variable of its own"""
    output: Formula | None = None
    """what becomes of the variable of the problem; needed where the block has one of its own, or no algorithm"""


class Unroll(Scheme):
    """How the objective becomes layers."""

    algorithm: str | None = None
    """a name of `unroll list algorithms`, the path of a text, or auto: the simplest that fits and claims something of the problem"""
    schedule: dict[Name, Formula] = {}
    """scalar -> its value as a formula of `layer`, 0, 1, .. and `layers`"""
    layers: Annotated[int, Field(ge=1, le=10_000)] | Literal["equilibrium"]
    free: Count | None = None
    """how many layers have learned numbers of their own; all after them share one set, and may be more or fewer in a call"""
    start: dict[Name, Formula] = {}
    """variable -> its value before the first layer; zero if left out"""
    parametrisation: str | None = None
    """a preset of `learn` (and more); what is written here goes before it"""
    blocks: tuple[Block, ...] = ()


# --- an algorithm, as a text -----------------------------------------------------------------------------------------


class Free(Record):
    """A number that an algorithm leaves open, and its value where the spec says nothing; `1/L(f)` is short for `{start: 1/L(f)}`."""

    start: Formula
    above: float | None = 0
    """it is larger than this"""
    below: float | None = None
    """it is smaller than this"""
    about: Text = ""


FreeField = Annotated[Free, BeforeValidator(_short_start, json_schema_input_type=str | float | Free)]


def _short_claim(value: object) -> object:
    match value:
        case str():
            return {"claim": value}
        case Mapping() if "claim" not in value and len(value) == 1:
            ((claim, when),) = cast("Mapping[str, object]", value).items()
            return {"claim": claim, "when": (when,) if isinstance(when, str) else when}
        case _:
            return value


class Claim(Record):
    """What a text says of a problem; `{optimum: step * L(f) < 2}` is short for `{claim: optimum, when: [step * L(f) < 2]}`."""

    claim: Literal["monotone", "optimum"]
    when: tuple[Formula, ...] = ()
    """comparisons of its numbers and of constants of its letters, and what `requires` may say; without one, the numbers as they stand in the text"""


ClaimField = Annotated[
    Claim, BeforeValidator(_short_claim, json_schema_input_type=str | dict[str, str | list[str]] | Claim)
]


class Rule(Record):
    """One way to work out an update: what stands in its place."""

    about: Text = ""
    scalars: dict[Name, FreeField] = {}
    states: dict[Name, StateField] = {}
    updates: dict[Target, Formula] = {}
    notes: dict[Name, Text] = {}


class Algorithm(Record):
    """An algorithm as a text: what it minimises in letters, its states, and its updates from top to bottom."""

    algorithm: Name
    about: Text = ""
    source: Text = ""
    needs: Text = ""
    """of a problem, in words"""
    solves: Formula
    """f(z) + g(K @ z): letters for sums of terms; a term goes to the letter that can take it"""
    requires: tuple[Text, ...] = ()
    """f convex, f not convex, g sets: beyond what the updates need by themselves"""
    scalars: dict[Name, FreeField] = {}
    states: dict[Target, StateField] = {}
    """beside the variable, which is one"""
    updates: dict[Target, Formula]
    """in this order; a later one sees what an earlier one wrote"""
    momenta: dict[Text, Rule] = {}
    """rules that the update `momentum` may name"""
    residuals: dict[Target, Formula] = {}
    """what is 0 at a solution, in states, `last(..)` and numbers; the change of every state, if left out"""
    claims: tuple[ClaimField, ...] = ()
    """monotone: no step raises the objective; optimum: of convex terms, in the limit. `{optimum: step * L(f) < 2}`: under a condition"""
    notes: dict[Name, Text] = {}
    """update -> what the emitted module says of it"""

    @property
    def claimed(self) -> frozenset[str]:
        return frozenset(c.claim for c in self.claims)


# --- the model around the layers -----------------------------------------------------------------------------------


class PatchEmbed(Record):
    """Square patches of an image, row by row, each mapped to a token."""

    kind: Literal["patches"]
    image: Image
    patch: Count
    """side of a patch, in pixels"""
    init: Drawn | None = None
    """how its map starts; as all linear maps, if left out"""
    order: Literal["channels_last", "channels_first"] = "channels_last"
    """of the numbers of a patch: (row, column, channel), or (channel, row, column) as in a convolution"""
    norm: Literal["both", "before", "after", "none"] = "both"
    """layer norm before or after the linear map"""
    eps: Positive = 1e-5


class StemEmbed(Record):
    """Convolutions 3 x 3 of stride 2 with batch norm, GELU between them, until each token stands for a patch."""

    kind: Literal["stem"]
    image: Image
    patch: Count
    """side of the square that a token stands for: a power of 2"""


class TokenEmbed(Record):
    """A table with one row for each word, of which numbers are given."""

    kind: Literal["tokens"]
    vocabulary: Count
    length: Count
    """of the longest text"""
    std: Spread = 0.02


class LinearEmbed(Record):
    """A linear map of each vector."""

    kind: Literal["linear"]
    features: Count
    bias: bool = True


class NoEmbed(Record):
    """The layers take what comes in."""

    kind: Literal["none"]


class LearnedPositions(Record):
    """A free vector for each place, added to its token."""

    kind: Literal["learned"]
    std: Spread = 0.02
    class_token: bool = True
    """one for the class token too"""


class SinusoidalPositions(Record):
    """Fixed sines and cosines of the place; of an image, of column and row."""

    kind: Literal["sinusoidal"]
    base: Positive = 10_000.0


class FourierPositions(Record):
    """A linear map of fixed sines and cosines of row and column."""

    kind: Literal["fourier"]
    waves: Annotated[Count, AfterValidator(_even)] = 32
    """sines and cosines, in turn, of the row, and as many of the column"""
    base: Positive = 10_000.0


class NoPositions(Record):
    """Tokens are a set."""

    kind: Literal["none"]


class ClassToken(Record):
    """A free token before all others."""

    std: Spread = 0.02


class Mask(Record):
    """A free token in the place of patches drawn at random: the layers see all tokens."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    std: Spread = 0.02


class PooledHead(Record):
    """From the class token, the mean of all other tokens, or each of these: a norm and a linear map."""

    kind: Literal["class_token", "mean", "tokens"]
    classes: Count | None = None
    """outputs; if left out, what the layers say is the answer"""
    norm: bool = True
    eps: Positive = 1e-5
    bias: bool = True


class TiedHead(Record):
    """From each token: a norm, and the products with the rows of the table of tokens."""

    kind: Literal["tied"]
    norm: bool = True
    eps: Positive = 1e-5


class ClassAttentionHead(Record):
    """A class token that comes after the layers and reads them by attention; then a norm and a linear map."""

    kind: Literal["class_attention"]
    classes: Count
    heads: Count
    blocks: Count = 2
    std: Spread = 0.02
    """of the class token"""
    scale: Positive = 1.0
    """what the free factors of every update start at"""
    eps: Positive = 1e-6


class Decoder(Record):
    """Layers after the layers, and a linear map of each token to the pixels of its patch."""

    layers: dict[str, Any]
    """a spec; without an objective, that of the layers before it, unrolled in another way"""
    embed: bool = False
    """a linear map between them, where their widths differ"""
    norm_before: bool = True
    """layer norm between them"""
    norm: bool = True
    """layer norm before the linear map to pixels"""
    eps: Positive = 1e-5
    order: Literal["channels_last", "channels_first"] = "channels_last"
    """of the numbers of a patch"""


Embed = Annotated[PatchEmbed | StemEmbed | TokenEmbed | LinearEmbed | NoEmbed, Field(discriminator="kind")]
Positions = Annotated[
    LearnedPositions | SinusoidalPositions | FourierPositions | NoPositions, Field(discriminator="kind")
]
Head = Annotated[PooledHead | TiedHead | ClassAttentionHead, Field(discriminator="kind")]


class Model(Record):
    """What stands around the layers: from images, words or vectors to tokens, and from tokens to the answer."""

    embed: Embed
    positions: Positions | None = None
    class_token: ClassToken | None = None
    mask: Mask | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of the tokens, before the layers"""
    head: Head | None = None
    """tokens as they leave the layers, if left out"""
    decoder: Decoder | None = None
    """in place of a head"""
    init: Drawn = "torch"
    """linear maps start uniform within 1/sqrt(inputs), Glorot-uniform, He-uniform (kaiming) or normal (0.02), the last three with bias 0"""


# --- weights from elsewhere ----------------------------------------------------------------------------------------


class Move(Record):
    """A tensor of a released file, or a part of it, and where it goes; `name` is short for `{to: name}`."""

    to: str | float
    """a name of `state_dict()`: what is learned is set, a constant is compared; or the number that all of theirs must be"""
    axes: Axes = ""
    """"(k p) d -> k d p": axes of theirs -> axes of ours; without the axis of the layers"""
    part: Part = ""
    """"0:384, :": which part of theirs, before `axes`"""
    into: Part = ""
    """which part of ours"""
    factor: Factor | Text = 1.0
    """ours are so many times theirs: -1 where what they add is taken away here; or the numbers of ours that have this name, of the same layer and member"""


def _moves(value: object) -> object:
    return ({"to": value} if isinstance(value, str) else value,) if isinstance(value, str | dict) else value


Moves = Annotated[tuple[Move, ...], BeforeValidator(_moves, json_schema_input_type=str | Move | tuple[Move, ...])]


class Weights(Record):
    """How a released file of weights is named, for `restore_weights`."""

    key: Annotated[tuple[str, ...], BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...])] = ()
    """where in the file the weights are, such as state_dict; of several, the first that is there"""
    strip: tuple[str, ...] = ()
    """prefixes that names may have, in any order, such as module."""
    ignore: tuple[str, ...] = ()
    """names that are not needed; * stands for anything"""
    sizes: dict[Name, Count | str] = {}
    """of axes that no shape says: those of one tensor of ours that are several of theirs. A number, or where the spec has it: model.embed.patch"""
    names: dict[str, Moves]
    """their name -> ours; {layer} stands for the number of a layer, the first axis of ours, and {member} for that of a member of a family, the next. A / in a name goes into nested dicts."""


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


Side = Annotated[int, Field(ge=2, le=4096)]


class RandAugment(Record):
    """Some of fourteen operations on a picture, drawn anew for each: turns, shears, shifts, colours, contrast."""

    operations: Annotated[int, Field(ge=1, le=14)] = 2
    strength: Share = 0.3
    """of all of them: 1 is a turn by 30 degrees, 0.3 what the papers call 9 of 30"""


class Augment(Record):
    """Training pictures are changed at random, anew in every step, in this order."""

    crop: tuple[Share, Share] | None = None
    """a part of the picture, of an area between these shares of it, scaled: [0.08, 1.0]"""
    shift: Annotated[int, Field(ge=0, le=64)] = 0
    """largest shift in pixels, up, down, left and right; zeros come in at the border"""
    flip: bool = False
    """left and right swapped, every second time"""
    rand_augment: RandAugment | None = None
    erase: Share | None = None
    """the probability that a rectangle becomes 0, after `normalise`"""
    mixup: Positive | None = None
    """alpha of Beta(alpha, alpha), of which the share of a picture is in a mixture with another one, labels too; for loss: cross_entropy"""
    cutmix: Positive | None = None
    """alpha of the same for a rectangle of another picture; with mixup, every second step at random"""


class Scaling(Record):
    """(value - mean) / std for each channel, or for all."""

    mean: Annotated[tuple[float, ...], Field(min_length=1)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1)]


class Digits(DataSettings):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, with their labels."""

    source: Literal["digits"]
    form: Literal["vectors", "images"] = "vectors"
    """vectors of 64 for an input of the problem, or images of 1 x 8 x 8 for the input `image` of a model"""
    validation: Annotated[int, Field(ge=1, le=1_700)] = 297
    norm: Literal["unit", "none"] = "none"
    classes: Annotated[tuple[Annotated[int, Field(ge=0, le=9)], ...], Field(min_length=2)] | None = None
    """these digits alone, counted from 0 in this order; all ten if left out"""
    size: Annotated[int, Field(ge=8, le=64)] = 8
    """pixels of a side of an image, to which the 8 are scaled up"""
    augment: Augment | None = None
    """of images only"""
    seed: Seed = 0


class Images(DataSettings):
    """Pictures that stay where they are, with a class each: in folders, in tar files, or in an array."""

    source: Literal["images"]
    folder: str | None = None
    """FOLDER/CLASS/FILE; or FOLDER/train/CLASS/FILE and FOLDER/val/CLASS/FILE"""
    shards: tuple[str, ...] = ()
    """tar files of NAME.png and NAME.cls, the number of its class, or of CLASS/NAME.png; * stands for any part of a path"""
    arrays: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)] | None = None
    """images, N x H x W or with channels, and labels: .npy, which stays on disk, or .npz, which is read"""
    held: tuple[str, ...] = ()
    """what is held out, in the same form: [FOLDER], shards, or [IMAGES, LABELS]; without it, val beside train, or a share"""
    order: Literal["channels_last", "channels_first"] = "channels_last"
    """of an array"""
    size: Side | tuple[Side, Side] | None = None
    """pixels of a side, or [height, width]: the middle of a picture is scaled to it; an array stays as it is"""
    channels: Literal[1, 3] | None = None
    """1 grey, 3 colour, which is what files of pictures are read as if it is left out; an array has its own"""
    validation: Positive = 0.1
    """how many are held out where nothing is set apart; below 1, a share of all"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """processes that read batches ahead of the training; what they read does not depend on how many there are"""
    normalise: Scaling | Literal["data"] | None = None
    """mean and standard deviation of each channel, as numbers, or those of the training pictures; kept with the run"""
    augment: Augment | None = None
    seed: Seed = 0


class Characters(DataSettings):
    """Text, one token per character or as `words` says; the end of it is held out."""

    source: Literal["text"]
    text: str
    """`python documentation`, `python library`, or the path of a UTF-8 file"""
    words: str = "characters"
    """what a token is: `characters`, `bytes`, or the path of a file of words (tokenizer.json, ranks as tiktoken has them, words of a run)"""
    length: Annotated[int, Field(ge=1, le=65_536)] = 128
    """tokens in a sample"""
    characters: Count | None = None
    """read so many from the start; all if left out"""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """the share of characters that is held out"""


class TokenArrays(DataSettings):
    """Tokens that a tokenizer made, in files that stay on disk: .npy, or bare numbers in .bin; windows of one file, or of one document."""

    source: Literal["tokens"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """one after another; the label of each token is the next one"""
    held: tuple[str, ...] = ()
    """files that are held out; without them the end of `files`"""
    kind: Literal["uint16", "uint32"] = "uint16"
    """of the numbers in a .bin"""
    length: Annotated[int, Field(ge=1, le=65_536)] = 128
    """tokens in a sample"""
    separator: Annotated[int, Field(ge=0)] | None = None
    """the token at the end of a document: no sample goes on into another. Without it samples do, within a file"""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """the share that is held out where no files are"""
    samples: Count = 512
    """how many held-out samples are measured on at most, at equal distances"""
    words: str | None = None
    """what tokens stand for: the path of a file of words, or `bytes`"""


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


class LowRank(DataSettings):
    """Y = L R' + S with known factors: L R' of low rank, its largest entry 1, and S sparse; sizes are those of the problem."""

    source: Literal["low_rank"]
    train: Count = 200
    validation: Count = 20
    outliers: Share = 0.1
    """probability that an entry of S is not zero"""
    size: Positive = 1.0
    """of outliers: uniform between -size and size, 1 being the largest entry of L R'"""
    seed: Seed = 0


class Files(DataSettings):
    """Arrays from .npy, .npz and .pt files, stored batch first."""

    source: Literal["file"]
    files: dict[Name, str]
    """name of an input, variable or parameter -> path; of a model around the layers, of what it takes, and `labels`"""
    validation: Positive = 0.1
    """how many samples are held out; below 1, a share of all"""
    seed: Seed = 0


Data = Annotated[
    Patches | Digits | Images | Characters | TokenArrays | Synthetic | LowRank | Files, Field(discriminator="source")
]


# --- training ------------------------------------------------------------------------------------------------------


class Rates(Record):
    """Learning rates by kind of parameter."""

    matrices: Positive = 1e-3
    """of biases, norms and positions too"""
    scalars: Positive = 1e-2
    """of learned step sizes and thresholds"""


class Search(Record):
    """Grid search for up to three numbers that all layers share, in place of training by slopes."""

    grid: Annotated[dict[Name, Annotated[tuple[float, ...], Field(min_length=1)]], Field(min_length=1, max_length=3)]
    """learned number -> values that are tried out, all with all"""
    rounds: Annotated[int, Field(ge=1, le=10)] = 3
    """of which each after the first looks as closely between the neighbours of the best"""
    samples: Count = 1000
    """of the training data, over which the loss is taken"""


class Elsewhere(Record):
    """Held-out samples unlike those of the training, which the closing table has rows for."""

    data: dict[Name, int | float | str | bool | None] = {}
    """settings of `data:` that are others: {sparsity: 0.2, snr: 20.0}"""
    perturb: dict[Name, Positive] = {}
    """parameter -> relative size of Gaussian errors in it: samples are made with that, the network keeps its own"""
    layers: Count | None = None
    """of a network whose layers share what is learned: take so many"""


class From(Record):
    """What training starts from; `from: PATH` is short for `from: {path: PATH}`."""

    path: Annotated[str, Field(min_length=1)]
    """a run folder, a folder that a network was saved in, or a file of weights"""
    spec: str | None = None
    """of a file: the spec of the network that it is of, a library name or a path; this spec, if left out"""
    leave: tuple[str, ...] = ()
    """what is not taken: names of parameters, or what they begin with"""


def _short_from(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


FromField = Annotated[From, BeforeValidator(_short_from, json_schema_input_type=str | From)]


class View(Record):
    """Copies of samples, each changed at random, anew in each step."""

    count: Annotated[int, Field(ge=0, le=1000)] = 1
    """copies of each sample"""
    area: tuple[Share, Share] = (1.0, 1.0)
    """of images: the share of the area that is cut out, from one to the other, and scaled to the whole size"""
    aspect: tuple[Positive, Positive] = (1.0, 1.0)
    """of images: width by height of what is cut out, from one to the other"""
    turn: Annotated[float, Field(ge=0, le=180)] = 0.0
    """of images: by so many degrees at most, to both sides"""
    flip: bool = False
    """of images: left and right swapped, every second time"""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """differences from the mean of a sample grow or shrink by this share at most"""
    brightness: Spread = 0.0
    """what is added to all of a sample, at most, or taken away"""
    noise: Spread = 0.0
    """standard deviation of Gaussian noise on every entry"""
    hide: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """the share of entries that are set to zero"""

    @property
    def of_images(self) -> bool:
        """Does it cut, turn or mirror?"""
        return self.area != (1.0, 1.0) or self.aspect != (1.0, 1.0) or self.turn > 0 or self.flip


class Taken(Record):
    """What an argument of a declared loss is made of."""

    of: Literal["network", "teacher", "labels", "samples"]
    """features of views by the network, or by its teacher, which takes no gradient; the classes that views belong to: by their labels,
    or a class for each sample"""
    views: Name | None = None
    """which of `views:`; all of them, one after another, if left out"""
    at: Literal["answer", "features"] = "answer"
    """what the network answers, or what the linear map of its head reads; the mean over tokens, where there are several"""


class Declared(Record):
    """A declared objective as a loss, over all samples of a batch together."""

    objective: dict[str, Any]
    """a spec: {use: NAME, scalars: {..}}, or sections of its own; constraints to the sphere are kept by what is given to it"""
    takes: Annotated[dict[Name, Taken], Field(min_length=1)]
    """variable or input of the objective -> what it is"""


class Teacher(Record):
    """A network whose weights follow those that are trained: m times its own and 1 - m times these, after each step."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """m at the first step"""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """m at the last step, with a cosine between them"""
    kept: Literal["teacher", "network"] = "teacher"
    """whose weights are measured and kept"""


class Probes(Record):
    """Simple classifiers of the features of a network, which are fitted to training samples with their labels and train nothing of it."""

    kinds: tuple[Literal["neighbours", "linear", "subspaces"], ...] = ("neighbours", "linear", "subspaces")
    """the nearest training samples, logistic regression, the nearest of one affine subspace for each class"""
    at: Literal["features", "answer"] = "features"
    """what the linear map of the head reads, or what the network answers; the mean over tokens, where there are several"""
    on_the_way: bool = False
    """with each measurement, and in metrics.csv; else in the closing table alone"""
    neighbours: Count = 10
    """of which the most frequent class counts; near by their cosine"""
    components: Count = 10
    """dimensions of a subspace"""
    samples: Count = 5_000
    """of the training data, drawn once, that they are fitted to at most"""
    eps2: Positive = 0.5
    """of the coding rate of features"""


class Train(Record):
    """How the free parameters are fitted."""

    loss: Literal["mse", "nmse", "objective", "cross_entropy", "masked_mse"] | Declared = "nmse"
    """mse, nmse: against the true or converged value; objective: no target needed; of a model, cross_entropy: against
    labels or the next character, masked_mse: of the patches that were hidden; or an objective that is declared"""
    views: dict[Name, View] = {}
    """of a declared objective: the views of a sample that networks see, by name; one as it is, if left out"""
    teacher: Teacher | None = None
    """of a declared objective that takes what a teacher answers"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """cross_entropy: this share of each label is spread over all classes; not in what is measured on held-out data"""
    target: Literal["truth", "optimum"] | None = None
    """what mse and nmse compare with; if left out, the truth where the data have it, else the converged optimum"""
    layer_weights: Literal["last", "uniform", "linear"] | tuple[Annotated[float, Field(ge=0)], ...] = "last"
    """what the loss of each layer counts"""
    optimizer: Literal["adam", "adamw", "lion", "sgd"] = "adam"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """of adam and adamw, (0.9, 0.999) if left out, and of lion, (0.9, 0.99)"""
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
    final_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """the weight decay goes to this by a cosine over the whole training"""
    stages: Literal["end_to_end", "layerwise"] = "end_to_end"
    refine: Share = 0.5
    """layerwise: the share of the steps in which, at the end, all layers are trained together"""
    falls: tuple[Share, ...] = ()
    """layerwise: each stage is trained again at these shares of the learning rate, for as many steps each: [0.2, 0.02]"""
    epochs: Count | None = None
    """20 if neither epochs, steps nor minutes are given"""
    steps: Count | None = None
    """in place of epochs"""
    batch: Count = 256
    """samples per step, over all devices together"""
    accumulate: Count = 1
    """so many batches make one step, one after another: as one that is so many times as large, in the memory of one"""
    validate_every: Count | None = None
    """steps between two measurements on held-out data; an epoch, but at most 500, if left out"""
    keep: Literal["best", "last"] = "best"
    """which weights remain: the best on held-out data, or the last"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """measure and keep the mean of the weights of all steps, each counting this much less than the next"""
    search: Search | None = None
    """numbers that are searched for on a grid, instead of training"""
    baselines: tuple[str, ...] = ("fista",)
    """algorithms of the same depth that the closing table compares with"""
    from_: FromField | None = Field(default=None, alias="from")
    """a run, a saved network or released weights that training starts from, in place of the untrained network"""
    freeze: tuple[str, ...] = ()
    """what does not learn: names of parameters or what they begin with; `body[:2]` is the first two layers of it"""
    only: tuple[str, ...] = ()
    """what alone learns, in the same words: [head]"""
    layer_decay: Share = 1.0
    """the learning rate of each layer is this share of that of the layer after it; what stands after the layers has all of it"""
    noise: dict[Name, tuple[float, float]] = {}
    """input -> signal-to-noise ratios in dB of noise that is added in training, anew in each step: at the first and at the last one, even in between"""
    evaluate: dict[Name, Elsewhere] = {}
    """name -> other held-out samples that the closing table has rows for"""
    probes: Probes | None = None
    """classifiers of the features of the network, and the room that these take"""
    tensorboard: bool = False
    seed: Seed = 0
    patience: Count | None = None
    """stop after so many measurements without improvement"""
    clip: Positive | None = None
    """largest norm of a gradient"""
    minutes: Positive | None = None
    """stop after so much time"""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """bfloat16: products in it, weights and sums in float32"""
    checkpoint: bool = False
    """layers keep nothing for the derivative, and are worked out again: memory of one layer, a third more time"""
    compile: bool = False
    """by torch.compile, which takes a while at first"""


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
    algorithms: dict[Name, Algorithm] = {}
    """algorithms of this spec's own"""
    unroll: Unroll | None = None
    data: Data | None = None
    train: Train | None = None
    model: Model | None = None
    weights: Weights | None = None


def schema_text() -> str:
    """The JSON Schema of a spec, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schema(path: Path = Path(__file__).parent / "spec.schema.json") -> None:
    path.write_text(schema_text(), encoding="utf-8")
