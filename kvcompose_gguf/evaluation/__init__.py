"""Evaluation: RULER's tasks, the texts they are built from, answers from a compressed cache, and their scores."""
