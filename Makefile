# make demo         train, evaluate and draw on the built-in data, into OUTPUT
# make evidence     the long comparison on the built-in data, hours, into output/evidence; resumes
# make trees        the same models on aerial photographs, which are fetched, into output/trees; resumes
# make animals      the paper's ablations on silhouettes of animals, which are fetched, into
#                   output/ablations_animals; resumes
# make test         all tests; `make test-fast` leaves out the slow ones
# make lint         style and formatting
# make docs         the documentation, into output/docs; warnings are errors
# make install      the environment alone, in .venv; the others do it too
#
# OUTPUT=folder                       where the demo writes
# OPTS="KEY VALUE ..."                config overrides of the demo, as a SAN as its backbone:
#                                     MODEL.BACKBONE.NAME build_retinanet_san_fpn_backbone
# DETECTRON2=main | 0.6 | existing    which detectron2, else the best that can be had
# PYTHON=command                      a Python 3.10 to 3.12

OUTPUT ?= output/demo
PYTHON ?= $(firstword $(foreach python,python3.12 python3.11 python3.10 python3,\
    $(if $(call usable,$(python)),$(python))))

# A name on the path may be a shim of nothing, and Debian splits venv off: run it to know.
usable = $(if $(1),$(shell $(1) -c 'import ensurepip, sys, venv; \
    print("yes" if (3, 10) <= sys.version_info < (3, 13) else "")' 2>/dev/null))

VENV_PYTHON := .venv/bin/python
# One process for each core. The tests of a file run in one process and share its fixtures. Files
# stay in their order: those of most tests would come first, and long ones of few tests at the end.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed

.PHONY: animals demo docs evidence trees test test-fast lint install

demo: install
	$(VENV_PYTHON) tools/digits_demo.py --output "$(OUTPUT)" $(OPTS)

evidence: install
	$(VENV_PYTHON) tools/evidence.py

trees: install
	$(VENV_PYTHON) tools/trees.py

animals: install
	$(VENV_PYTHON) tools/fetch_data.py animals
	$(VENV_PYTHON) tools/ablate.py --config-file Animals/classifier_SASA_conv_stem.yaml \
	    --output output/ablations_animals

test: install
	$(VENV_PYTHON) -m pytest -q $(PARALLEL)

test-fast: install
	$(VENV_PYTHON) -m pytest -q $(PARALLEL) -m "not slow"

lint: install
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

docs: install
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(VENV_PYTHON) -m sphinx --quiet --fail-on-warning --keep-going docs output/docs
	@echo "The documentation is in output/docs/index.html."

install: $(INSTALLED)
	@$(VENV_PYTHON) tools/install_detectron2.py

$(INSTALLED): requirements.txt setup.py pyproject.toml $(wildcard sasa_det/csrc/*)
	@rm -f $@
	@if ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
	    python="$(PYTHON)"; \
	    test -n "$$python" && test -n "$(call usable,$(PYTHON))" || { \
	        echo "No Python 3.10 to 3.12 with the venv module was found$${python:+ in $$python};" \
	            "install one or name it: make PYTHON=..." >&2; exit 1; }; \
	    echo "Making .venv with $$($$python --version) ..."; \
	    "$$python" -m venv --clear .venv; \
	fi
	@# pip writes RECORD last: a package without it was interrupted, and pip would think it whole.
	@for package in .venv/lib/python*/site-packages/*.dist-info; do \
	    test -f "$$package/RECORD" || rm -rf "$$package"; \
	done
	@echo "Installing torch and the rest (about 5 GB where nothing is there, several minutes) ..."
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "Installing sasa_det from this folder, with its C++ kernels ..."
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --editable .
	@touch $@
