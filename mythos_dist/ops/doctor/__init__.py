"""The checks of `mythos doctor`. They read the machine through `machine.Machine` only."""
