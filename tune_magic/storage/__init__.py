"""The run folder: the only truth about a run."""
