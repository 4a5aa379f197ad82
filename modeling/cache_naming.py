"""The two names of a model's KV cache: `cache`, and `past_key_values` in transformers before 5.24."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast


_NAMES = ("cache", "past_key_values")
_Forward = TypeVar("_Forward", bound=Callable[..., Any])

#: the name of arguments and output fields in the installed transformers
CACHE: str = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


def rename_cache(arguments: dict[str, Any], name: str) -> None:
    """Puts the cache in `arguments`, if there is one, under `name`, whichever of its two names it has.

    Raises:
        ValueError: if it is there under both names.
    """
    given = [known for known in _NAMES if known in arguments]
    if len(given) == 2:
        raise ValueError("`cache` and `past_key_values` are two names of one argument, but both were given; give one.")
    if given:
        arguments[name] = arguments.pop(given[0])


def cache_argument(forward: _Forward) -> _Forward:
    """Lets a `forward(self, ..., cache=None, ...)` take its cache as `past_key_values` too.

    Raises:
        ValueError: if a call gives both.
    """

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        rename_cache(kwargs, "cache")
        return forward(self, *args, **kwargs)

    return renamed  # type: ignore[return-value]


class NamedCache:
    """Mixed into outputs: their cache can be read as `cache`, whatever their field is called."""

    if CACHE != "cache":

        @property
        def cache(self) -> Any:
            return getattr(self, CACHE)
