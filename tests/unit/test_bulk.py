"""Bodies come out of their parts as they went in, whatever their sizes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import bulk
from cluster.bulk import Assembly, split


def together(parts: list[bulk.Part]) -> Any:
    assembly = Assembly()
    *first, last = [assembly.add(part) for part in parts]
    assert first == [None] * len(first)
    return last


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=6), part_bytes=st.integers(1, 200))
def test_a_body_comes_out_as_it_went_in(sizes: list[int], part_bytes: int) -> None:
    arrays = [np.arange(size, dtype="f4").reshape(-1, 1) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "PART_BYTES", part_bytes)
        parts = list(split("snapshot", {"step": 7, "arrays": arrays}))
    assert max(part.nbytes for part in parts) <= part_bytes
    kind, body = together(parts)
    assert (kind, body["step"]) == ("snapshot", 7)
    for ours, theirs in zip(body["arrays"], arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert not ours.size or ours.flags.writeable


def test_a_body_whose_sender_died_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_BYTES", 64)
    lost = list(split("snapshot", np.zeros(100)))
    whole = list(split("snapshot", np.ones(100)))
    kind, body = together([*lost[:-3], *whole])
    assert kind == "snapshot"
    np.testing.assert_array_equal(body, np.ones(100))


def test_what_has_no_beginning_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_BYTES", 64)
    assert together(list(split("snapshot", np.zeros(100)))[1:]) is None
