"""``kvcompose chat``: a conversation about documents in the terminal."""
