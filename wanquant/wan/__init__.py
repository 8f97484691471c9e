"""The only room that knows diffusers: loading, generating, checkpoints, and tiny-wan."""

import logging

# Where bitsandbytes is installed, and VBench's dependencies bring it, diffusers imports it; it warns of a kernel that
# nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
