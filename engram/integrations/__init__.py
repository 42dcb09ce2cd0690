"""Models of other libraries (transformers) and files of other programs (formats)."""
