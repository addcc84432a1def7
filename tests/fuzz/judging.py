"""What comes out of each case, and the count of it over many: right, refused, wrong, crashed or slow."""

from __future__ import annotations

import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from unroll.errors import UnrollError

from .checks import CHECKS, Nothing, Wrong

SLOW = 10.0
"""CPU-seconds that one case may take."""
VERDICTS = ("right", "refused", "wrong", "crashed", "slow")


@dataclass(frozen=True)
class Outcome:
    what: str
    key: str
    verdict: str
    reason: str
    yaml: str
    seconds: float


class TooSlow(BaseException):
    """Not an Exception: nothing in between may take it for an error of its own."""


def _stop(*_: Any) -> None:
    raise TooSlow


def judged(what: str, key: str) -> Outcome:
    """One case: drawn, derived, checked; whatever comes out has a name."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _stop)
    begun, case = time.process_time(), None
    try:
        signal.setitimer(signal.ITIMER_PROF, SLOW)
        case = CHECKS[what].draw(key)
        CHECKS[what].run(case)
        verdict, reason = "right", ""
    except Nothing as e:
        verdict, reason = "refused", f"nothing to compare: {e}"
    except UnrollError as e:
        verdict, reason = "refused", f"{e.code} {e.message}"
    except Wrong as e:
        verdict, reason = "wrong", str(e)
    except TooSlow:
        verdict, reason = "slow", f"over {SLOW:g} CPU-seconds"
    except Exception:
        verdict, reason = "crashed", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Outcome(what, key, verdict, reason, case.yaml if case else "", time.process_time() - begun)


def _judged(job: tuple[str, str]) -> Outcome:
    return judged(*job)


def outcomes(work: list[tuple[str, str]], processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(_judged, work)
        return
    with get_context("spawn").Pool(processes, maxtasksperchild=400) as pool:  # caches grow: begin afresh now and then
        yield from pool.imap(_judged, work, chunksize=1)


def _kind(reason: str) -> str:
    """The message without the formulas and numbers of this one case."""
    line = reason.splitlines()[0]
    line = re.sub(r"'[^']*'", "'..'", line)
    return re.sub(r"\s+", " ", " ".join(line.split()[:9]))


def told(o: Outcome) -> str:
    return f"--- {o.what}, key {o.key!r}, {o.verdict}: {o.reason.rstrip()}\n{o.yaml}"


def table(found: list[Outcome]) -> str:
    lines = [f"{'':10}" + "".join(f"{v:>9}" for v in VERDICTS) + f"{'worst s':>9}{'all s':>9}"]
    for what in dict.fromkeys(o.what for o in found):
        mine = [o for o in found if o.what == what]
        count, seconds = Counter(o.verdict for o in mine), [o.seconds for o in mine]
        lines.append(
            f"{what:10}" + "".join(f"{count[v]:9}" for v in VERDICTS) + f"{max(seconds):9.1f}{sum(seconds):9.0f}"
        )
    reasons = Counter((o.what, _kind(o.reason)) for o in found if o.verdict == "refused")
    rows = [f"{n:7}  {what}: {why}" for (what, why), n in reasons.most_common(40)]
    return "\n".join([*lines, *(["", "refused", *rows] if rows else [])])
