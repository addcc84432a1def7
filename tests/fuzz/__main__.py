"""Try random objectives: `python -m tests.fuzz --seed 0 --count 100 --what gradient,prox`."""

from __future__ import annotations

import click

from .checks import CHECKS
from .judging import Outcome, outcomes, table, told


@click.command()
@click.option("--seed", default=0, help="the same seed, the same cases")
@click.option("--count", default=100, help="cases of each kind")
@click.option("--what", default=",".join(CHECKS), help="kinds, with commas between them", show_default=True)
@click.option("--jobs", default=2, help="processes")
@click.option("--key", default=None, help="one case again, by its key")
def main(seed: int, count: int, what: str, jobs: int, key: str | None) -> None:
    """Random objectives, each derived thing against a second source. Ends with 1 if any is wrong, crashed or slow."""
    kinds = what.split(",")
    work = [(kind, key or f"{seed}/{kind}/{i}") for kind in kinds for i in range(1 if key else count)]
    found: list[Outcome] = []
    for o in outcomes(work, 1 if key else jobs):
        found.append(o)
        if o.verdict in ("wrong", "crashed", "slow") or key:
            click.echo(told(o))
    click.echo(table(found))
    raise SystemExit(any(o.verdict in ("wrong", "crashed", "slow") for o in found))


if __name__ == "__main__":
    main()
