"""PyramidKV (arXiv 2406.02069): SnapKV with a budget that falls with depth."""

from __future__ import annotations

from dataclasses import dataclass

from ..support.checks import check_number
from .allocation import Allocation, Pyramid
from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Chooses tokens like SnapKV, with the budgets of ``Pyramid``, which lists the differences from other versions.

    Attributes:
        beta: steepness; without limits the last layer gets 1/beta of the average budget outside its window.
    """

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        self.default_allocation()  # checks the range of beta

    def default_allocation(self) -> Allocation:
        return Pyramid(self.window, self.beta)
