"""Public data sets: a download becomes studies, a study list and sparse annotations.

One module for each set's layout and quirks; ``proof`` shows that a mask lies on its CT, ``run`` imports.
"""
