"""The scripts live one folder up and are imported as they are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
