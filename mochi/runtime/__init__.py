"""How a process runs: devices, ranks, number formats, locks, progress."""
