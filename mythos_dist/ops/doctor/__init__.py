"""Is this machine ready, and what would a config use on it? `python -m mythos_dist.doctor`.

A file per subject. In each, `find` gathers facts of this machine into a frozen dataclass, and `lines` says what they
mean; it reads nothing but its arguments, so tests judge machines that are not there.
"""
