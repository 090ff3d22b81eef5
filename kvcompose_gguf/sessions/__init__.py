"""Session files: any later process continues from a saved context without reading its text again."""

from .file import describe, opened, save
from .info import ENDING, SessionInfo, Snapshot, list_sessions, session_path, sessions_dir

__all__ = [
    "ENDING", "SessionInfo", "Snapshot", "describe", "list_sessions", "opened", "save", "session_path", "sessions_dir",
]  # fmt: skip
