"""What undoes all that a test does; imported only when a value is to be sandboxed."""
