"""The script of a process that quantizes a GGUF file by llama.cpp's library: LIBRARY SOURCE OUT FILE_TYPE.

The settings are a C struct that grows with llama.cpp's versions. Its first two members have always been the number of
threads and the file type, both 32-bit integers. The library fills in the others, in more room than they need.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

ROOM = 4096  # bytes; the struct has had some hundred


class Settings(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("others", ctypes.c_byte * ROOM))


def quantize(library: str, source: str, out: str, file_type: str) -> int:
    """0, or llama.cpp's code for what went wrong."""
    folder = Path(library).parent
    for name in ("libggml-base", "libggml-cpu", "libggml"):  # the library finds them beside itself, or here
        for file in sorted(folder.glob(f"{name}.*")):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
            break
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = Settings
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Settings))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    settings = llama.llama_model_quantize_default_params()
    settings.file_type, settings.threads = int(file_type), max(1, (os.cpu_count() or 2) // 2)
    llama.llama_backend_init()
    return int(llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(quantize(*sys.argv[1:]))
