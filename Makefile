# make demo: install, two phantom studies, a real server, both detections in demo/
# make test: install, then every test
# make campaign: the server killed, starved, crowded and sent malformed requests for ten minutes, and a table of what was lost
# make docs: install, then the documentation as a site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test loop campaign install lint docs clean

install: $(VENV)/.installed

# The versions that the tests passed with; without them pip searches for minutes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/pe-app demo --out demo

test: install lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# e.g. make campaign CAMPAIGN="--minutes 2 --seed 5 --part disk"
campaign: install
	PYTHONPATH=tests $(BIN)/python -m campaign $(CAMPAIGN)

# The loop on the program's own phantoms through the real server: two trainings, minutes.
loop: install
	$(BIN)/python -m pytest -s -m slow tests/test_loop_phantoms.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/
docs: install
	$(BIN)/python -m mkdocs build --quiet --site-dir site

clean:
	rm -rf $(VENV) demo runs build site *.egg-info
