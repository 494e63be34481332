"""Racing: the fastest wins whatever the machine does meanwhile, losers leave early, failures leave with their reason."""

from __future__ import annotations

import random

import pytest

from edgejoule.errors import BackendError
from edgejoule.measure.race import Lane, race, ratio

SPEEDS = {"fast": 1.0, "close": 1.04, "slow": 1.3, "hopeless": 4.0}


def run(
    speeds: dict[str, float] = SPEEDS, rounds: int = 8, noise: float = 0.01, seed: int = 0
) -> tuple[tuple[Lane[str], ...], list[tuple[str, int]]]:
    """Trials of known speed, under a load that triples everything in some rounds and noise of its own in each."""
    dice, calls = random.Random(seed), []
    load = [dice.choice((1.0, 3.0)) for _ in range(rounds)]

    def trial(name: str, number: int) -> float:
        calls.append((name, number))
        return speeds[name] * load[number] * (1 + noise * dice.gauss(0, 1))

    return race(tuple(speeds), trial, rounds, seed), calls


@pytest.mark.parametrize("seed", range(20))
def test_the_fastest_wins_though_the_machine_changes_between_rounds(seed: int) -> None:
    lanes, _ = run(seed=seed)
    assert lanes[0].candidate == "fast" and not lanes[0].left


def test_losers_leave_as_soon_as_the_rounds_tell() -> None:
    lanes, calls = run()
    rounds = {lane.candidate: len(lane.seconds) for lane in lanes}
    assert rounds["hopeless"] == 1 and 3 <= rounds["slow"] <= 4 and rounds["fast"] >= 3
    assert {lane.candidate: lane.left.split(":")[0] for lane in lanes}["hopeless"] == "dropped after 1 round"
    assert len(calls) == sum(rounds.values())


def test_what_cannot_be_told_apart_runs_to_the_end() -> None:
    lanes, _ = run({"a": 1.0, "b": 1.0}, noise=0.02)
    assert all(not lane.left and len(lane.seconds) == 8 for lane in lanes)


def test_a_race_with_one_left_is_over() -> None:
    lanes, _ = run({"fast": 1.0, "hopeless": 9.0}, rounds=50)
    assert len(lanes[0].seconds) == 3


def test_rounds_interleave_in_an_order_of_their_own() -> None:
    _, calls = run(dict.fromkeys("abcdef", 1.0), rounds=4, noise=0.3)
    orders = {tuple(name for name, number in calls if number == n) for n in range(3)}
    assert len(orders) > 1, "each round has its own order"
    assert [number for _, number in calls] == sorted(number for _, number in calls)


def test_a_failure_leaves_with_its_reason_and_a_bug_is_raised() -> None:
    def trial(name: str, number: int) -> float:
        if name == "broken" and number == 1:
            raise BackendError("the file is damaged")
        return 1.0

    lanes = race(("sound", "broken"), trial, 3, failures=(BackendError,))
    assert {lane.candidate: lane.left for lane in lanes} == {"sound": "", "broken": "failed: the file is damaged"}
    with pytest.raises(BackendError):
        race(("sound", "broken"), trial, 3)


def test_ratios_are_paired_by_round() -> None:
    found = ratio(Lane("a", (2.0, 6.0, 2.0)), Lane("b", (1.0, 3.0)))
    assert found is not None and found.n == 2 and found.value == pytest.approx(2.0)
    assert ratio(Lane("a", ()), Lane("b", (1.0,))) is None
