"""Long-context tasks: texts, samples, prompts and answers."""
