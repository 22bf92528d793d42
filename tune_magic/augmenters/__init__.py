"""More rows out of the ones there are: the same question in other words, or with slips of the keyboard."""
