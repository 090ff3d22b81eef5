"""Small helpers that know nothing about caches or models, and the names that several commands' options share."""
