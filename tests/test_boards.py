"""Which rails make the whole: every board of the table, and every way not to guess."""

from __future__ import annotations

import itertools

import pytest

from edgejoule.measure import boards
from tests.fakes.jetson import LINES


@pytest.mark.parametrize("name", LINES)
def test_every_board_whose_rails_were_seen_has_its_total(name: str) -> None:
    _, rails, total = LINES[name]
    assert boards.total_rails([*rails, "NC"]) == total
    assert boards.scope(total) == ("board-in" if name.startswith("Thor") else "module-in")


@pytest.mark.parametrize(
    "rails",
    [
        (),
        ("NC",),
        ("VDD_GPU_SOC", "VDD_CPU_CV"),  # an AGX Orin whose 5 V input was not seen
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VDDQ_VDD2_1V8AO", "NC"),
        ("GPU", "CPU", "SOC", "CV", "VDDRQ"),
        ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # a Thor without the INA238 at its input
        ("VDD_IN_2", "VDD_CPU"),  # like VDD_IN, but not it
        ("MY_VDD_IN",),
        ("VDD_IN", "VDD_FOO"),  # what does FOO feed?
        ("VDD_IN", "POM_5V_IN"),
    ],
)
def test_what_nobody_knows_has_no_total(rails: tuple[str, ...]) -> None:
    assert boards.total_rails(rails) == ()


def test_a_total_never_holds_a_rail_that_another_of_its_rails_feeds() -> None:
    for board in boards.BOARDS:
        assert not set(board.whole) & {*board.parts, *board.outside} and boards.UNCONNECTED not in board.whole
    for one, two in itertools.combinations(boards.BOARDS, 2):
        if set(one.whole) == set(two.whole):
            assert one.scope == two.scope
    assert boards.total_rails(("VDD_IN", "VDD_MUX", "VDD_5V_IO_SYS")) == ("VDD_IN",), "the carrier's rails are not the module's"


def test_the_user_may_name_the_rails_of_an_unknown_board() -> None:
    assert boards.chosen(("A", "B", "C"), "A, B") == ("A", "B")
    assert boards.scope(("A", "B")) == "rail" and boards.scope(("VIN",)) == "board-in"
    for named in ("D", "A,A", "A,", "a"):
        assert "does not fit the rails A, B" in str(boards.chosen(("A", "B"), named))
    refusal = str(boards.chosen(("VDD_FOO", "VDD_IN", "NC"), ""))
    assert "VDD_FOO, VDD_IN" in refusal and 'whole="' in refusal and "NC" not in refusal
