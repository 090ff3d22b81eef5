"""Compression methods: one frozen dataclass a file. A method turns attention into a CompositionPlan."""
