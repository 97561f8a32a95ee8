"""stub."""


def quickstart() -> None:
    """Stub."""
