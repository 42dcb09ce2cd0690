"""Bytes on disk and in memory: whole files and folders, mappings, read-ahead. It knows no rows."""
