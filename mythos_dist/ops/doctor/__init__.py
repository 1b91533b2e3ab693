"""The checks of `python -m mythos_dist.doctor`. They read the machine through `machine.Machine` only."""
