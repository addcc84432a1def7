"""Degenerate inputs are answered by finite numbers with finite slopes, or refused in words; a blank sample leaves the others alone."""

from __future__ import annotations

import pytest

from tests.laws.degenerate import KINDS, SUBJECTS, Subject, outcome


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_degenerate_inputs(subject: Subject) -> None:
    found = {kind: outcome(subject, kind) for kind in KINDS}
    assert not {k: f for k, f in found.items() if f.startswith("WRONG")}
    refused = "stiefel" in subject.name and subject.shape[0] > subject.shape[1]  # wide: no such matrix
    assert refused or found["usual"] == "right"
