"""The decision: which tokens stay, as pure values."""
