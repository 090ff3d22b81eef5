"""What all pictures share: file formats, colours and markers. Needs matplotlib (the extra ``plot``), on first use."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

SUFFIXES = (".svg", ".png", ".pdf")

# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ as well
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def check_plot(file: Path) -> None:
    """Raises ConfigError unless ``file`` has a supported format and matplotlib is installed."""
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot={str(file)!r} does not end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"plot={str(file)!r} needs matplotlib: pip install 'kvcompose-gguf[plot]'") from error
