"""Where MONAI Label's loader looks for the app: the first class here whose base is MONAILabelApp."""

from pe_monailabel.app import PulmonaryEmbolismApp

__all__ = ["PulmonaryEmbolismApp"]
