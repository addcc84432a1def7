"""The command line: one verb each. Settings live in the spec; KEY=VALUE overrides any of them by its dotted path.

Exit status: 0 done, 1 a check failed, 2 what was asked for is wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from unroll import __version__
from unroll.errors import UnrollError, explain

STAGES = ("spec", "problem", "derivation", "step", "graph", "source")
PLACES = ("iterate", "layer_norm", "rms_norm", "sphere")
KINDS = ("objectives", "specs", "presets", "functions", "sets", "algorithms", "rewrites", "data")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="unroll")
def cli() -> None:
    """Compile an optimisation problem, declared in a few lines of YAML, into a deep network.

    \b
    Start here:
      unroll list                         what is in the library
      unroll show lista                   the derivation of a network, step by step
      unroll show lista --stage source    the PyTorch module that comes out
      unroll plan lista_patches           the memory and time that its training needs
      unroll train lista_patches          train it on image patches, with baselines
      unroll new mine                     a spec of your own to fill in

    SPEC is a path, or the name of a spec or objective of the library. Any setting of it can be overridden:
    unroll train lista_patches unroll.layers=8 train.epochs=5
    """


def _settings(f: Any) -> Any:
    f = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(f)
    return click.argument("spec")(f)


@cli.command("list")
@click.argument("kind", required=False, type=click.Choice(KINDS))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(kind: str | None, as_json: bool) -> None:
    """What is in the library: objectives, specs, presets, and the functions, sets, algorithms and rewrites of the language."""
    found = {k: _entries(k) for k in ([kind] if kind else KINDS)}
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, rows in found.items():
        click.secho(name, bold=True)
        width = max((len(n) for n in rows), default=0)
        for n, about in rows.items():
            click.echo(f"  {n:{width}}   {about}")
        click.echo()


def _entries(kind: str) -> dict[str, str]:
    match kind:
        case "objectives" | "specs" | "presets":
            from unroll.spec import library, loader, nodes

            found: dict[str, str] = {}
            for name in library.names(kind):
                path = library.find(name, (kind,))
                tree: Any = nodes.plain(loader.parse(path.read_bytes(), str(path)))
                found[name] = str(tree.get("about", ""))
            return found
        case "functions":
            from unroll.language.functions import ELEMENTWISE, FUNCTIONS

            own = {f"{f.name}({', '.join('uv'[: f.arity])})": f"elementwise: {f.about}" for f in ELEMENTWISE}
            return {**{f.signature: f.about for f in FUNCTIONS}, **own}
        case "sets":
            from unroll.language.functions import SETS

            return {s.name + (f"({', '.join(s.kinds)})" if s.kinds else ""): s.about for s in SETS}
        case "algorithms":
            from unroll.derivation.algorithms import every
            from unroll.spec.texts import AUTO

            auto = {
                AUTO: "the simplest of these that fits and claims something of the problem; `show` says which, and why"
            }
            return auto | {a.name: f"{a.about}; needs {a.needs}  [{a.source}]" for a in every()}
        case "rewrites":
            from unroll.derivation.rewrites.catalogue import REWRITES

            return {r.signature: f"{r.kind}: {r.picture} -> {r.result}  [{r.source}]" for r in REWRITES}
        case _:
            from unroll.train.sources import ABOUT

            return dict(ABOUT)


@cli.command()
@_settings
@click.option("--stage", type=click.Choice(STAGES), default="derivation", show_default=True, help="What to print.")
@click.option("--latex", is_flag=True, help="The derivation as LaTeX.")
def show(spec: str, overrides: tuple[str, ...], stage: str, latex: bool) -> None:
    """Print a stage of the compilation: what was written, what was derived, what is emitted.

    Of `algorithm: auto`, the derivation says which text was chosen, why, and why not the others.

    Of an algorithm (unroll list algorithms, or the path of one) its text is printed; algorithms/NAME where a spec has the name too.
    """
    from unroll import api
    from unroll.pages import stages
    from unroll.spec import texts

    if (text := texts.written(spec)) is not None:
        if latex or overrides or stage != "derivation":
            raise click.UsageError(f"'{spec}' is an algorithm: there is its text alone. Name a spec that uses it.")
        click.echo(text)
    elif latex:
        click.echo(api.derive(spec, overrides=overrides).to_latex())
    else:
        click.echo(stages.stage(spec, stage, overrides=overrides))


def _output(about: str, default: Path | None = None) -> Any:
    """The option -o, tried before the work begins."""
    kind = click.Path(dir_okay=False, path_type=Path)
    settings: Any = {"type": kind, "default": default, "show_default": True, "callback": _writable, "help": about}
    return click.option("-o", "--output", **settings)


def _writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    del context, option
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


@cli.command("compile")
@_settings
@_output("Where to write the module; the screen if left out.")
def compile_(spec: str, overrides: tuple[str, ...], output: Path | None) -> None:
    """Write the PyTorch module, which needs torch only."""
    from unroll.pages import stages

    source = stages.stage(spec, "source", overrides=overrides)
    if output is None:
        click.echo(source, nl=False)
    else:
        output.write_text(source, encoding="utf-8")
        click.echo(f"wrote {output}", err=True)


@cli.command()
@_settings
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Test every law on this spec: gradient, prox, curvature, step, initialisation, emission. Exit status 1 if one fails."""
    from unroll.laws.laws import check as run

    report = run(spec, overrides=overrides)
    click.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) if as_json else str(report))
    sys.exit(0 if report.ok else 1)


