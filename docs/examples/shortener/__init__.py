"""A URL shortener: links in PostgreSQL, cached in Redis, whose visits a worker counts."""
