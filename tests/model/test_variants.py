"""The seven sizes are OpenMythos' own."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.selection import first_is_quick

from mythos_dist.config.load import load_config
from mythos_dist.config.variants import VARIANTS
from mythos_dist.model import Mythos, MythosConfig

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["1b", "3b", "10b", "50b", "100b", "500b", "1t"]


def test_there_are_seven_variants():
    assert list(VARIANTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_field_equals_the_reference(name, open_mythos):
    """Also the fields that a variant leaves at their defaults."""
    reference = getattr(open_mythos.variants, f"mythos_{name}")()
    ours = MythosConfig(**VARIANTS[name])
    assert {f.name: getattr(ours, f.name) for f in fields(reference)} == vars(reference)


@pytest.mark.parametrize("name", first_is_quick(NAMES))
def test_parameter_counts_equal_the_reference(name, build_reference):
    """On the meta device, without storage. The reference counts its tied head once, as `parameters()` does."""
    config = MythosConfig(**VARIANTS[name], mode="reference")
    with torch.device("meta"):
        ours, reference = Mythos(config), build_reference(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_config_files_equal_the_variants(name, open_mythos):
    """The file lists all values explicitly."""
    model = load_config(CONFIGS / f"{name}.yaml").model
    reference = getattr(open_mythos.variants, f"mythos_{name}")()
    assert {f.name: getattr(model, f.name) for f in fields(reference)} == vars(reference)
