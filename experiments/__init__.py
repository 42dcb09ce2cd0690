"""Experiments that test the library's claims. Not part of the installed package."""
