"""The settings of a run as frozen dataclasses, read from YAML and checked."""
