"""Our values for the golden cases of `rasp_length`, of NumPy's arrays and of JAX's alike."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from jaxformer.papers.rasp_length import core, library, programs

PREDICATES = ("equals", "leq", "lt", "geq", "gt")


def both(function):
    """The port on NumPy's arrays, once on JAX's the values are the same."""

    def port(case):
        arrays = case.part("in")
        found = function(case, arrays)
        traced = function(case, {name: jnp.asarray(x) for name, x in arrays.items()})
        assert found.keys() == traced.keys()
        for name, value in found.items():
            assert isinstance(value, np.ndarray)
            np.testing.assert_array_equal(value, traced[name], err_msg=name)
        return found

    return port


@both
def core_cases(case, given):
    k, q, v = (given[name] for name in "kqv")
    default = case.config["default"]
    found = {
        "full": core.full(k, case.config["full_const"]),
        "indices": core.indices(k),
        "tok_map_square_minus_1": core.tok_map(v, lambda a: a * a - 1),
        "tok_map_half": core.tok_map(v, lambda a: a / 2),
        "seq_map_times_plus": core.seq_map(k, q, lambda a, b: a * b + a),
    }
    for name in PREDICATES:
        pred = getattr(library, name)
        A = core.select(k, q, pred)
        found[f"select_{name}"] = A
        found[f"select_{name}_noncausal"] = core.select(k, q, pred, causal=False)
        found[f"sel_width_{name}"] = core.sel_width(A)
        found[f"kqv_{name}"] = core.kqv(k, q, v, pred)
        for reduction in ("mean", "max", "min"):
            found[f"aggr_{name}_{reduction}"] = core.aggr(A, v, default, reduction)
    return named(found, main="aggr_leq_mean")


def library_constants(notes):
    """The defaults that the file's notes give to each function."""
    patterns = {
        "shift": r"shift_right default (-?\d+)",
        "mask": r"mask value (-?\d+)",
        "occurrence": r"firsts/lasts default (-?\d+)",
        "index": r"index_select default (-?\d+)",
        "induct": r"induct\* default (-?\d+)",
        "null": r"null (-?\d+)",
        "prev": r"induct_prev offset (-?\d+)",
    }
    return {name: int(re.search(pattern, notes)[1]) for name, pattern in patterns.items()}


@both
def library_cases(case, given):
    x, y, q, b, index, z = (given[n] for n in ("x", "y", "queries", "bools", "idx", "z"))
    c = library_constants(case.config["notes"])
    induct, null = c["induct"], c["null"]
    found = {
        "shift_right": library.shift_right(x, case.config["shift"], c["shift"]),
        "cumsum": library.cumsum(b),
        "where": library.where(b, x, y),
        "mask": library.mask(x, b, c["mask"]),
        "maximum": library.maximum(x),
        "minimum": library.minimum(x),
        "num_prev": library.num_prev(x, q),
        "has_seen": library.has_seen(x, q),
        "firsts": library.firsts(x, q, c["occurrence"]),
        "lasts": library.lasts(x, q, c["occurrence"]),
        "index_select": library.index_select(x, index, c["index"]),
        "first_true": library.first_true(b),
        "binary_mode": library.binary_mode(b),
        "induct": library.induct(x, q, 1, induct, null),
        "induct_2": library.induct(x, q, 2, induct, null),
        "induct_kqv": library.induct_kqv(x, q, y, 1, induct, null),
        "induct_prev": library.induct_prev(x, q, c["prev"], induct, null),
        "firsts_zeros": library.firsts(z, q),
    }
    return named(found, main="induct")


@both
def addition(case, given):
    def next_tokens(x):
        return programs.addition(x, reverse=case.config["reverse"])

    found = {name.replace("seq", "next_tok"): next_tokens(x) for name, x in sequences(given)}
    found["random"] = next_tokens(given["random"])
    return named(found, main=max(n for n in found if n.startswith("next_tok")))


@both
def count(case, given):
    found = {}
    for name, x in sequences(given):
        found[name.replace("seq", "count")] = programs.count(x, -2, missing=0)
        found[name.replace("seq", "count_lib")] = programs.count(x, -2)
    return named(found, main="count_0")


def sequences(given):
    return [(name, x) for name, x in given.items() if name.startswith("seq_")]


def named(found, main):
    return {**{f"out/{name}": value for name, value in found.items()}, "out/main": found[main]}


PORTS = {"core": core_cases, "lib": library_cases, "addition": addition, "count": count}
