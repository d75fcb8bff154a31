"""``python -m calibrate MODEL OUT`` = ``vllm-autoround calibrate MODEL OUT``."""

import sys

from calibrate.cli import calibrate_main

if __name__ == "__main__":
    sys.exit(calibrate_main())
