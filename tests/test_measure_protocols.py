"""The profiles' numbers and the grammar that overrides them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.measure.protocols import PROFILES, base_name, profile


def test_quick_is_two_seconds_of_idle_and_a_two_second_window() -> None:
    quick = profile("quick")
    assert 2 * quick.idle_s == 2.0 and quick.window_s == 2.0 and quick.window_inferences == 5
    assert (quick.warmup_s, quick.warmup_inferences, quick.warmup_cap_s) == (0.5, 5, 3.0)
    assert quick.repeats_min == quick.repeats_max == 3


def test_paper_is_three_trials_of_a_thousand_images() -> None:
    paper = profile("paper")
    assert (paper.images, paper.repeats_min, paper.repeats_max, paper.warmup_inferences, paper.idle_s) == (1000, 3, 3, 2, 2.0)


def test_publish_asks_for_more_than_standard() -> None:
    standard, publish = profile("standard"), profile("publish")
    assert standard.sensor_windows == 100 and (standard.window_s, standard.window_inferences) == (10, 50)
    assert (publish.window_s, publish.window_inferences, publish.repeats_min) == (60, 1024, 10)


def test_a_field_is_overridden_and_the_name_says_so() -> None:
    found = profile("standard( repeats_max=6, window_s=5)")
    assert (found.window_s, found.repeats_max, found.idle_s) == (5, 6, 10)
    assert found.name == "standard(repeats_max=6, window_s=5)" and base_name(found) == "standard"
    assert profile(found.name) == found


@pytest.mark.parametrize(
    "spelling",
    ["quick(window=1)", "quick(window_s='2')", "quick(window_s=-1)", "quick(repeats_min=0)", "quick(repeats_min=4)",
     "quick(window_s=1e999)", "quick(warmup_inferences=1.5)", "quick(repeats_min=True)", "quick(name='x')", "quick(5)"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(spelling: str) -> None:
    with pytest.raises(SpecError):
        profile(spelling)


def test_an_unknown_profile_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="standard"):
        profile("standart")


@given(st.sampled_from(sorted(PROFILES)), st.text(max_size=40))
def test_any_text_is_a_protocol_or_a_spec_error(name: str, text: str) -> None:
    for spelling in (text, f"{name}({text})"):
        try:
            profile(spelling)
        except SpecError:
            continue
