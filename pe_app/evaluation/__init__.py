"""How good a model is on studies that it has not seen."""
