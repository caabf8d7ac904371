"""The MONAI Label app, installed as the package ``pe_monailabel``: the wheel carries it, ``pe-app serve`` starts it.

MONAI Label loads ``main.py`` by its path and expects the app's own modules under the name ``lib``; this folder is put
on the path so that the server and the app share one copy of them.
"""

import sys
from pathlib import Path

APP_DIR = Path(__file__).resolve().parent

if str(APP_DIR) not in sys.path:
    sys.path.insert(0, str(APP_DIR))
