from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

SCRIPT = "import logging, afd.log; afd.log.setup('router'{}); logging.getLogger('a.b').warning('it is %d', 5)"


@pytest.mark.parametrize(("form", "variable"), [("", "json"), (", 'json'", "text")])
def test_lines_are_json_where_the_environment_or_the_caller_says_so(form: str, variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(form)],
        env={"AFD_LOG_FORMAT": variable},
        capture_output=True,
        text=True,
        check=True,
    )
    entry = json.loads(done.stderr)
    assert (entry["level"], entry["who"], entry["logger"]) == ("warning", "router", "a.b")
    assert entry["message"] == "it is 5"
    assert entry["time"].endswith("+00:00")


def test_lines_are_text_otherwise() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format("")], env={}, capture_output=True, text=True, check=True)
    assert done.stderr.rstrip().endswith("router       W it is 5")


def test_what_was_raised_and_the_fields_are_in_the_object() -> None:
    from afd.log import JsonFormatter

    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed\nhere", (), sys.exc_info())
    record.fields = {"status": 500}
    text = JsonFormatter("router").format(record)
    assert "\n" not in text
    entry = json.loads(text)
    assert entry["status"] == 500
    assert "ValueError: broken" in entry["error"]
