"""Everything before there are weights to ship: data, the starter base, training, merging."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT and Accelerate import it, and it talks of kernels
