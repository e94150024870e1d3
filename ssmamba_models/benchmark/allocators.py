"""Malloc as it comes and malloc that keeps large blocks: both in one run, in the only order that there is."""

from __future__ import annotations

from collections.abc import Iterator

from ssmamba_models.engine.process_memory import can_keep_large_blocks, keep_large_blocks, large_blocks_kept

_CANNOT_KEEP = (
    "malloc cannot keep large blocks here: it is not glibc, is too old, or is tuned by GLIBC_TUNABLES or MALLOC_* in "
    "the environment; unset these, or use --allocator system"
)


def in_turn(allocator: str) -> Iterator[str]:
    """Put malloc into each state that `allocator` asks for, and yield the state's name: "system" or "kept".

    Args:
        allocator: "system" leaves malloc as this process has it; "kept" keeps large freed blocks, as the commands do
            (engine.process_memory); "both" measures as it is, then kept. A process cannot go back.

    Raises:
        ValueError: large blocks cannot be kept; or "both" in a process that keeps them already.
    """
    if allocator == "both" and large_blocks_kept():
        raise ValueError(
            "--allocator both: this process keeps large blocks already, and cannot go back; start a fresh process, or "
            "use --allocator kept"
        )
    if allocator != "system" and not can_keep_large_blocks():
        raise ValueError(f"--allocator {allocator}: {_CANNOT_KEEP}")
    if allocator != "kept":
        yield "kept" if large_blocks_kept() else "system"
    if allocator != "system":
        if not keep_large_blocks():
            raise ValueError(f"--allocator {allocator}: {_CANNOT_KEEP}")
        yield "kept"
