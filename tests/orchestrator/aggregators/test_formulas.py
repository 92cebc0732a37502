"""Formulas in one spelling."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.aggregators.extract import same, value
from orchestrator.aggregators.extract.formulas import formula

SAME = [
    (r"\frac{1}{2}", r"0.5"),
    (r"\dfrac12", r"1/2"),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt 3}{2}"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    (r"2\sqrt{2}", r"2\sqrt2"),
    (r"90^\circ", r"90"),
    (r"90^{\circ}", r"90 degrees"),
    (r"90°", r"90^\circ"),
    (r"5\text{ cm}", r"5"),
    (r"5 \, \text{cm}^2", r"5"),
    (r"\$18", r"18"),
    (r"18\%", r"18%"),
    (r"\{1,2,3\}", r"\{3, 2, 1\}"),
    (r"(1, 2)", r"(1,2)"),
    (r"\left(1,2\right)", r"(1,2)"),
    (r"[0, \infty)", r"[0,\infty)"),
    (r"\left[0,\infty\right)", r"[0, inf)"),
    (r"(-\infty, 3) \cup (5, \infty)", r"(-\infty,3)\cup(5,\infty)"),
    (r"x = 5", r"5"),
    (r"x=5", r"x = 5.0"),
    (r"x^2+1", r"x^{2} + 1"),
    (r"\pi", r"pi"),
    (r"2\pi", r"2 \cdot \pi"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"\text{Evelyn}", r"Evelyn"),
    (r"\text{(B)}", r"B"),
    (r"\mathbf{B}", r"B"),
    (r"10{,}000", r"10,000"),
    (r"1\,000", r"1000"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"\frac{3}{-4}", r"-0.75"),
    (r"\frac{a}{b}", r"a/b"),
    (r"\sqrt{2}", r"sqrt(2)"),
    (r"\sqrt[3]{2}", r"\sqrt[3]2"),
    (r"\frac{1}{\sqrt{2}}", r"1/\sqrt{2}"),
    (r"\tfrac{7}{3}", r"7/3"),
    (r"2\frac{1}{3}", r"7/3"),
    (r"x \in [1,2]", r"[1,2]"),
    (r"\pm 3", r"\pm3"),
    (r"y=2x+1", r"2x+1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\emptyset", r"\varnothing"),
    (r"\{\}", r"\emptyset"),
    (r"12\text{ apples}", r"12 apples"),
    (r"0.50", r"\frac12"),
    (r"5 \times 10^{3}", r"5000"),
    (r"\boxed{7}", r"7"),
    (r"\infty", r"infinity"),
    (r"a\le b", r"a \leq b"),
    (r"\ln 2", r"\ln(2)"),
    (r"36\pi \text{ cm}^3", r"36\pi"),
    (r"\log_2 3", r"\log_{2} 3"),
]
DIFFERENT = [
    (r"2 \sqrt{2}", r"\sqrt{8}"),
    (r"1,2,3", r"3,1,2"),
    (r"(1,2)", r"(2,1)"),
    (r"(0,1]", r"[0,1]"),
    (r"3+4i", r"4i+3"),
    (r"11_2", r"11"),
    (r"2^{10}", r"1024"),
    (r"\frac{1}{2}x", r"x/2"),
    (r"10^{-3}", r"0.001"),
    (r"1/3", r"0.333"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\sqrt{2}", r"\sqrt[3]{2}"),
    (r"x^2", r"x_2"),
    (r"(1,2)", r"(1,3)"),
    (r"\{1,2\}", r"(1,2)"),
    (r"2(3)", r"23"),
    (r"12", r"1\cdot2"),
    (r"\frac{1}{2x}", r"\frac{1}{2}x"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_means_the_same_is_spelt_the_same(one: str, other: str) -> None:
    assert value(one) == value(other)
    assert same(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_is_not_the_same_or_takes_algebra_to_see_is_kept_apart(one: str, other: str) -> None:
    assert not same(one, other)


def test_nesting_without_end_is_left_as_it_stands() -> None:
    deep = "\\sqrt{" * 25 + "2" + "}" * 25
    assert formula(deep, value) is None
    assert value(deep) is not None


BITS = st.sampled_from(
    [
        "\\frac",
        "\\sqrt",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ",",
        "^",
        "_",
        "1",
        "23",
        "x",
        "\\",
        "$",
        "-",
        " ",
        "\\text",
        "%",
    ]
)


@settings(deadline=None, max_examples=300)
@example(text="x]]]]")
@given(text=st.lists(BITS, max_size=40).map("".join) | st.text(max_size=60))
def test_whatever_is_written_has_one_spelling_which_white_space_does_not_change(text: str) -> None:
    assert value(f" {text} ") == value(text)
