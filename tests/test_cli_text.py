"""What the command line reads and writes as text: quantities and tables."""

from __future__ import annotations

from effnet_fast.cli.options import amount, count, memory, resolution
from effnet_fast.cli.table import si, table


def test_quantities() -> None:
    assert [amount(text) for text in ("390M", "1.5G", "2e9", ".5k", "7")] == [390e6, 1.5e9, 2e9, 500, 7]
    assert [memory(text) for text in ("500MB", "2GiB", "1.5 kB", "10B")] == [500e6, 2 * 1024**3, 1500, 10]
    assert [resolution(text) for text in ("260px", "1.15")] == [(260, "px"), (1.15, "x")]
    assert count("16") == 16
    cases = {999: "999", 1000: "1.000 k", 385814752: "385.8 M", 10266000000: "10.27 G", 999999: "1.000 M", 0: "0", 2e12: "2.000 T"}
    assert {value: si(value) for value in cases} == cases
    assert si(1234, "B") == "1.234 kB"


def test_tables_are_aligned() -> None:
    assert table(("a", "bb"), [("x", 1000), ("long", None)], "lr").splitlines() == [
        "a        bb",
        "----  -----",
        "x     1,000",
        "long      -",
    ]
