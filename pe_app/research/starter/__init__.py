"""The recipe of the model that ships: ``python -m pe_app.research.starter`` (``__main__.py``).

Backgrounds to paint into (``backgrounds``), twins with and without emboli (``twins``), what a clot looks like cell by
cell (``cells``), both stages of the method, and what held-out studies say in the end (``figures``).
"""
