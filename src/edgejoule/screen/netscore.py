"""NetScore: one number for accuracy against size and work. Pure: no model, no file.

Source: A. Wong, "NetScore: Towards Universal Metrics for Large-scale Performance Analysis of Deep Neural Networks for
Practical On-Device Edge Usage", 2018, arXiv 1806.05512.
"""

from __future__ import annotations

import math

from edgejoule.errors import SpecError


def netscore(top1_pct: float, params_m: float, macs_g: float, alpha: float = 2.0, beta: float = 0.5, gamma: float = 0.5) -> float:
    """20 log10(top1^alpha / (params^beta macs^gamma)) in decibels: percent, millions of parameters, billions of multiply-adds.

    Domain: 0 < top1_pct <= 100, params_m > 0, macs_g > 0, all finite. Other units of params or MACs add a constant and
    change no order. Raises SpecError outside the domain.
    """
    if not all(math.isfinite(value) for value in (top1_pct, params_m, macs_g, alpha, beta, gamma)):
        raise SpecError("NetScore needs finite numbers: expected percent, millions of parameters and billions of MACs")
    if not 0 < top1_pct <= 100:
        raise SpecError(f"NetScore of a top-1 of {top1_pct:g} is not defined: expected a percentage above 0, at most 100")
    if params_m <= 0 or macs_g <= 0:
        raise SpecError(f"NetScore of {params_m:g} M parameters and {macs_g:g} G MACs is not defined: expected both above 0")
    return 20.0 * (alpha * math.log10(top1_pct) - beta * math.log10(params_m) - gamma * math.log10(macs_g))
