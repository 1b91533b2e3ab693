import pytest

from mythos_dist.units import short


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0234, "0.0234"),
        (850.4, "850"),
        (999.6, "1k"),  # not 1e+03
        (1024, "1.02k"),
        (53_100, "53.1k"),
        (999_600, "1M"),
        (1_234_567, "1.23M"),
        (2.5e9, "2.5B"),
        (1.04e12, "1.04T"),
    ],
)
def test_short(number, text):
    assert short(number) == text
