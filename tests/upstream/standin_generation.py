"""Stand-in for the generation mixin of transformers, which its sdist does not carry.

`ModelTesterMixin` only checks that a generating model's test class inherits it. The generation cases themselves are
rebuilt in `tests/test_generation_cases.py`, where every routing and KV mode runs them against a reference of its own.
"""


class GenerationTesterMixin:
    """Marks a test class whose model can generate."""
