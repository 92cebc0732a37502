import gzip
import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.aggregate.speed import HOSTILE
from experts.errors import ConfigError
from experts.types import Message, Request
from orchestrator.aggregators.extract import (
    KINDS,
    Asked,
    auto,
    boxed,
    canonical_json,
    json_field,
    letter,
    make_extract,
    number,
    plain,
    read_options,
    read_request,
    read_stem,
    same,
    settle_percents,
    stated,
    value,
)

CITIES = ("Rome", "Paris", "Lyon", "Paris and Lyon")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) Paris", "B"),
        ("**B**", "B"),
        ("B: because it is", "B"),
        ("The answer is (B).", "B"),
        ("The answer is (b).", "B"),
        ("**Answer:** B", "B"),
        ('{"answer": "B"}', "B"),
        ("the correct answer is option B because A is in Italy", "B"),
        ("A is wrong.\nThe answer is (B).", "B"),
        ("The answer is (A). No, wait.\nThe answer is (B).", "B"),
        ("Final answer: $\\boxed{\\text{B}}$", "B"),
        ("It might be A, but \\boxed{B}", "B"),
        ("A is in Italy, so (B) is correct.", "B"),
        ("I would go with B", "B"),
        ("Let me think. A dog is no city.\n\nSo: B", "B"),
        ("The answer is B, I think.", "B"),
        ("Rome", "A"),
        ("It is Lyon.", "C"),
        ("Both: Paris and Lyon.", "D"),
        ("The answer is Lyon", "C"),
        ("The answer is A because Rome is old", "A"),
        ("Z", None),
        ("The answer is (Z).", None),
        ("Rome or Lyon", None),
        ("I think so", None),
        ("A good question", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_letters(text, expected):
    assert letter(text, CITIES) == expected


def test_letters_of_options_that_are_not_known_reach_from_a_to_j():
    assert letter("The answer is (J).") == "J"
    assert letter("The answer is (K).") is None
    assert letter("The answer is (C).", ("one", "two")) is None


def test_a_capital_in_a_long_derivation_is_a_symbol():
    assert (
        letter("We set P = 5 and then C follows from the energy balance, which gives us that the value of " * 3) is None
    )


@pytest.mark.parametrize(
    "question",
    [
        "Which is the capital?\nA. Rome\nB. Paris\nC. Lyon",
        "Which is the capital?\n(A) Rome\n(B) Paris\n(C) Lyon\nAnswer with the letter.",
        "Which? (A) Rome (B) Paris (C) Lyon",
        "Which?\nA) Rome\nB) Paris\nC) Lyon\n",
        "Example: A. x B. y C. z D. w\nNow you:\nA: Rome\nB: Paris\nC: Lyon",
    ],
)
def test_options_are_read_from_the_question(question):
    assert read_options(question) == ("Rome", "Paris", "Lyon")


@pytest.mark.parametrize("question", ["", "What is A. Einstein known for?", "B. comes before C. in the alphabet"])
def test_a_question_without_options_has_none(question):
    assert read_options(question) == ()
    assert read_stem(question) == question


@pytest.mark.parametrize("listed", ["A. Rome\nB. Paris", "(A) Rome (B) Paris", "A) Rome\nB) Paris\n"])
def test_a_question_ends_where_its_options_begin(listed):
    assert read_stem(f"Which is larger?\n{listed}") == "Which is larger?"
    long = "Which? " * 5000 + "?"
    assert read_stem(f"{long}\n{listed}") == long


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000", "1000"),
        ("1000.0", "1000"),
        ("1e3", "1000"),
        ("1.2 × 10^3", "1200"),
        ("$1.2 \\times 10^{-3}$", "0.0012"),
        ("3.5 million", "3500000"),
        ("It costs $1,234.50 in all.", "1234.5"),
        ("The profit is 5 km.", "5"),
        ("-7", "-7"),
        ("\u22127 degrees", "-7"),
        ("10-7", "7"),
        ("on 2024-01-05", "5"),
        ("- 5 apples", "5"),
        ("1/2", "0.5"),
        ("2/6", "1/3"),
        ("2 3/4 cups", "2.75"),
        ("$2\\frac{3}{4}$", "2.75"),
        ("-\\frac{1}{2}", "-0.5"),
        ("50%", "50%"),
        ("50 percent", "50%"),
        ("\\boxed{12\\%}", "12%"),
        ("007", "7"),
        ("-0.0", "0"),
        ("**42**", "42"),
        ("So 6 * 7 = 42. The answer is 42, not 43.", "42"),
        ("The answer is 6 * 7 = 42 apples of 50.", "42"),
        ("He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        ("\\boxed{8} is what we get in step 9", "8"),
        ("1/0", "0"),
        ("H2O", None),
        ("none", None),
        ("", None),
        ("9" * 5000, "9" * 5000),
        ("1e9999", "1e9999"),
    ],
)
def test_numbers(text, expected):
    assert number(text) == expected


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_a_number_written_in_any_way_is_one_number(value_):
    text = number(f"The answer is {value_.numerator}/{value_.denominator}.")
    assert text is not None
    assert Fraction(text) == value_
    assert number(text) == text


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15))
def test_separators_zeros_and_exponents_do_not_count(n):
    ways = (f"{n:,}", f"{n}.00", f"{n}e0", f"${n}$", f"about {n} apples", f"{n * 10}e-1")
    assert {number(way) for way in ways} == {str(n)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\dfrac{x+1}{2}}", r"(x+1)/2"),
        (r"\boxed{\sqrt{2} + 1}", "sqrt2+1"),
        (r"\boxed{ (1, 2) }", "(1,2)"),
        (r"\boxed{\text{Paris}}", "paris"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{12 \text{ apples}}", "12"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{1} then \boxed{2 is cut o", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", "{1,2}"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_boxes(text, expected):
    assert boxed(text) == expected


@settings(deadline=None)
@given(st.recursive(st.sampled_from("abc12+"), lambda inner: st.builds("{{{}}}{}".format, inner, inner)))
def test_a_box_ends_at_its_own_brace(inside):
    assert boxed(f"text {{}} \\boxed{{{inside}}} }} more {{text") == value(inside)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ('{"answer": "B"}', "answer", "B"),
        ('Here: {"answer": 1000.0}. Done.', "answer", "1000"),
        ('```json\n{"result": {"letters": ["x", "c"]}}\n```', "result.letters.1", "C"),
        ('{"draft": 1} and then {"answer": 2}', "answer", "2"),
        ('{"answer": "The  Eiffel Tower."}', "answer", "the eiffel tower"),
        ('{"answer": {"b": 1, "a": [2]}}', "answer", '{"a":[2],"b":1}'),
        ('{"answer": true}', "answer", "true"),
        ('{"b": 1, "a": 2}', None, '{"a":2,"b":1}'),
        ("[1, 2]", None, "[1,2]"),
        ("[1, 2]", "1", "2"),
        ("[1, 2]", "2", None),
        ("[1, 2]", "x", None),
        ('{"answer": null}', "answer", None),
        ('{"answer": "B"}', "letter", None),
        ('{"answer": "B"}', "answer.deeper", None),
        ('{"answer": "B"', "answer", None),
        ("", "answer", None),
        ("[" * 100_000, None, None),
        ("[" * 900 + "]" * 900, None, None),
    ],
)
def test_json_fields(text, path, expected):
    found = json_field(text, path)
    if text.startswith("[" * 900 + "]"):
        assert found in (None, text)  # as deep as the interpreter lets it
    else:
        assert found == expected


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()))
def test_json_does_not_depend_on_the_order_of_keys(data):
    assert canonical_json(dict(reversed(data.items()))) == canonical_json(data)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Paris", " **paris**. "),
        ("the Eiffel\n Tower", "The “Eiffel Tower”!"),
        ("STRASSE", "straße"),
        ("x", "X."),
    ],
)
def test_plain_text_ignores_case_space_and_outer_punctuation(a, b):
    assert plain(a) == plain(b)


