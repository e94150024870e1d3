"""Commands in processes of their own, which begin as a user's do: with nothing but imports behind them.

A fork of pytest's process would have the threads, pools and half-dead objects of hundreds of tests behind it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# What the commands import when they are called: once in the server, and not in each process.
PRELOADED = (
    "ssmamba_models.cli.main", "ssmamba_models", "torch", "timm", "accelerate", "torchmetrics", "tensorboard", "h5py",
    "openslide", "tifffile", "sklearn.linear_model", "matplotlib.figure", "torchmil", "scipy.ndimage",
)  # fmt: skip
LONGEST = 200  # seconds; a command that hangs ends, and with it the test


def run_command(arguments: list[str], limit: int | None = None, may_write_all: bool = True) -> tuple[int, str]:
    """Run a command: its exit code, or what a signal made of it below 0, and what it printed.

    Args:
        arguments: of `ssmamba`.
        limit: bytes that a file may have.
        may_write_all: keep root's right to write where the folder's mode forbids it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # A pipe, for a file would have its limit too.
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_act, args=(writer, arguments, limit, may_write_all))
    process.start()
    writer.close()
    with open(os.dup(reader.fileno()), "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    reader.close()
    process.join()
    return process.exitcode, said


def _act(writer, arguments, limit, may_write_all):
    code = 70
    try:
        os.dup2(writer.fileno(), 1)
        os.dup2(writer.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (the process ends soon)
        import torch

        from ssmamba_models.cli.main import main

        torch.set_num_threads(1)
        if not may_write_all:
            _drop_capabilities()
        signal.alarm(LONGEST)
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        main(arguments)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _drop_capabilities():
    """Make root a user like any other: files that it may not write by their mode it cannot write."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        nothing = (ctypes.c_uint32 * 6)()
        if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), nothing):
            raise OSError(ctypes.get_errno(), "capset")
