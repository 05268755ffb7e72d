"""Error bars that are too wide say so, and how much more it would take."""

import math

from ptq.eval.paired import Difference, difference
from ptq.eval.report import signed
from ptq.run.summary import against_rtn


def test_a_difference_within_two_standard_errors_is_called_inconclusive():
    assert signed(Difference(0.5, 0.2, 9)) == "+0.5000 ± 0.2000 *"
    assert signed(Difference(-0.1, 0.2, 9)) == "-0.1000 ± 0.2000 inconclusive (16×)"
    assert signed(Difference(0.39, 0.2, 9)) == "+0.3900 ± 0.2000 inconclusive"
    assert signed(Difference(0.0, 0.2, 9)) == "+0.0000 ± 0.2000 inconclusive"
    assert signed(Difference(0.0, 0.0, 9)) == "+0.0000 ± 0.0000"
    assert signed(Difference(0.1, math.nan, 1)) == "+0.1000"


def test_with_the_items_needed_the_difference_would_be_told():
    """Repeating all items k times leaves the difference and divides its variance by k (up to n / (n - 1))."""
    first, other = [(float(i % 3), 1.0) for i in range(40)], [(float(i % 5) / 2, 1.0) for i in range(40)]
    found = difference(first, other, "mean")
    assert not found.conclusive and found.items_needed
    times = math.ceil(found.items_needed / found.items) + 1
    assert difference(first * times, other * times, "mean").conclusive
    fewer = int(0.9 * times)
    assert not difference(first * fewer, other * fewer, "mean").conclusive


def test_the_summary_says_when_the_windows_are_too_few():
    told = {"value": -0.1, "stderr": 0.02, "windows": 4, "windows_needed": 1}
    assert against_rtn(told) == against_rtn(None) == []
    (line,) = against_rtn(told | {"stderr": 0.1, "windows_needed": 16})
    assert "4 windows do not tell the two apart; about 16 would" in line
    assert "one window gives no error bars" in against_rtn(told | {"stderr": None, "windows_needed": None})[0]
