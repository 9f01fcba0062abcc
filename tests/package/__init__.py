"""What users install: built, installed alone and with each extra, run on each Python."""
