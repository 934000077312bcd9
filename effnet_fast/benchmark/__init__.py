"""What the command line, the benchmarks and the tests share to compare networks fairly."""

from effnet_fast.benchmark.calibration import calibrate, images

__all__ = ["calibrate", "images"]
