"""Fixtures of the tests of text and shards."""

from helpers.data_fixtures import *  # noqa: F403 — pytest finds fixtures here
