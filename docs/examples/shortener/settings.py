"""What the environment says."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Where the servers are; None stands for one that comes and goes with the application."""

    database_url: str | None
    redis_url: str | None

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read DATABASE_URL and REDIS_URL."""
        return cls(os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL"))
