# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .durations import Durations

pytest_plugins = ['pytester']

# Times in seconds, with limits of 0.1 and 0.4 below.
TESTS = """
import time
import pytest

@pytest.fixture(scope='module')
def made():
    time.sleep(0.15)

def test_short(): pass
def test_long_to_set_up(made): pass
def test_with_what_was_made(made): pass
def test_too_long(): time.sleep(0.5)
@pytest.mark.slow
def test_slow(): time.sleep(0.5)
"""


def test_long_tests_are_named_and_too_long_ones_fail(pytester):
    pytester.makepyfile(test_times=TESTS)
    pytester.makeini('[pytest]\nmarkers = slow')
    result = pytester.inline_run(plugins=[Durations(long=0.1, too_long=0.4)])
    reports = result.getreports('pytest_runtest_logreport')
    failed = [report.nodeid for report in reports if report.failed]
    assert failed == ['test_times.py::test_too_long']
    named = [call.nodeid for call in result.getcalls('pytest_warning_recorded')]
    assert named == ['test_times.py::test_long_to_set_up']
