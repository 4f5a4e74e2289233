"""Errors that the exporter raises on purpose, each saying what was found and what to do."""

from __future__ import annotations


class ExportError(Exception):
    """A checkpoint cannot be exported, or its graphs do not pass verification."""