@cli.command()
@_settings
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="Samples (.npy, batch first); NAME= where there are several inputs.",
)
@click.option("--parameter", "parameters", multiple=True, metavar="NAME=FILE", help="Value of a parameter (.npy).")
@_output("Where to write the solution (.npy; of several variables .npz).")
@click.option(
    "--tol",
    default=1e-8,
    show_default=True,
    help="Largest certified gap, relative to the objective at 0 or at the start; or residual, relative to the first ones.",
)
@click.option("--max-iterations", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option(
    "--algorithm",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="A text: its name, its path, or one of the spec's own; auto: the first that fits, accelerated where that is known to be sound.",
)
@click.option("--start", metavar="FILE", help="Where the variable begins (.npy), in place of 0.")
def solve(
    spec: str,
    overrides: tuple[str, ...],
    inputs: tuple[str, ...],
    parameters: tuple[str, ...],
    output: Path | None,
    tol: float,
    max_iterations: int,
    algorithm: str,
    start: str | None,
) -> None:
    """Solve the problem itself: an iteration run until a duality gap certifies the answer, or a residual says that it is at rest."""
    from unroll.from_files import solve_files

    solution = solve_files(
        spec,
        inputs,
        parameters,
        overrides=overrides,
        tol=tol,
        max_iterations=max_iterations,
        output=output,
        algorithm=algorithm,
        start=start,
    )
    click.echo(str(solution))
    sys.exit(0 if solution.converged.all() else 1)


@cli.command()
@_settings
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks that share a batch.")
@click.option(
    "--measure", is_flag=True, help="Time steps of few samples, with the whole network, in place of counting."
)
@click.option("--json", "as_json", is_flag=True, help="For programs: bytes and seconds.")
def plan(spec: str, overrides: tuple[str, ...], gpus: int, measure: bool, as_json: bool) -> None:
    """What a training needs, before anything starts: memory by what it is for, and the time of a step.

    The network is sketched without memory of its own, and takes one step as the training does. Bytes are exact but for what libraries
    and the allocator take beside them. The time is of this machine: from counted operations, and what the machine does of them in a
    second; or with --measure from steps of few samples.

    \b
      unroll plan crate_base train.batch=1024 --gpus 8
    """
    from unroll.train.planning import plan as of

    found = of(spec, overrides=overrides, gpus=gpus, measure=measure)
    click.echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if as_json else str(found))


@cli.command()
@click.argument("spec", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    type=click.Path(exists=True, path_type=Path),
    help="Go on with a run folder; train.steps=N and the like move its end.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; runs/NAME/TIME if left out.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0 or mps.")
