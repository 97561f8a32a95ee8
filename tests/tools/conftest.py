"""The tools are run from the repository's root and are in no wheel: the root is put on the path for their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
