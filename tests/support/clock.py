"""A clock that tests set."""


class Clock:
    """Shows `now`, in seconds."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
