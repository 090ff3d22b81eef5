"""Needles that tiny models can read, and a calibration of a few of them."""

from __future__ import annotations

from kvcompose_gguf.learning import trials
from kvcompose_gguf.learning.trials import CalibrateOptions

SMALL = CalibrateOptions(n_needles=1, n_lengths=2, n_depths=2, shortest=400, longest=700, n_errors=3)

# the tiny models' tokens are bytes, which SentencePiece does not turn back into spaces
NEEDLES = tuple((beginning, end.replace(" ", "-"), question) for beginning, end, question in trials.NEEDLES)
