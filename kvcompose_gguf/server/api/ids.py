"""Ids of answers and tool calls."""

from __future__ import annotations

import secrets
import string


def random_id() -> str:
    """Returns 32 random letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(32))
