"""Experiments: what the library's claims are tested with. Not part of the installed package."""