@click.option("--devices", default=1, show_default=True, help="How many of them.")
@click.option("--seed", type=int, help="The same as train.seed=N.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def train(
    spec: str | None,
    overrides: tuple[str, ...],
    resume: Path | None,
    out: Path | None,
    device: str,
    devices: int,
    seed: int | None,
    quiet: bool,
) -> None:
    """Train a network on the data its spec names; ends with a table against the plain algorithms."""
    from unroll.train import resume as go_on
    from unroll.train import train as start

    if resume is not None and spec is not None and "=" in spec:  # no spec stands before what is to change
        spec, overrides = None, (spec, *overrides)
    if (spec is None) == (resume is None):
        raise click.UsageError("give a SPEC to train, or --resume FOLDER to go on with a run")
    if resume is not None and (out is not None or seed is not None):
        raise click.UsageError("--out and --seed are those of the run that goes on: leave them out")
    if resume is not None:
        run = go_on(resume, overrides=overrides, device=device, devices=devices, quiet=quiet)
    else:
        chosen = (*overrides, f"train.seed={seed}") if seed is not None else overrides
        run = start(str(spec), overrides=chosen, out=out, device=device, devices=devices, quiet=quiet)
    if run.table or run.closing.notes:  # the first of several processes measures
        click.echo(str(run))


def _measuring(f: Any) -> Any:
    """Options of what is measured of each layer."""
    about = "A formula to measure too, in the words of the spec, as rate='R(Z)'; may be repeated."
    f = click.option("--term", "terms", multiple=True, metavar="NAME=FORMULA", help=about)(f)
    at = "What the terms are taken at: the iterates, or their normalised columns."
    return click.option("--at", type=click.Choice(PLACES), default="iterate", show_default=True, help=at)(f)


def _formulas(terms: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, _, formula in (term.partition("=") for term in terms):
        if not (name.isidentifier() and formula):
            raise click.UsageError("--term is NAME=FORMULA, as --term length='sumsq(z)'")
        if name in found:
            raise click.UsageError(f"two formulas are called '{name}'")
        found[name] = formula
    return found


def _finite(value: Any) -> Any:
    """null for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cli.command("eval")
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--white-box", is_flag=True, help="What each step of each layer does to each term of the objective.")
@_measuring
@click.option("--json", "as_json", is_flag=True, help="For programs; null where a number is not finite.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def eval_(
    run: Path,
    overrides: tuple[str, ...],
    white_box: bool,
    at: str,
    terms: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a finished run again on its held-out data: its closing table, or, with --white-box, what its layers do.

    Other settings of its data, as data.folder=FOLDER, measure it on those; the run stays as it is.

    \b
    One row per layer, block and term, means over all held-out samples:
      claimed     does the block take this term?
      entering    the term of what the layer takes, by the layer's own parameters
      predicted   change to first order: <gradient, step>
      actual      change that came; improved: in so many samples for the better
      cosine      of the step and the gradient
    --at, --term and --json say more about --white-box.
    """
    if not white_box and (terms or as_json or at != "iterate"):
        raise click.UsageError("--at, --term and --json are about --white-box: add it")
    if white_box and overrides:
        raise click.UsageError("--white-box is of the run's own samples: leave KEY=VALUE out")
    if white_box:
        from unroll.train.run import measure

        found = measure(run, at=at, terms=_formulas(terms), quiet=quiet)
        rows = [{key: _finite(value) for key, value in row.items()} for row in found.records()]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False) if as_json else str(found))
    else:
        from unroll.train import evaluate

        click.echo(str(evaluate(run, overrides=overrides, quiet=quiet)))


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="How the text begins.")
@click.option(
    "--length",
    type=click.IntRange(min=0),
    help="How many tokens follow; if left out, as many as the longest text has room for, 300 at most.",
)
@click.option("--temperature", default=1.0, show_default=True, help="Of the draw; 0: the likeliest token each time.")
@click.option("--top-k", type=int, help="Draw from so many of the likeliest.")
@click.option("--top-p", type=float, help="Draw from the likeliest that have this share together.")
@click.option("--window", type=int, help="Go on beyond the longest text, each time from so many last tokens.")
@click.option("--seed", default=0, show_default=True)
def generate(
    run: Path,
    prompt: str,
    length: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    window: int | None,
    seed: int,
) -> None:
    """Write on from a text, by a network that was trained on text: RUN is its run folder, or one of unroll.save."""
    from unroll.from_files import restore
    from unroll.model.module import Model

    net = restore(run)
    if not isinstance(net, Model):
        hint = "a run on text: unroll train crate_text"
        raise UnrollError("E422", f"{run} holds layers alone, which write no text", hint=hint)
    unsaid = [prompt]  # until it is known that something follows

    def show(piece: str) -> None:
        click.echo("".join([*unsaid, piece]), nl=False)
        unsaid.clear()

    net.generate(
        prompt, length, temperature=temperature, top_k=top_k, top_p=top_p, window=window, seed=seed, stream=show
    )
    click.echo("".join(unsaid))


