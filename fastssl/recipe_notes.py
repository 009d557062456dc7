"""What a dataclass field means: its ``help`` metadata, else the comment behind it in the source (``threshold: float = 0.95  # tau``)."""

from __future__ import annotations

import inspect
import io
import textwrap
import tokenize
from dataclasses import fields
from typing import Any


def field_notes(config: Any) -> dict[str, str]:
    """Field name -> meaning ("" where nothing is written) of a dataclass type."""
    comments = _trailing_comments(config)
    return {f.name: str(f.metadata.get("help") or comments.get(f.name, "")) for f in fields(config)}


def _trailing_comments(config: Any) -> dict[str, str]:
    """Comments on the lines ``name: type ...  # comment`` of a class body; {} when the source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(config))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return {}
    starts = {}  # line -> name that the line begins to annotate
    for token, following in zip(tokens, tokens[1:], strict=False):
        if token.type == tokenize.NAME and following.string == ":" and not token.line[: token.start[1]].strip():
            starts[token.start[0]] = token.string
    return {starts[t.start[0]]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT and t.start[0] in starts}
