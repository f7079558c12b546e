"""Means over seeds and differences in pairs, with their intervals."""

import math
import statistics

import pytest

from fasternet.report.seeds import STUDENT_T, Mean, find_difference, find_mean, judge_difference


def test_interval_is_students_t_over_the_seeds() -> None:
    values = [1.0, 2.0, 4.0]
    mean = find_mean(values)
    assert mean is not None
    assert mean.margin == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3))
    assert find_mean([5.0]) == Mean(5.0, None, 1)
    assert find_mean([]) is None
    assert len(STUDENT_T) == 30
    assert tuple(sorted(STUDENT_T, reverse=True)) == STUDENT_T


def test_difference_is_paired_by_seed() -> None:
    difference = find_difference({0: 1.0, 1: 11.0, 2: 21.1, 7: 99.0}, {0: 2.0, 1: 12.0, 2: 22.0})
    assert difference is not None
    assert difference.num_seeds == 3
    assert difference.value == pytest.approx(-2.9 / 3)
    assert judge_difference(difference, below="less", above="more") == "less"  # unpaired, far from it
    assert judge_difference(Mean(-1.0, 1.5, 3), below="less", above="more") == "not distinguishable"
    assert judge_difference(Mean(-1.0, None, 1), below="less", above="more") == "one seed"
