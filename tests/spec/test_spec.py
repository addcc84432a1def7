"""From text to a checked spec: use, overrides, presets, places, the schema."""

import json
from pathlib import Path
from typing import Any

import pytest

from unroll.errors import SpecError
from unroll.spec import Spec, library, load, schema
from unroll.spec.schema import Document

OBJECTIVE = """\
objective: lines
about: Sparse code.
dims: {m: signal length, n: atoms}
variables: {z: [n]}
inputs: {x: {shape: [m], about: a signal}}
parameters: {A: {shape: [m, n], columns: unit}}
scalars: {lam: {default: 0.1, positive: true, about: weight}, mu: 0.5, nu: -1}
minimize:
  fidelity: 1/2 * sumsq(x - A @ z)
  sparsity: |
    lam *
      norm1(z)
"""
SPEC = """\
use: lines
dims: {m: 64, n: 256}
unroll:
  algorithm: proximal_gradient
  layers: 16
  parametrisation: both
  learn: {theta: {share: layers}, W2: {replaces: I(n)}}
"""
PRESET = """\
about: Two of them.
step: 0.5
layers: 99
learn:
  W1: {replaces: step * A.T, share: layers}
  theta: {replaces: step * lam, positive: true}
"""
CRATE = """\
use: lines
dims: {m: 384, n: dynamic}
unroll:
  layers: 12
  blocks:
    - block: compress
      terms: [fidelity]
      algorithm: gradient_descent
      step: kappa
      rewrites: [neumann(order=1), gram_to_softmax(scale=p**-0.5), tight_frame(U)]
      gauge: {residual: 1}
      learn: {W_out: {replaces: U, where: output, bias: true}}
      normalise: layer_norm
    - block: sparsify
      surrogate: {replaces: expansion, by: 1/2 * sumsq(Z0 - D @ Z), assumes: incoherent(D)}
      constraint: Z >= 0
      algorithm: proximal_gradient
      steps: 1
      start: Z0
      normalise: layer_norm
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a library of their own."""
    texts = {"objectives/lines": OBJECTIVE, "specs/net": SPEC, "specs/presets/both": PRESET, "specs/two_blocks": CRATE}
    for name, text in texts.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_a_name_a_text_and_a_dict_say_the_same(folder):
    by_name = load("net")
    texts = [load(source) for source in ("specs/net.yaml", folder / "specs/net.yaml")]
    texts += [load(source) for source in ("name: net\n" + SPEC, ("name: net\n" + SPEC).encode())]
    texts += [load({"name": "net", **by_name.to_dict()})]
    assert all(spec == by_name and spec.sha256 == by_name.sha256 for spec in texts)


@pytest.mark.parametrize("name", ["net", "lines", "two_blocks"])
def test_a_spec_survives_being_written_and_read(name):
    spec = load(name)
    for again in (load(spec.to_dict()), load(spec.to_yaml())):
        assert again == spec
        assert again.model_dump() == spec.model_dump()


def test_text_that_looks_like_numbers_survives_being_written():
    odd = ["1e-3", "yes", "0x1f", "~", "", "<<", "a: b", "# c", "true", "- x", "λ", "1_0", "a\nb ", " c", "|", "12:30"]
    spec = load({"use": "lines", "tags": odd})
    assert load(spec.to_yaml()).tags == tuple(odd)


def test_use_lays_the_spec_on_the_objective():
    spec = load("net")
    assert spec.dims == {"m": 64, "n": 256}
    assert (spec.objective, spec.title, spec.about) == ("lines", "net", "Sparse code.")
    assert spec.minimize == {"fidelity": "1/2 * sumsq(x - A @ z)", "sparsity": "lam *\n  norm1(z)\n"}


def test_a_spec_may_build_on_a_spec_beside_it(folder):
    (folder / "specs/short.yaml").write_text("use: net.yaml\nunroll: {layers: 3}\n")
    spec = load("short")
    assert spec.unroll is not None
    assert (spec.title, spec.unroll.layers, spec.unroll.algorithm) == ("short", 3, "proximal_gradient")


