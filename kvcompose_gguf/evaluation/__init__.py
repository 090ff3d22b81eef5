"""Does a compressed cache still answer: RULER's tasks, where their text is from, and how answers are scored."""
