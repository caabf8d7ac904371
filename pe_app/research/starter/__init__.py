"""The recipe of the model that ships: ``pe-app recipe starter`` (``pe_app.cli.starter``).

What windows are cut from (``ingredients``), windows with clots and their twins (``windows``), cell by cell what a clot
looks like (``lesson``), whole studies (``whole_studies``), what is made of them (``figures``), and the file
(``publish``).
"""