def test_an_objective_of_its_own_replaces_the_one_that_is_used():
    spec = load("use: lines\nmaximize: {gain: -norm1(z)}\n")
    assert (spec.minimize, spec.maximize) == (None, {"gain": "-norm1(z)"})


def test_short_forms_mean_their_long_forms():
    spec = load("lines")
    assert spec.variables["z"].shape == ("n",)
    assert (spec.inputs["x"].shape, spec.inputs["x"].about) == (("m",), "a signal")
    assert spec.parameters["A"].columns == "unit"
    assert {name: (s.default, s.positive) for name, s in spec.scalars.items()} == {
        "lam": (0.1, True), "mu": (0.5, True), "nu": (-1.0, False),
    }  # fmt: skip


def test_a_preset_is_worked_in_and_what_is_written_goes_before_it():
    spec = load("net")
    assert spec.unroll is not None
    learn = spec.unroll.learn
    assert list(learn) == ["W1", "theta", "W2"]
    assert (learn["theta"].share, learn["theta"].replaces, learn["theta"].positive) == ("layers", "step * lam", True)
    assert (spec.unroll.step, spec.unroll.layers, spec.preset) == ("0.5", 16, "both")
    where = spec.origin("unroll", "learn", "W1", "replaces").where(7, 3)
    assert where.excerpt[where.column - 1 :].startswith("A.T") and where.file.endswith("both.yaml")
    assert spec.origin("unroll", "learn", "theta", "share").where().file.endswith("net.yaml")


def test_blocks_of_the_design_validate():
    spec = load("two_blocks")
    assert spec.unroll is not None
    compress, sparsify = spec.unroll.blocks
    assert compress.rewrites == ("neumann(order=1)", "gram_to_softmax(scale=p**-0.5)", "tight_frame(U)")
    assert compress.gauge is not None and (compress.gauge.residual, compress.gauge.update) == ("1", None)
    assert compress.normalise is not None and (
        compress.normalise.kind,
        compress.normalise.eps,
        compress.normalise.when,
    ) == ("layer_norm", 1e-5, "before")
    assert sparsify.surrogate is not None
    assert (sparsify.surrogate.assumes, spec.dims["n"]) == ("incoherent(D)", "dynamic")


@pytest.mark.parametrize(
    ("path", "start", "place"),
    [
        (("minimize", "fidelity"), 15, "lines.yaml:9:28"), (("minimize", "sparsity"), 8, "lines.yaml:12:7"),
        (("dims", "m"), 0, "net.yaml:2:11"), (("unroll", "layers"), 0, "net.yaml:5:11"),
        (("variables", "z", "shape", 0), 0, "lines.yaml:4:17"), (("scalars", "mu", "default"), 0, "lines.yaml:7:67"),
        (("unroll", "momentum"), 0, "net.yaml:3:1"),
    ],
)  # fmt: skip
def test_every_value_knows_its_place(path, start, place):
    assert str(load("net").origin(*path).where(start)).endswith(place)


def test_a_default_is_cited_as_text_at_the_key_around_it():
    origin = load("two_blocks").origin("unroll", "step")
    assert origin.text == "1/L"
    assert str(origin.where()).endswith("two_blocks.yaml:3:1")


