"""The MONAI Label app, installed as the package ``pe_monailabel``: translation between MONAI Label and ``pe_app``.

``pe-app serve`` starts it; MONAI Label's own command finds it through ``main.py``.
"""
