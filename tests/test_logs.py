"""Logs for machines: whole lines of JSON, only while somebody listens, and never on a person's terminal."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from polyray import logs
from polyray.cluster.interrupt import Stop
from polyray.errors import ConfigError


def test_every_event_is_one_json_object_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.event("before", unit="a")
    for unit in ("with\nbreak", "ü"):
        with logs.to_machines(str(path)):
            logs.event("unit_done", run_id="r", stage="mine", unit=unit, seconds=1.5, host=None)
    logs.event("after")
    told = [json.loads(line) for line in path.read_text().splitlines()]  # the second is added to the first
    assert [line["unit"] for line in told] == ["with\nbreak", "ü"]
    for line in told:
        assert line.keys() == {"time", "level", "logger", "event", "run_id", "stage", "unit", "seconds"}
        assert (line["event"], line["level"], line["seconds"]) == ("unit_done", "INFO", 1.5)
        assert line["time"].endswith("Z")


def test_warnings_and_errors_go_there_too_and_events_never_to_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("polyray.somewhere")
    with logs.to_machines("-"):
        logs.event("unit_done", unit="a")
        logger.warning("odd: %s", 3)
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("worse")
    logs.event("unit_done", unit="b")
    event, odd, worse = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert event["unit"] == "a"
    assert (odd["level"], odd["message"]) == ("WARNING", "odd: 3")
    assert "ValueError: bad" in worse["error"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log-json"), logs.to_machines(str(tmp_path / "no" / "log")):
        pytest.fail("there is no such folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_who_is_patient_and_the_second_for_nobody(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = Stop()
    with stop.listening(), stop.patience():
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    stop = Stop()
    with stop.listening(), pytest.raises(KeyboardInterrupt, match=number.name):
        os.kill(os.getpid(), number)
