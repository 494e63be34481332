"""The one grammar: what parses, what is refused, and that nothing is ever evaluated."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejoule import registry
from edgejoule.errors import EdgejouleError, SpecError, UnknownNameError
from edgejoule.registry import Call, canonical, create, parse, parse_recipe

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True).filter(
    lambda s: s not in {"if", "in", "is", "or", "as", "and", "not", "for", "def", "del", "try"}
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("rapl", "rapl", {}),
        ("rapl()", "rapl", {}),
        (" rapl(period_s=.05)", "rapl", {"period_s": 0.05}),
        ('openvino(precision="int8", streams=2)', "openvino", {"precision": "int8", "streams": 2}),
        ("f(x=-1, y=[1, 2], z=None)", "f", {"x": -1, "y": [1, 2], "z": None}),
    ],
)
def test_good_spellings(text: str, name: str, options: dict[str, object]) -> None:
    assert parse(text) == Call(name, options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "a b",
        "a(",
        "a(1)",
        "a(x=b)",
        "a(x=__import__('os'))",
        "a(**{})",
        "a.b",
        "a()()",
        "a(x=1)(y=2)",
        "a | b",
        "lambda: 1",
        "a(x=1, x=2)",
        "f(x=f(y=1))",
        "[a]",
    ],
)
def test_bad_spellings_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


def test_recipes() -> None:
    assert [call.name for call in parse_recipe("fuse | resize(px=192) | qat(bits=8)")] == ["fuse", "resize", "qat"]
    assert parse_recipe("  ") == ()
    assert canonical("a|b( y=2,x = 1 )") == "a | b(x=1, y=2)"
    for bad in ("a |", "| a", "a & b", "a | 1", "(a | b) + c"):
        with pytest.raises(SpecError):
            parse_recipe(bad)


def test_a_long_or_deep_spelling_is_refused_not_crashed() -> None:
    for text in ("a(x=" + "[" * 2000 + "]" * 2000 + ")", "a" * 5000, "a(x=" + "-" * 3000 + "1)", "a(x=" + "9" * 4090 + ")"):
        with contextlib.suppress(SpecError):
            parse(text)


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse_recipe(text)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_the_canonical_spelling_parses_to_itself(name: str, options: dict[str, object]) -> None:
    import keyword

    if keyword.iskeyword(name) or any(map(keyword.iskeyword, options)):
        return
    call = Call(name, options)
    assert parse(str(call)) == call
    assert str(parse(str(call))) == str(call)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of these tests."""

    need: int
    ratio: float = 0.5
    mode: str = "a"

    def __post_init__(self) -> None:
        if self.ratio > 1:
            raise ValueError("ratio is at most 1")


@pytest.fixture(autouse=True)
def _leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"leaf": f"{__name__}:Leaf", "torn": "no_such_package.here:X", "gone": f"{__name__}:Nothing"}
    monkeypatch.setattr("edgejoule.measure.LEAVES", table)


def test_create_builds_the_leaf() -> None:
    assert create("meter", "leaf(need=3, ratio=1)") == Leaf(3, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leef(need=1)", "did you mean leaf"),
        ("leaf", "needs need"),
        ("leaf(need=1, speed=2)", "no option 'speed': it takes need, ratio, mode"),
        ('leaf(need="1")', "expected int"),
        ("leaf(need=True)", "expected int"),
        ("leaf(need=1, ratio=2.0)", "ratio is at most 1"),
        ("torn", "which is not installed"),
        ("gone", "mend its entry point"),
    ],
)
def test_create_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        create("meter", text)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        create("meter", "laef(need=1)")
    assert caught.value.nearest == ("leaf",)


def test_third_parties_come_in_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", f"{__name__}:Leaf", "edgejoule.meter")
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [point] if group == "edgejoule.meter" else [])
    assert "theirs" in registry.names("meter")
    assert create("meter", "theirs(need=1)") == Leaf(1)


def test_every_error_is_ours() -> None:
    assert issubclass(UnknownNameError, EdgejouleError)
