"""Model files: find, fetch, identify."""
