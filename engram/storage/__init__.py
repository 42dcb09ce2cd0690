"""Bytes on disk and in memory: files and folders written completely or not at all, mappings, read-ahead. Nothing here
depends on what rows mean."""
