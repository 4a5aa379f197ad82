"""Stand-in for the export mixin of transformers, which its sdist does not carry.

`ModelTesterMixin` inherits from it. Export needs the static mode; it is tested in the project's own suite.
"""


class ExportTesterMixin:
    """Base of `ModelTesterMixin` without cases of its own."""
