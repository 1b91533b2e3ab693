"""`python -m mythos_dist.doctor`: is this machine ready for training, and what would a config use on it?

`facts.Machine` reads this machine; a check is a function of a Machine (and a config) that yields findings. Checks read
the machine through it only, so tests pass them machines that do not exist.
"""
