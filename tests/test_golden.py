"""Our ports equal the authors' code on every reference case; see `golden_case`.

`tests/golden_ports/<slug>.py` holds `PORTS`, {case name: function(case) -> {key of the file: our
value}}, and `LEFT_OUT`, {case name: {key: why it is not ours to match}}.
"""

import importlib

import pytest

from jaxformer.config import papers
from tests.golden_case import Case, cases

CASES = [case for case in cases() if case.slug in papers()]


def ports(slug):
    return importlib.import_module(f"tests.golden_ports.{slug}")


def kind(case: Case, names):
    """The port of a case: its own name, or the longest that begins it (other draws of one kind)."""
    fitting = [name for name in names if case.name.startswith(name)]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.stem)
def test_equals_the_authors(case):
    module = ports(case.slug)
    name = kind(case, module.PORTS)
    assert name is not None, f"{case.path.name} has no port in tests/golden_ports/{case.slug}.py"
    left_out = getattr(module, "LEFT_OUT", {}).get(name, {})
    found = module.PORTS[name](case)
    for key, value in found.items():
        case.check(key, value)
    wanted = {k for k in case.arrays if k.startswith(("out/", "grad_in/", "grad_param/"))}
    unchecked = wanted - set(found) - set(left_out)
    assert not unchecked, f"not compared: {sorted(unchecked)}"


def test_every_paper_with_cases_is_checked():
    assert CASES, "no reference case found; is JAXFORMER_GOLDEN right?"
    for slug in papers():
        if any(case.slug == slug for case in cases()):
            assert ports(slug).PORTS
