"""The pictures of the documentation, drawn of real runs: ``make pictures``."""