@cli.command()
@_settings
@_output("Where to write the page.", Path("report.html"))
@_measuring
def report(spec: str, overrides: tuple[str, ...], output: Path, at: str, terms: tuple[str, ...]) -> None:
    """One HTML page: the derivation, the laws, the graph, the module; what each layer does to each term, beside what was
    predicted; where attention looks; and of a run its curves. SPEC may be the folder of a run."""
    from unroll.pages.page import report as write

    write(spec, output, overrides=overrides, at=at, terms=_formulas(terms))
    click.echo(f"wrote {output}", err=True)


@cli.command()
@click.argument("name")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("."), show_default=True)
def new(name: str, folder: Path) -> None:
    """Write NAME.yaml, a small spec with comments, to start from."""
    if not name.isidentifier():
        raise click.UsageError(f"'{name}' cannot be a name: use letters, digits and _")
    path = folder / f"{name}.yaml"
    if path.exists():
        raise click.UsageError(f"{path} exists already")
    path.write_text(
        TEMPLATE.format(name=name, schema=Path(__file__).parent / "spec" / "spec.schema.json"), encoding="utf-8"
    )
    click.echo(f"wrote {path}\nnext: unroll show {path}    unroll check {path}")


@cli.command("explain")
@click.argument("code")
def explain_(code: str) -> None:
    """What an error code means, with an example of wrong and right."""
    click.echo(explain(code.upper()))


TEMPLATE = """\
# yaml-language-server: $schema={schema}
name: {name}
about: what it is for
dims: {{m: 64, n: 128}}            # sizes
variables: {{z: [n]}}              # what is solved for
inputs: {{x: [m]}}                 # what comes in, one per sample
parameters: {{A: [m, n]}}          # what is given once
scalars: {{lam: 0.1}}

minimize:                        # 'unroll list functions' shows what a formula may use
  fidelity: 1/2 * sumsq(x - A @ z)
  sparsity: lam * sum(sqrt(z**2 + 0.01))
constraints: [z >= 0]            # delete what you do not need

unroll:
  algorithm: proximal_gradient   # or gradient_descent, projected_gradient, fista
  layers: 10
  learn:                         # a parameter in the place of a part of the step, starting at its value
    W: {{replaces: step * A.T}}

data: {{source: synthetic, sparsity: 0.1, train: 5000, validation: 500, nonnegative: true}}
train: {{loss: nmse, epochs: 5}}
"""


def main() -> None:
    """Entry point: errors of the user are messages, ours ask to be reported."""
    try:
        cli.main(standalone_mode=False)
    except UnrollError as e:
        click.echo(str(e), err=True)
        sys.exit(2)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as e:
        click.echo(str(e) or str(e.__cause__ or "") or "interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as e:
        if e.filename is None:
            raise
        click.echo(f"error: {e.strerror}: '{e.filename}'", err=True)
        sys.exit(2)
    except Exception as e:
        click.echo(
            f"internal error, please report it with the spec and the command line: {type(e).__name__}: {e}", err=True
        )
        raise


if __name__ == "__main__":
    main()