def test_keys_know_their_places():
    spec = load("net")
    assert str(spec.key_where("dims", "n")).endswith("net.yaml:2:15")
    assert str(spec.key_where("parameters", "A")).endswith("lines.yaml:6:14")
    assert str(spec.key_where("unroll", "algorithm")).endswith("net.yaml:4:3")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("unroll.layers=3", ("unroll", "layers"), 3), ("train.epochs=3", ("train", "epochs"), 3),
        ("train.lr=1e-3", ("train", "lr"), 1e-3), ("train.lr={matrices: 1e-4}", ("train", "lr", "matrices"), 1e-4),
        ("scalars.lam=0.2", ("scalars", "lam", "default"), 0.2),
        ("scalars.lam=0.2", ("scalars", "lam", "positive"), True),
        ("unroll.learn.theta.share=none", ("unroll", "learn", "theta", "share"), "none"),
        ("dims.m=8", ("dims", "m"), 8),
        ("unroll.step=1/L", ("unroll", "step"), "1/L"), ("data={source: patches, size: 4}", ("data", "size"), 4),
        ("minimize=norm1(z)", ("minimize",), "norm1(z)"), (" unroll.layers = 3 ", ("unroll", "layers"), 3),
    ],
)  # fmt: skip
def test_overrides_set_what_they_name(override, path, value):
    found = load("net", [override])
    for key in path:
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value


def written_blocks(overrides):
    return load(CRATE, overrides).to_dict()["unroll"]["blocks"]


@pytest.mark.parametrize("entry", ["compress", "0"])
@pytest.mark.parametrize(
    ("path", "value"),
    [(("step",), 0.125), (("learn", "W_out", "bias"), False), (("rewrites", "1"), "tight_frame(U)"), (("steps",), 3)],
)
def test_any_value_of_a_block_is_set_by_its_path_and_nothing_else_is(entry, path, value):
    key = ".".join(("unroll.blocks", entry, *path))
    found, expected = written_blocks([f"{key}={json.dumps(value)}"]), written_blocks([])
    inner = expected[0]
    for step in path[:-1]:
        inner = inner[step]
    inner[int(path[-1]) if isinstance(inner, list) else path[-1]] = value
    assert found == expected


def test_a_whole_block_is_laid_on_the_one_of_its_name():
    found, before = written_blocks(["unroll.blocks.sparsify={step: 0.5}"]), written_blocks([])
    assert found == [before[0], {**before[1], "step": 0.5}]


def test_an_entry_of_any_list_is_set_by_its_number():
    assert load("net", ["parameters.A.shape.0=n"]).to_dict()["parameters"]["A"]["shape"] == ["n", "n"]


@pytest.mark.parametrize(
    ("override", "column", "hint"),
    [
        ("unroll.blocks.compres.step=1", 15, "there are: compress, sparsify"),
        ("unroll.blocks.2.step=1", 15, "there are: compress, sparsify"),
        ("unroll.blocks.-1.step=1", 15, "there are: compress, sparsify"),
        ("unroll.blocks.compress.rewrites.3=x", 33, "there are: 0, 1, 2"),
    ],
)
def test_an_entry_that_a_list_does_not_have_is_refused_with_those_it_has(override, column, hint):
    with pytest.raises(SpecError) as caught:
        load(CRATE, [override])
    assert (caught.value.code, caught.value.where.column, caught.value.hint) == ("E210", column, hint)


@pytest.mark.parametrize(
    ("laid", "said"),
    [
        ("minimize: {fidelity: sumsq(z)}", ["terms of lines not taken: sparsity"]),
        ("maximize: {more: -sumsq(z)}", ["terms of lines not taken: fidelity, sparsity"]),
        ("minimize: norm1(z)", ["terms of lines not taken: fidelity, sparsity"]),
        ("minimize: {sparsity: norm1(z), fidelity: sumsq(z), more: sumsq(z)}", []),
        ("scalars: {lam: 0.2}", []),
    ],
)
def test_terms_that_an_objective_laid_over_does_not_take_are_named(laid, said):
    under = "use: lines\nunroll: {layers: 1, algorithm: proximal_gradient}\n"
    assert [str(x) for x in load(f"{under}{laid}\n").left] == said
    key, value = laid.split(": ", 1)
    over = [f"{key}={value}"] if key != "scalars" else ["scalars.lam=0.2"]
    assert [str(x) for x in load(under, over).left] == [s.replace("lines", load(under).title) for s in said]


