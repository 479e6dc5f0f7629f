"""Put this folder's modules, and the error budget of the operator tests, on the path of its tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]
