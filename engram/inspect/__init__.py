"""Look into a memory: what it read and added at each token of a text, and what a memory costs before it is made."""
