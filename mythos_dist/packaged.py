"""Files that come with the package: configs and launch scripts.

In a checkout `configs` and `launch` beside this file are links to the folders of the repository; a wheel has copies.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
LAUNCH = Path(__file__).parent / "launch"
