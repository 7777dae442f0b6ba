"""What an Xid, NVIDIA's number for a GPU error, asks for: leave the device, or only end the program that met it.

After NVIDIA's catalogue of Xids and its immediate actions (RESTART_APP, RESET_GPU, CONTACT_SUPPORT ...). A number that is not listed is left to the
program's own end: its actors die or are ejected, and that counts against the device anyway.
"""

from __future__ import annotations

# Double-bit and uncontained memory errors, row remapping that failed, a device that fell off the bus or does not answer its driver, links between
# devices: the device needs a reset, or more.
DEVICE_XIDS = frozenset({46, 48, 54, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158})
# A program that read or wrote where it may not, stopped too long, was ended in the middle of something, or met a memory error that was contained to it.
PROGRAM_XIDS = frozenset({6, 8, 13, 31, 32, 43, 45, 68, 69, 94})
# What the catalogue says to ignore: a row was remapped, many errors were corrected. A device that repaired itself stays in service.
NOTED_XIDS = frozenset({63, 92})
# The recovery that is due has changed: also to none at all, when the error was one of a program, or after the recovery.
RECOVERY_XID = 154
NO_RECOVERY = 0


def is_device_fault(xid: int, recovery: int | None = None) -> bool:
    """Whether the device must get no more work until somebody has looked at it.

    `recovery` is what its driver says is due now (NVML's recovery actions); None: it does not say, and what it has announced counts as due.
    """
    return recovery != NO_RECOVERY if xid == RECOVERY_XID else xid in DEVICE_XIDS
