"""Finding pulmonary embolism on chest CT with few annotations."""

__version__ = "0.1.0"
