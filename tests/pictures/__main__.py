"""Draw the pictures anew: ``python -m tests.pictures``, with ``docs/examples`` in PYTHONPATH."""

import logging

from ..pages import DOCS
from .runs import PICTURES

logging.getLogger("lifekit").disabled = True  # one of the runs is about what goes wrong
for name, draw in PICTURES.items():
    path, text = DOCS / "images" / name, draw()
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
        print(f"{path.relative_to(DOCS.parent)} is new")
