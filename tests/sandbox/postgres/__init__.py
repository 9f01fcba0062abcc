"""The gateway: its bytes, its clients, and an application that goes through it."""
