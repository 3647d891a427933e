"""Expressions in adapters' settings: what Python's own matcher says, and never more than a bounded number of steps."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magmax.checkpoints.lora.bounded_regex import MAX_LENGTH, BoundedRegex, BoundedRegexError

ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", "[ab]", "[^a.]", "0", "^", "$", r"\w", "_", r"[]\]a-b]", r"\A"])
MANY = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{0,2}", "{1,}", "{,1}", "*?", "+?", "??", "{1,2}?"])
EXPRESSIONS = st.recursive(
    st.builds(str.__add__, ATOMS, MANY),
    lambda inner: (
        st.builds("{}{}".format, inner, inner)
        | st.builds("({}|{}){}".format, inner, inner, MANY)
        | st.builds("(?:{}){}".format, inner, MANY)
        | st.builds("(?P<name>{})".format, inner)
    ),
    max_leaves=6,
)
NAMES = st.text("ab.0_", max_size=8) | st.text("a.\n", max_size=4)


@given(EXPRESSIONS, NAMES)
@example("^model.layers.(1|2)[.]q_proj", "model.layers.2.q_proj")
@example(r"layers\.\d+\.self_attn\.q_proj", "model.layers.12.self_attn.q_proj")
@example("q", "m.q\n")
@example("a{}", "a{}")
@example("a{,x}", "a{,x}")
def test_an_expression_names_what_it_names_for_peft(text: str, name: str) -> None:
    try:
        expected = re.match(rf"(.*\.)?({text})$", name) is not None
    except re.error:
        with pytest.raises(BoundedRegexError):
            BoundedRegex(text)
        return
    assert BoundedRegex(text).matches_module(name) == expected


@pytest.mark.parametrize(
    "text",
    ["(a+)+$", "(a|aa)+$", "(.*.*.*.*.*.*.*.*.*.*.*)x", "((a{1,100}){1,100}){1,100}$", "(a*)*b", "a?" * 200 + "a" * 200,
     "(?:(?:(?:a?){999}){999}){999}b", "(((((((((.*)*)*)*)*)*)*)*)*)*x"],
)  # fmt: skip
def test_an_expression_that_would_run_for_years_is_answered_or_refused_within_its_steps(text: str) -> None:
    with suppress(BoundedRegexError):
        assert not BoundedRegex(text).matches_module("m." + "a" * 60 + "!")


@pytest.mark.parametrize("text", ["(?=a)a", "(?<!b)a", r"(a)\1", "(?i:a)", "a++", "(?>a)", r"\bq", "(?P=x)", "("])
def test_what_is_not_supported_is_refused(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BoundedRegexError):
            BoundedRegex(text)


@pytest.mark.parametrize("text", ["a" * (MAX_LENGTH + 1), "(" * 900 + ")" * 900, "a{99999999999999999999}"])
def test_an_expression_beyond_all_measure_is_refused(text: str) -> None:
    with pytest.raises(BoundedRegexError):
        BoundedRegex(text).matches_module("a")


def test_a_name_beyond_all_measure_is_refused() -> None:
    with pytest.raises(BoundedRegexError, match="longer than"):
        BoundedRegex("a").matches_module("a" * (MAX_LENGTH + 1))
