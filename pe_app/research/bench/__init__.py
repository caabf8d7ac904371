"""How fast every step is, beside a textbook implementation and the limit of the machine, all in one run.

``textbook`` holds the plain way of every step, ``limits`` what the machine can do, ``measure`` the table.
"""
