"""Shared by all tests: limits of the processes, Hypothesis's profiles, plugins. Fixtures: `helpers/fixtures.py`.

Decisions: PROJECT-1.
"""

import os
import resource
import signal

from hypothesis import settings as hypothesis_settings

pytest_plugins = ["helpers.schedule", "helpers.report", "helpers.cpu_seconds", "helpers.heap"]


def pytest_configure(config):
    """Fixtures import torch, which takes two CPU seconds; the process that only gives tests to workers has none."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("helpers.fixtures")


# No deadline: the machine may be busy. CI uses the same examples in every run, local runs draw new ones.
hypothesis_settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
# `make check` selects this profile with --hypothesis-profile.
hypothesis_settings.register_profile("quick", hypothesis_settings.get_profile("patient"), max_examples=25)
hypothesis_settings.load_profile("patient")

# Streaming opens a dozen files per dataset, times the number of datasets opened before in the process.
_, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard if _hard != resource.RLIM_INFINITY else 65536, _hard))

# Background jobs of a shell ignore SIGINT, and jobs under nohup ignore SIGHUP. Programs that the tests start would
# inherit that, and a shell script cannot undo it.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Programs that the tests start have one thread per core. On a machine that also runs other tests such a thread waits
# for long, and waiting must not use the CPU: six steps of configs/tiny_cpu.yaml took 96 CPU seconds on two busy cores,
# and 14 with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
