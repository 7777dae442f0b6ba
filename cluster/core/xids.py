"""What an Xid, NVIDIA's number for a GPU error, asks for: leave the device, or only end the program that met it.

After NVIDIA's catalogue of Xids and its immediate actions (RESTART_APP, RESET_GPU, CONTACT_SUPPORT ...). A number that is not listed is left to the
program's own end: its actors die or are ejected, and that counts against the device anyway.
"""

from __future__ import annotations

# Double-bit and uncorrectable memory errors, row remapping that failed or waits for a reset, a device that fell off the bus or does not answer its
# driver, links between devices: the device needs a reset, or more.
DEVICE_XIDS = frozenset({46, 48, 54, 62, 63, 64, 74, 79, 92, 94, 95, 109, 110, 119, 120, 136, 140, 143, 154, 155, 156, 158})
# A program that read or wrote where it may not, stopped too long, or was ended in the middle of something.
PROGRAM_XIDS = frozenset({6, 8, 13, 31, 32, 43, 45, 68, 69})


def is_device_fault(xid: int) -> bool:
    """Whether the device must get no more work until somebody has looked at it."""
    return xid in DEVICE_XIDS
