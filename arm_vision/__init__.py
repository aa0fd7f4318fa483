"""The modules of this repository as a package: `from arm_vision import models_arm, pretrained`.

`pip install` puts them into the folder `sources` beside this file; in a checkout they lie above it.
"""

import runpy
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE / "sources" if (_HERE / "sources").is_dir() else _HERE.parent
runpy.run_path(str(_ROOT / "util" / "package.py"))["as_package"](__name__)
