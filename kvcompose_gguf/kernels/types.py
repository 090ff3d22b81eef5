"""Array types of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


def as_c(array: npt.NDArray[Any], name: str, dtype: type, ndim: int) -> npt.NDArray[Any]:
    """Returns ``array`` as a contiguous array; raises ConfigError if its dtype or number of axes is wrong."""
    if array.dtype != dtype or array.ndim != ndim:
        raise ConfigError(f"{name} is {array.dtype} with {array.ndim} axes; {np.dtype(dtype)} with {ndim} is needed")
    return np.ascontiguousarray(array)
