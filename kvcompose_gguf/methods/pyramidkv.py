"""PyramidKV (arXiv 2406.02069): SnapKV whose budget falls with depth."""

from __future__ import annotations

from dataclasses import dataclass

from .allocation import Allocation, Pyramid
from .base import check_number
from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's choice of tokens; the budgets are those of ``Pyramid``, which says where they differ from others'.

    Attributes:
        beta: steepness; without limits the last layer has 1/beta of the average budget behind its window.
    """

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        self.default_allocation()  # checks its range

    def default_allocation(self) -> Allocation:
        return Pyramid(self.window, self.beta)
