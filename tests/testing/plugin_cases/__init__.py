"""Applications that the plugin's tests let pytest test, each in a run of its own."""