def test_constraints_that_are_not_taken_are_named(tmp_path):
    (tmp_path / "under.yaml").write_text(OBJECTIVE + "constraints: [z >= 0, sum(z) == 1]\n")
    (tmp_path / "over.yaml").write_text('use: under.yaml\nconstraints: ["z in simplex", "z >= 0"]\n')
    assert [str(x) for x in load(tmp_path / "over.yaml").left] == ["constraints of under not taken: sum(z) == 1"]


def test_an_override_of_one_term_keeps_the_others():
    assert load("net", ["minimize.sparsity=0"]).minimize == {"fidelity": "1/2 * sumsq(x - A @ z)", "sparsity": "0"}


def test_an_override_may_turn_the_objective_round():
    spec = load("net", ["maximize=norm1(z)"])
    assert (spec.minimize, spec.maximize) == (None, "norm1(z)")


def test_later_overrides_win_and_another_source_of_data_starts_afresh():
    spec = load(
        "net", ["data={source: patches, size: 4}", "unroll.layers=3", "data={source: digits}", "unroll.layers=4"]
    )
    assert spec.data is not None and spec.unroll is not None
    assert (spec.data.source, spec.unroll.layers) == ("digits", 4)


@pytest.mark.parametrize(
    ("override", "code", "column", "hint"),
    [
        ("train.epohcs=3", "E201", 7, "did you mean 'epochs'?"),
        ("epochs=3", "E210", 1, "did you mean 'train.epochs'?"),
        ("lam=0.2", "E210", 1, "did you mean 'scalars.lam'?"),
        ("scalars.lan=0.2", "E210", 1, "did you mean 'scalars.lam'?"),
        ("unroll.layers=many", "E204", 15, ""), ("unroll.layers", "E211", 1, "KEY=VALUE"),
        ("=3", "E211", 1, "KEY=VALUE"),
        ("unroll.layers=", "E211", 1, "KEY=VALUE"), ("unroll.layers=*a", "E014", 15, None),
        ("train.lr=[1", "E010", 10, None),
        ("unroll.layers.x=3", "E203", 15, ""), ("a.b.c=!!python/name:os.system x", "E210", 1, None),
    ],
)  # fmt: skip
def test_overrides_are_checked_in_their_own_place(override, code, column, hint):
    with pytest.raises(SpecError) as caught:
        load("net", [override])
    error = caught.value
    assert error.where is not None
    assert (error.code, error.where.file, error.where.column) == (code, "override", column)
    assert hint is None or error.hint == hint


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = "use: lines\nunrol: 3\nunroll: {algorithm: a, layers: 0, stepp: 1}\ntrain: {epochs: yes, loss: mze}\n"
    with pytest.raises(SpecError) as caught:
        load(text)
    errors = (caught.value, *caught.value.others)
    assert [e.code for e in errors] == ["E201", "E205", "E201", "E203", "E204"]
    assert [e.where.line for e in errors if e.where] == [2, 3, 3, 4, 4]


@pytest.mark.parametrize("bad", [{"a": {1, 2}}, {"a": object()}, {1: {}, "b": object()}], ids=["set", "object", "key"])
def test_a_dict_that_is_no_text_is_refused(bad):
    with pytest.raises(SpecError, match="E008"):
        load(bad)


def test_a_dict_that_contains_itself_is_refused():
    loop: dict[str, object] = {}
    loop["a"] = loop
    with pytest.raises(SpecError, match="E008"):
        load(loop)


def test_a_folder_is_not_a_spec(folder):
    with pytest.raises(SpecError, match="E002"):
        load(folder)


def test_specs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load("net").dims = {}


def test_the_hash_sees_what_is_said_and_not_how(folder):
    spec = load("net")
    (folder / "specs/net.yaml").write_text("# a note\n" + SPEC.replace("m: 64, n: 256", "n: 256,  m: 64"))
    assert load("net").sha256 == spec.sha256
    assert load("net", ["unroll.layers=15"]).sha256 != spec.sha256


