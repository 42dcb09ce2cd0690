"""Other people's models and other people's formats. Needs transformers: pip install engram-lm[hf]."""

from engram.integrations.attach import attach, detach

__all__ = ["attach", "detach"]
