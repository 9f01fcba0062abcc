"""Redis's sandbox: a leased database, and what is said on the way to it."""
