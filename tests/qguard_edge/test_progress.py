"""The remaining time: from what was expected at first, from the machine's own speed later."""

import pytest

from qguard_edge.progress import Remaining


class Time:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_machine_s_own_speed_corrects_what_was_expected() -> None:
    clock = Time()
    left = Remaining([("See", 60.0), ("Quantiz", 10.0), ("Choos", 30.0)], clock)
    assert left.seconds() == pytest.approx(100.0)
    left.stage("Preparing", 0)
    clock.now = 5.0
    assert left.seconds() == pytest.approx(100.0), "what was not expected tells nothing"
    left.stage("Seeing activations", 1000)
    clock.now += 30.0
    left.advance(250)  # a quarter in 30 s where 15 s were expected: twice as slow
    assert left.seconds() == pytest.approx(90.0 + 2 * 40.0, rel=0.12)
    clock.now += 90.0
    left.advance(750)
    assert left.seconds() == pytest.approx(80.0, rel=0.1)
    left.stage("Quantizing", 10)
    clock.now += 20.0
    left.advance(10)
    left.stage("Choosing", 100)
    clock.now += 12.0
    left.advance(50)
    assert left.seconds() == pytest.approx(12.0)
    left.advance(50)
    assert left.seconds() == 0.0


def test_stages_that_are_left_out_are_not_waited_for() -> None:
    clock = Time()
    left = Remaining([("See", 60.0), ("Choos", 30.0)], clock)
    left.stage("Choosing", 10)  # what was seen before a stop is there already
    assert left.seconds() == pytest.approx(30.0)
