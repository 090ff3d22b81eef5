"""Shared helpers of the tests: tiny models, servers, terminals."""
