"""DeepSpeed around the model: the only importer of deepspeed. Steps, checkpoints, the update rule.

Importing this package sets DeepSpeed up: it reads its environment while it is imported, and talks too much.
"""

import logging
import os
import warnings

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402

deepspeed.utils.logger.setLevel(logging.ERROR)
# DeepSpeed calls collectives that newer versions of torch have renamed, and torch says so at every call.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
if os.environ["DS_ACCELERATOR"] == "cpu":
    # DeepSpeed would compile a shared-memory collective in C++ for minutes on first use; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# To know Muon by name, DeepSpeed imports it, and with it torch's whole compiler: over a second of every rank's start.
_compile = deepspeed.runtime.compiler.compile
deepspeed.runtime.compiler.compile = lambda *_arguments, **_options: lambda function: function
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402

deepspeed.runtime.compiler.compile = _compile