def test_the_schema_for_editors_is_up_to_date():
    path = Path(schema.__file__).parent / "spec.schema.json"
    assert path.read_text(encoding="utf-8") == schema.schema_text(), "write_schema() writes it"


def test_every_field_of_the_schema_is_offered_to_editors():
    assert set(json.loads(schema.schema_text())["properties"]) == set(Document.model_fields) == set(Spec.model_fields)


SHIPPED = [(kind, name) for kind in ("objectives", "specs") for name in library.names(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_every_entry_of_the_library_loads_and_names_the_schema(kind, name):
    path = library.find(name, (kind,))
    assert path.read_text(encoding="utf-8").startswith(
        "# yaml-language-server: $schema=../unroll/spec/spec.schema.json\n"
    )
    assert load(path).title == name


@pytest.mark.parametrize("name", library.names("presets"))
def test_every_preset_of_the_library_expands(name):
    spec = load("use: lasso\nunroll: {algorithm: proximal_gradient, layers: 2}\n", [f"unroll.parametrisation={name}"])
    assert spec.unroll is not None and spec.unroll.learn and spec.preset == name


# --- the library ---------------------------------------------------------------------------------------------------


def test_local_names_come_before_those_that_are_shipped(folder):
    (folder / "objectives/lasso.yaml").write_text(OBJECTIVE.replace("lines", "mine"))
    assert load("lasso").objective == "mine"


def test_names_are_listed_by_kind():
    assert {"lines", "lasso"} <= set(library.names("objectives"))
    assert {"net", "two_blocks"} <= set(library.names("specs"))
    assert "both" in library.names("presets") and "both" not in library.names("specs")


def test_a_missing_name_is_told_with_those_that_exist():
    with pytest.raises(SpecError) as caught:
        load("lins")
    assert caught.value.hint == "did you mean 'lines'?"
    assert "lines" in caught.value.notes[0]


@pytest.mark.parametrize(
    "name", ["../objectives/lines", "/etc/passwd", "a/b", "~/x", "lines\0", "x\0.yaml", "x" * 500, "."]
)
def test_a_name_is_not_a_way_to_other_files(name):
    with pytest.raises(SpecError, match=r"E00[13]"):
        load({"use": name})


@pytest.mark.parametrize(("default", "fits"), [(0, False), (-1, False), (1e-300, True)])
def test_what_is_declared_positive_is_above_0_from_the_start(default, fits):
    text = f"""
    variables: {{z: [3]}}
    scalars: {{lam: {{default: {default}, positive: true}}}}
    minimize: lam * sumsq(z)
    """
    if fits:
        assert load(text).scalars["lam"].default == default
    else:
        with pytest.raises(SpecError, match="E205.*lam must be positive"):
            load(text)


@pytest.mark.parametrize(
    ("section", "declared"),
    [
        ("dims", {"idle": 2}),
        ("inputs", {"idle": ["n"]}),
        ("parameters", {"idle": ["n", "n"]}),
        ("scalars", {"idle": 1}),
    ],
)
def test_what_is_declared_and_used_nowhere_is_named(section: str, declared: dict[str, Any]) -> None:
    spec: dict[str, Any] = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": "1/2*sumsq(x - z)",
    }  # fmt: skip
    spec = {**spec, section: {**spec.get(section, {}), **declared}}
    assert [str(x) for x in load(spec).idle] == ["declared, and used nowhere: idle"]
    for reader in (
        {"about": "idle"}, {"functions": {"f(u)": "idle * u"}}, {"constraints": ["z <= idle"]},
        {"unroll": {"algorithm": "gradient_descent", "layers": 1, "step": "0.1 * idle"}},
    ):  # fmt: skip
        assert bool(load({**spec, **reader}).idle) == ("about" in reader), reader
