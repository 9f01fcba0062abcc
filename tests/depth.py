"""How often chance is asked: `make test-long TIMES=10` asks ten times as often."""

import os

TIMES = int(os.environ.get("TIMES", "1"))
