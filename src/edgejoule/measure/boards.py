"""Which power rails of a board add up to the whole, and what that whole is: one visible table for tegrastats, INA3221 and logs.

A rail that feeds others is never added to them, and rails are known by their exact names. Where the rails that were seen are not
exactly a board's (one of its total is missing, or there is one that the board does not have), nobody knows, and there is no total.

Sources: energymon's rail sets; NVIDIA's developer guides and forum (POM_5V_IN and VDD_IN are the whole input; on AGX Orin
VIN_SYS_5V0 feeds VDDQ_VDD2_1V8AO; Thor's VIN is an INA238 in front of the module *and* its carrier board). The module's rails hold
neither the carrier board nor what is plugged into it. Jetson Nano 2GB has no sensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

UNCONNECTED = "NC"  # the label of a channel that measures nothing; a board may have several
MODULE, BOARD, RAIL = "module-in", "board-in", "rail"
CARRIER = ("VDD_MUX", "VDD_5V_IO_SYS", "VDD_3V3_SYS", "VDD_3V3_IO_SLP", "VDD_1V8_IO", "VDD_M2_IN", "VDD_3V3_SYS_M2")


@dataclass(frozen=True, slots=True)
class Board:
    """``whole``: the rails that add up to it. ``parts``: rails that it feeds. ``outside``: rails of the carrier, which feed it."""

    name: str
    whole: tuple[str, ...]
    parts: tuple[str, ...]
    outside: tuple[str, ...] = ()
    scope: str = MODULE

    def fits(self, rails: Collection[str]) -> bool:
        return set(self.whole) <= set(rails) <= {*self.whole, *self.parts, *self.outside}


BOARDS = (
    Board("Jetson TX1 and TX2, JetPack 3", ("VDD_IN",), ("VDD_CPU", "VDD_GPU", "VDD_SOC", "VDD_WIFI", "VDD_DDR"), CARRIER),
    Board("Jetson TX2", ("VDD_IN",), ("VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI", "VDD_SYS_CPU", "VDD_SYS_DDR"), CARRIER),
    Board("Jetson Nano", ("POM_5V_IN",), ("POM_5V_GPU", "POM_5V_CPU")),
    Board("Jetson TX2 NX, Xavier NX, Orin NX and Orin Nano", ("VDD_IN",), ("VDD_CPU_GPU_CV", "VDD_CPU_GPU", "VDD_SOC")),
    Board("Jetson AGX Xavier", ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), ()),
    Board("Jetson AGX Orin", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("VDDQ_VDD2_1V8AO",)),
    Board("Jetson Thor", ("VIN",), ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), scope=BOARD),
)


def total_rails(rails: Collection[str]) -> tuple[str, ...]:
    """The rails, of those seen, that add up to the whole; () where nobody knows. ``NC`` is no rail."""
    seen = set(rails) - {UNCONNECTED}
    wholes = {board.whole for board in BOARDS if board.fits(seen)}
    return wholes.pop() if len(wholes) == 1 else ()


def scope(whole: Sequence[str]) -> str:
    """What the rails that were added up measure: a module, a board with its carrier, or, where they are no board's whole, rails."""
    return next((board.scope for board in BOARDS if set(board.whole) == set(whole)), RAIL)


def chosen(rails: Collection[str], named: str) -> tuple[str, ...] | str:
    """The total of a live sensor: the rails that the user named (comma-separated), else the board's; or one sentence why there is none."""
    seen = sorted(set(rails) - {UNCONNECTED})
    if not named:
        found = total_rails(seen)
        return found or (
            f"nobody knows which of the rails {', '.join(seen)} add up to the whole: name those that do, which feed one another never, "
            f'as in whole="{seen[0] if seen else "VDD_IN"}"'
        )
    wanted = tuple(name.strip() for name in named.split(","))
    missing = [name for name in wanted if name not in seen]
    if missing or len(set(wanted)) < len(wanted):
        return f"whole={named!r} does not fit the rails {', '.join(seen) or 'that are there (none)'}: name some of these, each once"
    return wanted