def test_plain_text_keeps_what_differs():
    assert len({plain(t) for t in ("x^2-1", "x^2+1", "-5", "5", "a b", "ab", "c++", "c#")}) == 8
    assert plain("  ") is None
    assert plain("👍") == "👍"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,000", "1e3"),
        ("50%", "0.5"),
        ("0.5", "50%"),
        ("50%", "50"),
        ("1/2", "50 percent"),
        ("(B)", "B"),
        ("b", "B."),
        ("Paris", "paris"),
        (r"\frac{1}{2}", "0.5"),
        (r"$x^2 + 1$", "x^2+1"),
        ("12 apples", "12"),
    ],
)
def test_same(a, b):
    assert same(a, b)
    assert same(b, a)


@pytest.mark.parametrize(
    ("a", "b"), [("50%", "5"), ("0.5", "50"), ("A", "B"), ("1/3", "0.33"), ("2 pi", "2"), ("", "x")]
)
def test_not_same(a, b):
    assert not same(a, b)
    assert not same(b, a)


def test_a_percentage_is_read_as_the_others_write_it():
    assert settle_percents(["50%", "50", "7"]) == ["50", "50", "7"]
    assert settle_percents(["50%", "0.5"]) == ["0.5", "0.5"]
    assert settle_percents(["50%", "0.5", "50"]) == ["50", "0.5", "50"]
    assert settle_percents(["50%", "a growth of 50%"]) == ["50%", "a growth of 50%"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is Paris. It has a tower.", "Paris"),
        ("Answer: 3.5 km.", "3.5 km"),
        ("**Final Answer:** 42", "42"),
        ("the answer to this riddle is time", "time"),
        ("The answer is 1. Wait. The answer is 2.", "2"),
        ("The final answer is:\n\n42", "42"),
        ("#### 5", "5"),
        ("Answer:", None),
        ("nothing here", None),
    ],
)
def test_stated(text, expected):
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        ("Which?\nA. Rome\nB. Paris", "Paris it is", "B"),
        ("Which?\nA. Rome\nB. Paris", "I cannot say.", None),
        ("How many apples are left?", "Of 5 apples he eats 2, so 3 apples are left.", "3"),
        ("How many apples are left?", "I do not know.", None),
        ("What is 6*7?", "42", "42"),
        ("Simplify it.", r"It is $\boxed{x^2}$", "x^2"),
        ("What is the capital of France?", "Paris.", "paris"),
        ("What is the capital of France?", "It lies on the Seine.\nThe answer is Paris.", "paris"),
        ("Which year?", "The answer is 1,969.", "1969"),
        ("Write a poem.", "One line.\nAnd 2 more.", "one line and 2 more"),
        ("Anything", "", None),
    ],
)
def test_auto_reads_what_the_question_asks_for(question, text, expected):
    asked = read_request(Request(messages=(Message(role="user", content=question),)))
    assert auto(text, asked) == expected


