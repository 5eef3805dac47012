"""Every test runs on one thread and without a network."""

import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

# Before torch and numpy are imported: the default pool makes small tensors ten times slower on a busy machine.
for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[pool] = "1"
for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
    os.environ[offline] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Processes that a test starts use this checkout too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A shell starts what runs behind it (`make test &`) deaf to Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)


def is_loopback(host: object) -> bool:
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def refuse_network(event: str, args: tuple) -> None:
    """Stops every look-up of, and connection to, another machine, whichever library asks for it."""
    if event == "socket.connect" and args[0].family in (socket.AF_INET, socket.AF_INET6):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    else:
        return
    if not is_loopback(host):
        raise PermissionError(f"Tests: nothing may be fetched from the network, got {host!r}. Use data from a package.")


sys.addaudithook(refuse_network)
