"""PostgreSQL's sandbox at the wire: a gateway that speaks the protocol to whatever client connects."""