def test_auto_reads_json_where_json_was_asked_for():
    asked = read_request(Request(prompt="How many?", response_format={"type": "json_object"}))
    assert asked.json
    assert auto('{"why": "so", "answer": 4.0}', asked) == "4"
    assert auto('{"b": 1, "a": 2}', asked) == '{"a":2,"b":1}'
    assert auto("four", asked) is None


def test_kinds_are_chosen_by_name():
    asked = Asked(options=CITIES)
    assert make_extract("letter")("Rome", asked) == "A"
    assert make_extract("number")("so 12.", asked) == "12"
    assert make_extract("boxed")("\\boxed{7}", asked) == "7"
    assert make_extract("text")("Rome!", asked) == "rome"
    assert make_extract("json")('{"a": 1}', asked) == '{"a":1}'
    assert make_extract("json", "a")('{"a": 1}', asked) == "1"
    with pytest.raises(ConfigError, match="no kind 'letters'; known: auto, letter"):
        make_extract("letters")
    with pytest.raises(ConfigError, match="'field' belongs to the kind 'json'"):
        make_extract("text", "a")


NASTY = [
    *(
        "1",
        "1,",
        "1 ",
        "1,111",
        "1/",
        "1 1/",
        "1e",
        "1.1.",
        "- ",
        "\\frac",
        "\\frac{1",
        "\\boxed{",
        "{",
        "}",
        "[",
        "[1,",
    ),
    *(
        '{"a":',
        '{"a":1},',
        "```",
        "answer is ",
        "answer to a ",
        "Answer ( ",
        "answer      ",
        "option the correct ",
        "A ",
    ),
    *("A. ", "(A) ", "I ", "B) ", "####", "***", "\n", " ", "é", "😀", "x=", "$", "50%", "\u2009", "\ud800", "\0"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_of_anything_is_read_at_once(kind):
    """Quadratic work on a megabyte would take minutes; the bound is a hundred times what is needed."""
    extract = KINDS[kind]
    asked = [Asked(), Asked(options=CITIES), Asked(number=True), Asked(json=True)] if kind == "auto" else [Asked()]
    for piece in NASTY:
        text = piece * (10**6 // len(piece))
        started = time.process_time()
        for what in asked:
            extract(text, what)
            extract(f"The answer is (B).\n{text}", what)
        read_request(Request(prompt=text))
        assert time.process_time() - started < 5, repr(piece)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("text", sorted(HOSTILE))
def test_four_times_the_text_takes_about_four_times_as_long_at_most(kind, text):
    """A quadratic expression takes 16 times as long. Measured in the process's own time, the best of three."""
    extract, sizes = KINDS[kind], (2**18, 2**20)
    texts = [HOSTILE[text](size) for size in sizes]

    def took(text):
        started = time.process_time()
        extract(text, Asked(options=CITIES))
        return time.process_time() - started

    small, large = (min(took(text) for _ in range(3)) for text in texts)
    assert large < 8 * small + 0.005


@settings(deadline=None)
@given(text=st.text(max_size=300), kind=st.sampled_from(sorted(KINDS)))
def test_any_text_gives_an_answer_or_none(text, kind):
    for asked in (Asked(), Asked(options=CITIES), Asked(number=True), Asked(json=True)):
        found = KINDS[kind](text, asked)
        assert found is None or found


_PIECES = st.sampled_from(
    [
        "1",
        ",",
        "2 3/4",
        "-",
        "\\frac{1}{2}",
        "^",
        "%",
        " million",
        "e5",
        ".",
        "answer is ",
        "(B)",
        "\\boxed{",
        "}",
        "$",
        "#### ",
    ]
)


@settings(deadline=None)
@given(st.lists(_PIECES, max_size=20).map("".join))
def test_scraps_of_mathematics_do_not_break_it(text):
    for extract in KINDS.values():
        extract(text, Asked(number=True))
    assert same(text, text)
    assert same(f" {text} ", text)


POOLS = os.environ.get("COLLEGIUM_POOLS")


@pytest.mark.skipif(not POOLS, reason="COLLEGIUM_POOLS names no folder of recorded pools")
@pytest.mark.parametrize("expert_id", ["gpt-3-175b-verification", "gpt-3-6b-finetuning"])
def test_numbers_agree_with_the_scores_of_a_recorded_pool(expert_id):
    pool = Path(POOLS or "") / "gsm8k-gpt3"
    with gzip.open(pool / "questions.jsonl.gz") as file:
        gold = {row["id"]: row["answer"] for row in map(json.loads, file)}
    with gzip.open(pool / "responses" / f"{expert_id}.jsonl.gz") as file:
        rows = list(map(json.loads, file))
    assert [same(number(r["text"]) or "", gold[r["id"]]) for r in rows] == [r["score"] == 1 for r in rows]
