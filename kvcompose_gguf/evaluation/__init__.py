"""Evaluates methods: answers to long-context tasks from compressed caches, their scores, and reports."""
