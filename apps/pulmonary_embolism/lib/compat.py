"""Import this before monailabel: 0.8.5 cannot be imported beside pydicom 3 without it.

MONAI Label imports ``pydicom_seg`` 0.4.1, which is unmaintained and imports a module that pydicom 3 no longer has. It
is needed for MONAI Label's own DICOM SEG export only, which this app does not offer, so an empty stand-in suffices.
"""

import sys
import types

sys.modules.setdefault("pydicom_seg", types.ModuleType("pydicom_seg"))
