"""A URL shortener: links in PostgreSQL, cached and counted in Redis, reports through aiopg."""
