# make demo: install, two phantom studies, a real server, both detections in demo/
# make test: install, then every test
# make campaign: the server killed, starved, crowded and lied to for ten minutes, and a table of what was lost
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test loop campaign install lint starter-model clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
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

# The recipe of the model that ships. Enhanced CTs to paint emboli into (CT or CT,ARTERIES each), folders of enhanced
# single slices likewise, and CTs that are painted into and only looked at in the end:
#   make starter-model BACKGROUNDS="CT ..." SLICES="FOLDER ..." HELD_OUT="CT,ARTERIES ..."
starter-model: install
	$(BIN)/python -m pe_app.research.starter --work runs/starter --out pe_app/weights/starter.safetensors \
		$(foreach b,$(BACKGROUNDS),--background $(b)) $(foreach s,$(SLICES),--slices $(s)) \
		$(foreach h,$(HELD_OUT),--held-out $(h))

clean:
	rm -rf $(VENV) demo runs build *.egg-info
