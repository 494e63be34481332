"""Records: frozen, JSON and back without loss, damaged values refused with ValueError."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejoule import records
from edgejoule.caveats import TABLE, caveat
from edgejoule.plain import decode, digest, encode, pack_floats, unpack_floats
from edgejoule.records import Artifact, Interval, Trial, floats
from tests.samples import artifact, trial


def test_every_record_is_frozen_and_documented() -> None:
    found = [value for value in vars(records).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]
    assert len(found) > 20
    for record in found:
        assert record.__dataclass_params__.frozen, record  # type: ignore[attr-defined]


@pytest.mark.parametrize("record", [artifact(), trial(), caveat("estimate", "seen"), Interval(1.0, None, 2.0, 3)])
def test_json_and_back(record: Any) -> None:
    text = json.dumps(encode(record))
    assert decode(type(record), json.loads(text)) == record


@given(st.lists(st.floats(allow_nan=False), max_size=50))
def test_samples_survive_exactly(values: list[float]) -> None:
    assert list(unpack_floats(pack_floats(floats(values)))) == values


def test_nan_samples_survive() -> None:
    assert math.isnan(unpack_floats(pack_floats(floats([math.nan])))[0])


@given(st.binary(max_size=60))
def test_damaged_sample_blocks_are_refused(blob: bytes) -> None:
    with contextlib.suppress(ValueError):
        unpack_floats(blob)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([Artifact, Trial, Interval]), JSON)
def test_any_json_decodes_or_is_refused(cls: Any, value: Any) -> None:
    with contextlib.suppress(ValueError):
        decode(cls, value)


@given(st.sampled_from(sorted(encode(trial()))), JSON)
def test_any_changed_field_decodes_or_is_refused(field: str, value: Any) -> None:
    with contextlib.suppress(ValueError):
        decode(Trial, encode(trial()) | {field: value})


@pytest.mark.parametrize(
    ("change", "said"), [({"extra": 1}, "unknown field extra"), ({"n": "3"}, r"Interval\.n: expected int"), ({"n": True}, "expected int")]
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(Interval, {"value": 1.0, "low": None, "high": None, "n": 3} | change)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="missing field n"):
        decode(Interval, {"value": 1.0, "low": None, "high": None})


def test_digests_ignore_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2.5}) == digest({"b": 2.5, "a": 1}) != digest({"a": 1, "b": 2.6})


def test_every_caveat_says_why_and_what_to_do() -> None:
    for code, (severity, why, advice) in TABLE.items():
        assert severity in ("note", "warn", "reject"), code
        assert why.endswith(".") and advice.endswith("."), code
        assert caveat(code, "seen").code == code
