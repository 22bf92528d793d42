"""Plug-ins for tune_magic: a package to copy."""
