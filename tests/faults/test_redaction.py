"""Credentials in what others print: libraries at their most talkative, and messages of their errors."""

import logging
import os

import pytest

from segue.jobs.commands.ending import say
from segue.pipeline.problems import redact
from segue.pipeline.storage.bucket import ObjectStore
from segue.pipeline.storage.remote import TALKATIVE, open_remote


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cannot read https://user:hunter2@host/a b", "cannot read https://***@host/a b"),
        ("GET /x?a=1&X-Amz-Signature=hunter2&b=2 failed", "GET /x?a=1&X-Amz-Signature=***&b=2 failed"),
        ("x?X-Amz-Security-Token=hunter2", "x?X-Amz-Security-Token=***"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=hunter2, Signature=3", "Authorization: ***"),
        ("{'X-Amz-Security-Token': 'hunter2'}", "{'X-Amz-Security-Token': ***"),
        ("sent bearer hunter2 to it", "sent *** to it"),
        ("the key AKIAIOSFODNN7EXAMPLE is not allowed", "the key *** is not allowed"),
        ("s3://bucket/authorization/a.parquet?x=1", "s3://bucket/authorization/a.parquet?x=1"),
        ("row 3 of AKIA.parquet", "row 3 of AKIA.parquet"),
    ],
)
def test_redact_blanks_credentials_and_nothing_else(text, wanted):
    assert redact(text) == wanted


def test_commands_print_no_credentials_that_errors_have_in_them(capsys):
    say("cannot read https://user:hunter2@host/a")
    assert capsys.readouterr().err == "cannot read https://***@host/a\n"


@pytest.fixture
def everything_logged(caplog):
    """As by a program that sets all loggers to DEBUG; afterwards they are as they were."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.level for logger in loggers]
    caplog.set_level(logging.DEBUG)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield caplog
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def test_libraries_log_no_credentials_however_talkative_they_are_told_to_be(bucket, everything_logged):
    logging.getLogger("another").debug("is heard")
    fs, name = open_remote("s3://data/in")
    assert len(fs.ls(name)) == 2
    store = ObjectStore("s3://data/out")
    assert store.create("a", b"PRIVATE0ROW")
    assert store.read("a") == b"PRIVATE0ROW"
    text = everything_logged.text
    assert "is heard" in text
    for secret in (
        os.environ["AWS_ACCESS_KEY_ID"],
        os.environ["AWS_SECRET_ACCESS_KEY"],
        "Authorization",
        "PRIVATE0ROW",
    ):
        assert secret not in text
