"""The ``kvcompose`` command."""
