"""Formats of rows, each a plug-in: what columns it is known by, and how a row becomes its normal form."""
