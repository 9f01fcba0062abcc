"""The sandbox of what works on SQLite: in each block on private copies."""
