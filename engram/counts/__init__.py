"""Exact counts of n-grams in host memory: a text is learned in one pass, without gradients."""

from engram.counts.memory import CountMemory, Reading

__all__ = ["CountMemory", "Reading"]
