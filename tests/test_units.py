import pytest

from mythos_dist.units import bytes_of, short, short_bytes


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


def test_a_billion_bytes_is_a_gigabyte():
    assert [short_bytes(size) for size in (300, 4e5, 1.5e6, 2.5e9, 3e12)] == ["300B", "400kB", "1.5MB", "2.5GB", "3TB"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("400kB", 400_000),
        ("400KB", 400_000),
        ("1.5 GB", 1_500_000_000),
        ("2GiB", 2 * 1024**3),
        ("1T", 10**12),
        ("3 kiB", 3072),
    ],
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "1 XB", "1,5GB", "5 G B", "inf", "1gb", "٣GB"])
def test_other_text_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size, such as 400kB or 200GB"):
        bytes_of(text)
