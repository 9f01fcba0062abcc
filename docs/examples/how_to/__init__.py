"""The code of the how-to pages; tests/test_how_to.py runs it."""
