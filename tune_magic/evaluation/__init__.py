"""Is it better: scores of base and tuned, compared row by row."""
