"""What Python, AnyIO and its backends have no word for. It imports nothing of lifekit."""
