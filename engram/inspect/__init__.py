"""Look into a memory: what it read and said at each token of a text, and what one costs before it is made."""
