"""Runs a command as a CPU with AVX2 and nothing newer sees it, most laptops among them.

    python tools/as_avx2.py [--if-other] <command> [arguments]

torch, oneDNN and numba are told to leave AVX-512 and AMX alone. On a CPU that has neither, nothing is changed, and with
``--if-other`` nothing is run.
"""

from __future__ import annotations

import os
import sys

import llvmlite.binding

#: Beginnings of the names of features that a CPU with AVX2 alone does not have.
NEWER = ("avx512", "avx10", "avxvnni", "avxifma", "avxneconvert", "amx", "gfni", "vaes", "vpclmulqdq")


def environment() -> dict[str, str]:
    """The variables, none where the CPU is one of those already."""
    features = llvmlite.binding.get_host_cpu_features()
    if not any(there for name, there in features.items() if name.startswith(("avx512", "amx"))):
        return {}
    kept = {name: there and not name.startswith(NEWER) for name, there in features.items()}
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"{'+' if there else '-'}{name}" for name, there in kept.items()),
    }


def main() -> None:
    found, words = environment(), [word for word in sys.argv[1:] if word != "--if-other"]
    if not found and len(words) < len(sys.argv) - 1:
        print("this CPU has no AVX-512 or AMX: what was run on it was run as AVX2 sees it", flush=True)
        return
    told = "as AVX2: " + " ".join(f"{key}={value}" for key, value in found.items() if key != "NUMBA_CPU_FEATURES")
    print(told if found else "this CPU has no AVX-512 or AMX: nothing is changed", flush=True)
    os.environ.update(found)
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
