"""Rows: read, recognised, checked, split, and turned into tokens."""
