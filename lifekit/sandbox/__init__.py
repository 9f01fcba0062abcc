"""What the drivers' sandboxes are made of; imported only when a value is to be sandboxed."""
