"""The exceptions that are meant for the user, each told in one sentence."""


class UserError(Exception):
    """A mistake in what was asked for: what was wrong, with the value, and what to do.

    The command line prints the sentence alone and exits with code 2; from Python it is raised.
    """


class NumericalError(UserError):
    """NaN or infinite values in a model: its weights or its precision are broken."""

    step: int | None = None
    """Of the generation that met them, from 1; None if it was no generation."""


class GraphError(UserError):
    """A loaded graph that fails when it is run: the sentence says which, and the backend's reason.

    Memory that does not suffice is no such error: it says nothing of the graph.
    """


class Interrupted(Exception):  # noqa: N818, like KeyboardInterrupt it is no error
    """Work that was stopped on request; the sentence says what is there and how to go on."""
