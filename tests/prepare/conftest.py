"""What the tests of text and shards share."""

from helpers.data_fixtures import *  # noqa: F403 — pytest finds fixtures here
